"""Triton kernels, their references in torch, and the choice between the two."""
