"""What runs in the workers' processes."""
