"""Demonstrations on real data: `digits`, an easy task, and `parity`, whose depth grows with its input."""
