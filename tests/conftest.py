"""How every test runs: Triton interpreted where there is no GPU, fixed seeds, NaN in fresh allocations."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: deterministic GEMMs
os.environ["TRITONDEQ_CACHE"] = os.devnull  # no folder: tests don't depend on this machine's tables

import hypothesis
import pytest
import torch

KERNELS = Path(__file__).parent / "kernels"
CUDA = torch.cuda.is_available()
# Triton reads this as it decorates a kernel: set it before whatever imports Triton, as the next call does.
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Fills torch.empty and its kin with NaN (integers: their largest): an element that was not written fails a test.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


def refusal() -> str | None:
    """Returns why the kernels can't run with the Triton that is installed, or None."""
    from tritondeq.kernels import dispatch  # after TRITON_INTERPRET is set

    return dispatch.too_old() if dispatch.has_triton() else "triton is not installed"


def pytest_collection_modifyitems(items):
    """Skips the tests of kernels, and those marked so, where the kernels refuse this Triton."""
    reason = refusal()
    for item in items if reason else ():
        if item.path.is_relative_to(KERNELS) or item.get_closest_marker("kernels"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips any other test that asks for the Triton backend and is refused for that reason."""
    try:
        return (yield)
    except (RuntimeError, OSError, AssertionError) as error:  # the last where a test expects another message
        reason = refusal()
        if reason and reason in str(error):
            pytest.skip(reason)
        raise
