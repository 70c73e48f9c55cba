"""How much each step may load, demote, restore and store, and how large the pool is."""
