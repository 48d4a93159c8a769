"""Demonstrations on real data, each beside the explicit nets that a DEQ has to be compared with.

`digits`: an easy task, where one explicit block does. `parity`: a task whose depth grows with its input.
"""
