"""The one loop: every solver, every cell, forward and backward."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .kernels import dispatch
from .kernels.rules import Rules
from .kernels.tails import PARTS, PLAIN, Tail
from .layout import Layout
from .solution import Solution
from .solvers import Solver

READ_EVERY = 4  # steps between two looks, one look late, at whether any sample is still active on a GPU

Parts = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Settings:
    """What one solve needs beside the map and its start: arguments of `fixed_point`, with the mask as [B, N] bool.

    Attributes:
        tail: (g, Tail) where the map is that Tail of the parts that g returns.
        estimate: Of the inverse Jacobian, by an earlier solve; this one begins with it.
        leaves: Filled by this solve.
    """

    solver: Solver
    tol: float
    max_steps: int
    mask: Tensor | None = None
    group: Any = None
    trace: bool = False
    tail: tuple[Parts, Tail] | None = None
    estimate: "Estimate | None" = None
    leaves: "Estimate | None" = None


class Estimate:
    """What a solve learnt of the inverse Jacobian, as its solver's `estimate` gives it."""

    rings: Any = None


def iterate(f: Callable[[Tensor], Tensor], z: Tensor, settings: Settings) -> tuple[Tensor, Solution]:
    """Runs the loop. Returns the iterate [B, N] with the lowest residual, and a Solution without it."""
    op, how = plan_steps(settings.solver, z.device, z.shape[1], z.dtype) if z.shape[0] else (None, "")
    with without_autocast(z.device.type) as autocast:
        with explain_no_room(settings.solver, z):
            parts, steps = start(op, f, z, settings)
        parts = autocast(parts)
        if settings.estimate is not None:
            steps.resume(settings.estimate.rings)
        best, solution = drive(steps, settings, parts, z)
        if settings.leaves is not None:
            settings.leaves.rings = tuple(_oldest_first(ring, solution.steps) for ring in steps.estimate())
    solution.path = f"loop, {how}" if op else "loop"
    return best, solution


def drive(
    steps: Any, settings: Settings, parts: Callable = lambda z: (), z: Tensor | None = None
) -> tuple[Tensor, Solution]:
    """Runs the loop by these steps, from z on; steps that evaluate the cell themselves need neither its parts nor z."""
    residuals = []
    look = Look(steps.rules.best.device, settings.group)
    for k in range(1, settings.max_steps + 1):
        steps.take(*parts(z))
        if settings.trace:
            residuals.append(steps.rel.clone())
        left = look(steps.left)
        if k == settings.max_steps or left == 0:
            break
        z = steps.onward(left)
    best, status, evaluations, residual = steps.finish()
    return best, Solution(None, status, evaluations, residual, torch.stack(residuals) if settings.trace else None)


def declared(f: Callable, name: str, kind: type) -> Any:
    """Returns the attribute `name` of f, or None where it is of another kind, such as a cell's method of that name."""
    value = getattr(f, name, None)
    return value if isinstance(value, kind) else None


def flat_tail(f: Callable, layout: Layout, args: tuple) -> tuple[Parts, Tail]:
    """Returns `f.tail` as a map of [B, N]; a plain one where there is none, or where the state has no such rows."""
    before, tail = declared(f, "tail", tuple) or (None, PLAIN)
    if before is None or not layout.has_rows(tail.features):
        before, tail = (lambda *a: (f(*a),)), PLAIN

    def parts(flat: Tensor) -> tuple[Tensor, ...]:
        given = before(layout.unpack(flat), *args)
        if not isinstance(given, tuple) or not len(tail.gains) < len(given) <= PARTS:
            got = len(given) if isinstance(given, tuple) else type(given).__name__
            raise ValueError(f"a tail takes a tuple of {len(tail.gains) + 1} to {PARTS} parts, got {got}")
        return tuple(layout.pack(part, cast=False) for part in given)

    return parts, tail


def start(op: Any, f: Callable[[Tensor], Tensor], z: Tensor, settings: Settings) -> tuple[Parts, Any]:
    """Returns what is evaluated of f, and the steps that take it: those of `op`, or in torch where it is None."""
    if op is None:
        return lambda z: (f(z),), _Steps(z, settings)
    parts, tail = settings.tail or (None, PLAIN)
    if parts is None or not tail.fits(settings.solver.fused_steps, z):
        parts, tail = (lambda z: (f(z),)), PLAIN
    options = asdict(settings.solver)  # type: ignore[call-overload]  # every solver is a dataclass
    return parts, op.start(z, settings.mask, settings.tol, settings.max_steps, tail, **options)


def plan_steps(solver: Solver, device: torch.device, width: int, dtype: torch.dtype) -> tuple[Any, str]:
    """Returns (the op that takes this solver's steps or None, how they are taken or why it does not)."""
    if solver.fused_steps is None:
        return None, f"no kernel has {type(solver).__name__}"
    memory = getattr(solver, "memory", 0)
    return dispatch.pick(solver.fused_steps, device, width=width, dtype=dtype, memory=memory)


@contextlib.contextmanager
def explain_no_room(solver: Solver, z: Tensor) -> Iterator[None]:
    """Adds what to change to the error where there is no room for the states of a solve of `z`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{solver} keeps several states of {z.numel() * z.element_size() / 2**20:.0f} MiB, and there is no room: "
            f"lower its memory, take Picard(), or split the batch. {error}"
        ) from error


def _oldest_first(ring: Tensor, steps: Tensor) -> Tensor:
    """Returns `ring` [B, m, N], into whose slot (k - 2) % m evaluation k wrote, with empty slots first, then by age."""
    m = ring.shape[1]
    order = (torch.arange(m, device=ring.device) + steps.long().unsqueeze(1) - 2) % m
    return ring.gather(1, order.unsqueeze(2).expand_as(ring))


class _Steps:
    """The steps of any solver in torch operations; kernels/steps/base.py documents the protocol."""

    def __init__(self, z: Tensor, settings: Settings):
        self.z, self.best, self.mask, self.solver = z, z, settings.mask, settings.solver
        self.rules = Rules(z.shape[0], z.dtype, z.device, settings.tol)
        self.history = self.solver.init(z, self.mask)
        self.k = 0

    def take(self, y: Tensor) -> None:
        z, mask, rules = self.z, self.mask, self.rules
        self.k += 1
        self.y, self.g = y, y - z
        self.seen = self.g if mask is None else torch.where(mask, self.g, 0.0)
        r = torch.linalg.vector_norm(self.seen, dim=1)
        s = torch.linalg.vector_norm(y if mask is None else torch.where(mask, y, 0.0), dim=1)
        self.rel, improved = rules.update(self.k, r, s)
        self.best = z if rules.all_improved else torch.where(improved.unsqueeze(1), z, self.best)

    def left(self) -> Tensor:
        return self.rules.active.count_nonzero()

    def onward(self, left: int | None) -> Tensor:
        y, z = self.y, self.z
        onward = self.solver.step(self.history, z, y, self.g, self.seen, self.rules)
        if left == z.shape[0]:
            self.z = onward.clone() if onward is y else onward  # f may write its next value into the storage of y
        else:
            self.z = torch.where(self.rules.active.unsqueeze(1), onward, z)
        return self.z

    def estimate(self) -> Any:
        return self.solver.estimate(self.history)

    def resume(self, estimate: Any) -> None:
        self.solver.resume(self.history, estimate)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.best, self.rules.status(), self.rules.steps, self.rules.best


class Look:
    """The number of active samples, or None where it is not known.

    On a GPU it is None or 0, and `every` steps old, so that the host never waits; while a graph is captured, None.
    """

    def __init__(self, device: torch.device, group: Any, every: int = READ_EVERY):
        self.group, self.cuda, self.every, self.steps = group, device.type == "cuda", every, 0
        self.blind = self.cuda and torch.cuda.is_current_stream_capturing()
        if self.cuda and not self.blind:
            self.flag = torch.ones((), dtype=torch.int64, pin_memory=True)
            self.copied: torch.cuda.Event | None = None

    def __call__(self, active: Callable[[], Tensor]) -> int | None:
        self.steps += 1
        if self.blind or (self.cuda and self.steps % self.every):
            return None
        left = active()
        if self.group is not None:
            torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MAX, group=self.group)
        if not self.cuda:
            return int(left) if self.group is None or left == 0 else None
        if self.copied is None:
            self.copied = torch.cuda.Event()
        else:
            self.copied.synchronize()
            if not self.flag.item():
                return 0
        self.flag.copy_(left, non_blocking=True)
        self.copied.record()
        return None


@contextlib.contextmanager
def without_autocast(kind: str, caches: bool = True) -> Iterator[Callable[[Callable], Callable]]:
    """A context for the solver; gives what wraps the cell in the autocast around it, which rules only the cell."""
    if not torch.is_autocast_enabled(kind):
        yield lambda f: f
        return
    dtype, caches = torch.get_autocast_dtype(kind), caches and torch.is_autocast_cache_enabled()
    with torch.autocast(kind, enabled=False):
        yield torch.autocast(kind, dtype=dtype, cache_enabled=caches)
    torch.clear_autocast_cache()  # casts made under no_grad would cut the gradients of a later use
