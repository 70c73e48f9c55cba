"""Which blocks are resident and which are pooled, and what a step copies for it."""
