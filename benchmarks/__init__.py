"""Measurements of pie_vllm: what they ask and found is in README.md of this folder."""
