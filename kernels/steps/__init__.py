"""Steps of solvers, one or two launches each."""
