"""Measurements of tritondeq beside eager PyTorch, torch.compile, torchdeq and explicit nets.

`python -m tritondeq bench` runs them all and writes a JSON file and pictures; `pytest bench --benchmark-only` runs the
same cases one by one under pytest-benchmark. Results are checked equal before they are timed.

The command times the contestants of a case in turn, asks the GPU's clock, counts launches and memory, stops in time and
goes on past what fails. pytest-benchmark times one call after another, which is what one wants while one optimises.

`--first` is for a GPU on which no kernel has run yet: `first` (what is compared and written), `problems`, `figures`.

What is where: `shapes` (cells and sizes), `solves` (whole solves, training steps, time against steps), `steps` (the
price of a step), `host` (what a small call costs beside it), `uneven` (rows of many depths), `blocks` (the
Transformer cell), `memory`, `launches`, `rivals`, `measure` (clocks and counts), `processes` (tests of the device),
`machine` (where, and its limits), `suspect` (figures that cannot be), `report` and `pictures` (from a results file).
`cells`, `stability` and `wirings` are commands that print one table each.
"""
