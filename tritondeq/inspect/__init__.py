"""How layers do: `diagnose`, `Watch`, the Jacobian at a fixed point, and pictures of solves."""
