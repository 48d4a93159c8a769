"""Norms of what a cell evaluates, one launch each."""
