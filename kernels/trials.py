"""What a launch on the GPU at hand tells: how long it takes, and what the compiler made of its kernels."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


def seconds(call: Callable[[], Any]) -> float:
    """Median of one call, by triton.testing.do_bench."""
    from triton.testing import do_bench

    return 1e-3 * do_bench(call, warmup=10, rep=50, return_mode="median")


@contextlib.contextmanager
def launched() -> Iterator[list[Any]]:
    """Collects the compiled kernels that are launched in the block; none where they are interpreted.

    A launch returns its kernel to nobody but its caller, and the callers here are launchers of ops.
    """
    from triton.runtime.jit import JITFunction

    found: list[Any] = []
    run = JITFunction.run

    def noting(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        found.append(kernel)
        return kernel

    JITFunction.run = noting
    try:
        yield found
    finally:
        JITFunction.run = run


def spills(kernels: list[Any]) -> int:
    """Registers that each thread of these kernels keeps in memory, the most of any; known once they have run."""
    return max((getattr(kernel, "n_spills", None) or 0 for kernel in kernels), default=0)
