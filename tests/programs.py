"""Runs the programs of one launch in a process each, on shared memory, so that they can wait for one another.

Triton's interpreter runs them one after another. But its atomics are the processor's own, on memory that may be shared.
"""

import importlib
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.multiprocessing

PATIENCE = 120.0  # seconds that a launch may take


class InProcesses:
    """Stands in for the jitted kernel "module:name".

    Args:
        absent: Programs that never come.
        late: Programs that come when all others have ended.
        before: What each program does before it starts, told its number and its builder.
    """

    def __init__(
        self,
        kernel: str,
        absent: Collection[int] = (),
        late: Collection[int] = (),
        before: Callable[[int, Any], None] | None = None,
    ):
        self.kernel, self.absent, self.late, self.before = kernel, absent, late, before
        self.grids: list[int] = []
        self.options: dict[str, Any] = {}  # of the last launch

    def __getitem__(self, grid: tuple[int]) -> Callable:
        return partial(self._launch, grid[0])

    def _launch(self, programs: int, *args: Any, **options: Any) -> None:
        self.grids.append(programs)
        self.options = options
        for arg in args:
            if torch.is_tensor(arg):
                arg.share_memory_()
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "triton.runtime.interpreter", self.kernel.split(":")[0]])
        for turn in (False, True):
            numbers = [i for i in range(programs) if i not in self.absent and (i in self.late) == turn]
            line = context.Barrier(len(numbers)) if numbers else None
            told = [(self.kernel, i, programs, line, self.before, args, options) for i in numbers]
            _run([context.Process(target=_program, args=one, daemon=True) for one in told])


def _run(processes: list) -> None:
    """Starts these processes and waits until all have ended well."""
    deadline = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        if None in codes:
            raise TimeoutError(f"programs {[i for i, code in enumerate(codes) if code is None]} still run")
        if any(codes):
            raise RuntimeError(f"programs ended with {codes}")
    finally:
        for process in processes:
            if process.pid is not None and process.is_alive():
                process.kill()
                process.join()


def _program(
    kernel: str, number: int, programs: int, line: Any, before: Callable | None, args: tuple, options: dict
) -> None:
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    builder = interpreter.interpreter_builder
    set_dim, set_idx, atomic = builder.set_grid_dim, builder.set_grid_idx, builder.create_atomic_rmw
    builder.set_grid_dim = lambda *_: set_dim(programs, 1, 1)
    builder.set_grid_idx = lambda *_: set_idx(number, 0, 0)

    def yielding(*told: Any) -> Any:
        time.sleep(1e-4)  # who waits lets the others run
        return atomic(*told)

    builder.create_atomic_rmw = yielding
    # a copy back onto the same memory would undo what others write meanwhile
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    if before is not None:
        before(number, builder)
    module, name = kernel.split(":")
    jitted = getattr(importlib.import_module(module), name)
    line.wait()  # as on a GPU, none starts much before the others
    jitted[(1,)](*args, **options)
