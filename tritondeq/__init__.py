"""tritondeq."""
