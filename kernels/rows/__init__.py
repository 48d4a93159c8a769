"""Whole solves of cells that treat rows one by one, one launch each."""
