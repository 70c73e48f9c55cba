"""Obeys: copies blocks as it is told, and owns the CPU memory of the pool."""
