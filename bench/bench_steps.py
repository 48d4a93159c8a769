"""The price of a step, `steps.py` under pytest-benchmark: `pytest bench --benchmark-only`."""

import pytest
import torch

from tritondeq.bench import measure, steps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTESTANTS = (
    "bare cell",
    "Picard",
    "Anderson(5)",
    "Picard, graph",
    "Anderson(5), graph",
    "torchdeq Picard",
    "torchdeq Anderson(6)",
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize(
    "shape", steps.suite_shapes("quick", DEVICE.type == "cuda"), ids=lambda s: f"{s.rows}x{s.features}"
)
def test_step(benchmark, shape, contestant):
    calls = steps.contestants(shape, DEVICE)
    if contestant not in calls:
        pytest.skip("not on this device, or torchdeq is not installed")
    benchmark.group = f"{steps.EVALUATIONS} evaluations at {shape.rows}x{shape.features}"

    def call():
        calls[contestant]()
        measure.synchronize(DEVICE)

    benchmark(call)
