"""What drives the simulator: random machines, traces, and shifts of the load."""
