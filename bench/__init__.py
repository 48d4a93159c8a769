"""Measurements of tritondeq beside eager PyTorch, torch.compile, torchdeq and explicit nets.

`python -m tritondeq bench` runs them all and writes a JSON file and pictures; `pytest bench --benchmark-only` runs the
same cases one by one under pytest-benchmark. Results are checked equal before they are timed.

Both call the same functions: `solves.Setup.contestants` and `steps.contestants` make the calls, `Setup.wrong` checks
them. pytest-benchmark times one call after another with the host's clock, which is what one wants while one optimises;
the command times contestants of a case in turn and asks the GPU's clock, counts launches and memory, keeps to a time
and goes on past what fails, which pytest-benchmark cannot, so it is not built on it.

What is where: `shapes` (cells and sizes), `solves` (G1 to G5, G11, time against steps), `steps` (G7, G8, a CPU),
`uneven` (G6), `blocks` (G9), `memory` (G9, G10), `launches` (G12), `rivals`, `measure` (clocks and counts), `targets`
(what is to be reached), `predict` (what is expected), `report` and `pictures` (from a results file).
"""
