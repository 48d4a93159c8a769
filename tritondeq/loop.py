"""The one loop: every solver, every cell, forward and backward."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .kernels import devices, dispatch
from .kernels.rules import Rules
from .kernels.tails import PLAIN, Tail
from .problem import Parts
from .solution import Outcome, Route
from .solvers import Solver

WATCHED = 2  # evaluations that a `guards.Watched` sees


Ended = tuple[Parts, Tail]  # (g, Tail) where a map is that Tail of the parts that g returns


@dataclass(frozen=True)
class Settings:
    """What one solve needs beside the map and its start: arguments of `fixed_point`, with the mask as [B, N] bool.

    Attributes:
        relative, scale: What the residual is relative to: see kernels/rules.py.
        sizes: The scale of each sample, [B], in place of one for all.
        estimate: Of the inverse Jacobian, by an earlier solve; this one begins with it.
        leaves: Filled by this solve.
        at: Numbers of evaluations after which the state is stored.
        callback: Called after each evaluation with (its number, the state [B, N] that it was made of, residuals [B]).
    """

    solver: Solver
    tol: float
    max_steps: int
    mask: Tensor | None = None
    group: Any = None
    trace: bool = False
    relative: float = 1.0
    scale: float = 0.0
    sizes: Tensor | None = None
    estimate: "Estimate | None" = None
    leaves: "Estimate | None" = None
    at: tuple[int, ...] = ()
    callback: Callable[[int, Tensor, Tensor], None] | None = None


class Estimate:
    """What a solve learnt of the inverse Jacobian, as its solver's `estimate` gives it."""

    rings: Any = None


def iterate(
    f: Callable[[Tensor], Tensor], z: Tensor, settings: Settings, tail: Ended | None = None, watch: Any = None
) -> Outcome:
    """Runs the loop for z = f(z), which `tail` describes too. A `guards.Watched` sees the evaluations."""
    if torch.is_autocast_enabled(z.device.type):
        with without_autocast(z.device.type) as autocast:
            return _iterate(f, z, settings, tail, watch, autocast)
    return _iterate(f, z, settings, tail, watch)


def _iterate(
    f: Callable, z: Tensor, settings: Settings, tail: Ended | None, watch: Any, autocast: Callable | None = None
) -> Outcome:
    op, how = plan_steps(settings.solver, z.device, z.shape[1], z.dtype) if z.shape[0] else (None, "")
    with explain_no_room(settings.solver, z):
        parts, steps = start(op, f, z, settings, tail)
    parts = parts if autocast is None else autocast(parts)
    if settings.sizes is not None:
        steps.base.copy_(settings.sizes)
    if settings.estimate is not None:
        steps.resume(settings.estimate.rings)
    outcome = drive(steps, settings, parts, z, Route.FUSED if op else Route.TORCH, how, watch)
    if settings.leaves is not None:
        settings.leaves.rings = tuple(_oldest_first(ring, outcome.steps) for ring in steps.estimate())
    return outcome


def drive(
    steps: Any,
    settings: Settings,
    parts: Callable = lambda z: (),
    z: Tensor | None = None,
    route: Route = Route.FUSED,
    why: str = "",
    watch: Any = None,
) -> Outcome:
    """Runs the loop by these steps, from z on; steps that evaluate the cell themselves need neither its parts nor z."""
    residuals, last, trace, callback = [], settings.max_steps, settings.trace, settings.callback
    states: dict[int, Tensor] = {}
    look = Look(steps.device, settings.group)
    for k in range(1, last + 1):
        made = parts(z) if watch is None or k > WATCHED else watch.early(k, parts, z)
        steps.take(*made)
        if trace:
            residuals.append(steps.rel.clone())
        if callback is not None and z is not None:
            callback(k, z, steps.rel)
        left = look(steps.left)
        if k == last or left == 0:
            break
        z = steps.onward(left)
        if k in settings.at:
            states[k] = z.clone()
    best, status, evaluations, residual = steps.finish()
    return Outcome(
        best,
        status,
        evaluations,
        residual,
        torch.stack(residuals) if trace else None,
        route,
        why,
        steps.last,
        steps.base,
        tuple([states.get(k, best) for k in settings.at]),
    )


def start(
    op: Any, f: Callable[[Tensor], Tensor], z: Tensor, settings: Settings, ended: Ended | None = None
) -> tuple[Parts, Any]:
    """Returns what is evaluated of f, and the steps that take it: those of `op`, or in torch where it is None."""
    if op is None:
        return lambda z: (f(z),), _Steps(z, settings)
    parts, tail = ended or (None, PLAIN)
    if parts is None or not tail.fits(settings.solver.fused_steps, z):
        parts, tail = (lambda z: (f(z),)), PLAIN
    options = asdict(settings.solver)  # type: ignore[call-overload]  # every solver is a dataclass
    options |= {"relative": settings.relative, "scale": settings.scale}
    return parts, op.start(z, settings.mask, settings.tol, settings.max_steps, tail, **options)


def plan_steps(solver: Solver, device: torch.device, width: int, dtype: torch.dtype) -> tuple[Any, str]:
    """Returns (the op that takes this solver's steps or None, how they are taken or why it does not)."""
    if solver.fused_steps is None:
        return None, f"no kernel has {type(solver).__name__}"
    memory = getattr(solver, "memory", 0)
    return dispatch.pick(solver.fused_steps, device, width=width, dtype=dtype, memory=memory)


class explain_no_room:  # noqa: N801  a context, without a generator's price
    """Adds what to change to the error where there is no room for the states of a solve of `z`."""

    def __init__(self, solver: Solver, z: Tensor):
        self.solver, self.z = solver, z

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            size = self.z.numel() * self.z.element_size() / 2**20
            raise torch.OutOfMemoryError(
                f"{self.solver} keeps several states of {size:.0f} MiB, and there is no room: lower its memory, take "
                f"Picard(), or split the batch. {error}"
            ) from error


def _oldest_first(ring: Tensor, steps: Tensor) -> Tensor:
    """Returns `ring` [B, m, N], into whose slot (k - 2) % m evaluation k wrote, with empty slots first, then by age."""
    m = ring.shape[1]
    order = (torch.arange(m, device=ring.device) + steps.long().unsqueeze(1) - 2) % m
    return ring.gather(1, order.unsqueeze(2).expand_as(ring))


_norms = torch.linalg.vector_norm


class _Steps:
    """The steps of any solver in torch operations; kernels/steps/base.py documents the protocol."""

    def __init__(self, z: Tensor, settings: Settings):
        self.z, self.best, self.mask, self.solver, self.device = z, z, settings.mask, settings.solver, z.device
        rules = settings.tol, settings.relative, settings.scale
        self.rules = Rules(z.shape[0], z.dtype, z.device, *rules, plain=type(z) is Tensor)
        self.history = self.solver.init(z, self.mask)
        self.k = 0

    base = property(lambda self: self.rules.base)
    rel = property(lambda self: self.rules.rel)
    last = property(lambda self: self.rules.last)

    def take(self, y: Tensor) -> None:
        z, mask = self.z, self.mask
        self.k += 1
        self.y = y
        self.seen = self.g = y - z
        if mask is not None:
            self.seen, y = torch.where(mask, self.g, 0.0), torch.where(mask, y, 0.0)
        improved = self.rules.update(self.k, _norms(self.seen, 2, 1), _norms(y, 2, 1))
        self.best = z if improved is None else torch.where(improved.unsqueeze(1), z, self.best)

    def left(self) -> Tensor | int:
        left = self.rules.left
        return self.rules.active.sum(dtype=torch.int32) if left is None else left

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

    On a GPU it is None or 0, and that of the step before: the host waits while the GPU takes the step that has been
    launched since, and one evaluation at most follows that of the last sample. While a graph is captured, it is None.
    """

    def __init__(self, device: torch.device, group: Any):
        self.device, self.group = device, group
        self.cuda, self.blind = device.type == "cuda", devices.capturing(device)
        if self.cuda and not self.blind:
            self.flag = torch.ones((), dtype=torch.int32, device="cpu", pin_memory=True)
            self.copied: torch.cuda.Event | None = None

    def __call__(self, active: Callable[[], Any]) -> int | None:
        if self.blind:
            return None
        left = active()
        if self.group is not None:
            left = left.clone() if isinstance(left, Tensor) else torch.tensor(left)
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
        self.copied.record(torch.cuda.current_stream(self.device))
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
