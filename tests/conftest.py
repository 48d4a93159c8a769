"""How every test runs: Triton interpreted where there is no GPU, fixed seeds, NaN in fresh allocations."""

import inspect
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: deterministic GEMMs
os.environ["TRITONDEQ_CACHE"] = os.devnull  # no folder: tests don't depend on this machine's tables

import hypothesis
import numpy as np
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


@pytest.fixture(autouse=True, scope="session")
def truncating_products():
    """Makes the interpreter's dots as inexact as tensor cores: values never rest on rounding that a GPU does not do.

    Those add 16 products at a time to the accumulator, exactly, and cut the sum to float32, toward zero.
    """
    if CUDA or refusal():
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, acc, *precision):
        left, right, out = (x.data.astype(np.float64) for x in (a, b, acc))
        for k in range(0, left.shape[1], 16):
            # BLAS would treat the rows of small matrices differently; a tensor core does not
            exact = out + np.einsum("ik,kj->ij", left[:, k : k + 16], right[k : k + 16])
            near = exact.astype(np.float32)
            out = np.where(abs(near) > abs(exact), np.nextafter(near, np.float32(0)), near).astype(np.float64)
        return interpreter.TensorHandle(out.astype(np.float32), acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Makes the interpreter look for Triton's builtins once a launch, and not in every function that a kernel calls."""
    if CUDA or refusal():
        return
    from triton.runtime import interpreter

    patch, first = interpreter._patch_builtin, {}
    is_builtin = interpreter.tl.core.is_builtin

    def patch_once(part, *rest):
        if part not in first:
            first[part] = next((name for name, member in inspect.getmembers(part) if is_builtin(member)), None)
        if first[part] and is_builtin(getattr(part, first[part])):
            patch(part, *rest)

    interpreter._patch_builtin = patch_once


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
