"""The price of a step, `steps.py` under pytest-benchmark: `pytest bench --benchmark-only`."""

import pytest
import torch

from tritondeq.bench import measure, steps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTESTANTS = ("bare cell", "Picard", "Anderson(5)", "torchdeq Picard", "torchdeq Anderson(6)")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("shape", steps.shapes("quick", DEVICE.type == "cuda"), ids=lambda s: f"{s[0]}x{s[1]}")
def test_step(benchmark, shape, contestant):
    calls = steps.contestants(*shape, DEVICE)
    if contestant not in calls:
        pytest.skip("torchdeq is not installed")
    benchmark.group = f"{steps.EVALUATIONS} evaluations at {shape[0]}x{shape[1]}"

    def call():
        calls[contestant]()
        measure.synchronize(DEVICE)

    benchmark(call)
