"""Measurements of tritondeq beside eager PyTorch, torch.compile, torchdeq and explicit nets.

`python -m tritondeq.bench` runs them all and writes a JSON file and pictures; `pytest bench --benchmark-only` runs the
same cases one by one under pytest-benchmark. Results are checked equal before they are timed.
"""
