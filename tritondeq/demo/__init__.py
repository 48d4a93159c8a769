"""Demonstrations on real data, each beside the explicit nets that a DEQ has to be compared with.

`digits` is an easy task, where one explicit block does. `parity` is a task whose depth grows with its input.
"""
