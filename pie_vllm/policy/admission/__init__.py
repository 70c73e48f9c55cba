"""Which waiting requests start, what of their KV comes back, and how much a step computes."""
