"""The rows of the CPU pool and the KV that stays parked in them."""
