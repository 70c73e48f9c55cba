"""What runs in the process of the scheduler."""
