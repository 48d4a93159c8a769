"""What a case of the kernels' tests is, and how close its results have to be.

A case is a function that runs a part of the library, and its reference in torch, on the same input. `@case` registers
it by its name; with keyword arguments, each of which holds the arguments of a variant, as one case for each of them.
The functions load kernels by `dispatch.load`, so that the names of all cases can be listed without Triton.
"""

import functools
import importlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tritondeq.kernels.rules import CONVERGED, NONFINITE

CHIPS = (80, 90)  # capabilities, times ten
FACTOR = 3.0  # a row may be this much further from float64 than that of the reference in its own dtype
MOVED = 4  # times that a reference is run on inputs that differ by a rounding
# Relative error that a kernel may have whatever the reference's is: a few roundings of its results.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDING = 2.0**-8  # of an increment to bf16, relative to it
# Relative and absolute error of a reported residual, and how many times that of the reference.
RESIDUAL, RESIDUAL_FLOOR, RESIDUAL_FACTOR = 0.05, 5e-7, 4.0


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: The function's name, with the variant's after a dot.
        run: Makes its input, which depends on torch's seed alone, and returns an Outcome.
        smoke: Whether every run of the tests has it.
        notes: Whether lanes of one warp may store different values in one place, of which nothing may come.
        most: How many of the schedules it runs under at most, where all take too long.
        rare: Whether `python -m tests.ptx` alone has it: it takes long, and the others differ in little.
        chip: The one of `CHIPS` for which test runs have it under more schedules, or alone.
    """

    name: str
    run: Callable[[], "Outcome"]
    smoke: bool = False
    notes: bool = False
    most: int | None = None
    rare: bool = False

    @property
    def chip(self) -> int:
        return CHIPS[zlib.crc32(self.name.encode()) % len(CHIPS)]


CASES: dict[str, Case] = {}


class Solved(NamedTuple):
    """What a solve returns: of the best iterate z [B, N], and of each sample."""

    z: Tensor
    steps: Tensor
    residual: Tensor
    status: Tensor


@dataclass
class Outcome:
    """What a case found.

    Attributes:
        bits: Tensors that have the same bits under every schedule.
        error, bound: Of the value that is nearest to its bound, or furthest beyond it.
        wrong: What else is not as it should be, one sentence each.
    """

    bits: tuple[Tensor, ...]
    error: float = 0.0
    bound: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def expect(self, right: Tensor, what: str, actual: Tensor, expected: Tensor) -> None:
        """Notes the first row where `right` is False."""
        if not right.all():
            at = (~right).nonzero()[0].item()
            self.wrong.append(f"{what} of row {at} is {actual[at].tolist()} and not {expected[at].tolist()}")

    def compare(self, actual: Tensor, theirs: Tensor, exact: Tensor, slack: Tensor | float = 0.0) -> None:
        """Takes in a value: its error row by row against float64, and the reference's, `theirs`."""
        if len(actual) == 0:
            return
        errors, most = off(actual, exact), bounds(theirs, actual.dtype, slack)
        at = (errors / most).nan_to_num(nan=float("inf")).argmax()
        if self.bound == 0.0 or not errors[at] / most[at] <= self.error / self.bound:
            self.error, self.bound = errors[at].item(), most[at].item()


def load() -> dict[str, Case]:
    """Returns all cases, by name."""
    for file in sorted(Path(__file__).parent.glob("cases_*.py")):
        importlib.import_module(f"{__package__}.{file.stem}")
    return CASES


def case(function=None, /, *, smoke=False, notes=False, most=None, rare=(), **variants):
    """Registers a case, or one for each variant.

    `smoke` is True, or the name of the variant that is; `rare` has the names of those that are.
    """
    if function is None:
        return functools.partial(case, smoke=smoke, notes=notes, most=most, rare=rare, **variants)
    name = function.__name__
    if not variants:
        CASES[name] = Case(name, function, smoke, notes, most)
    for variant, arguments in variants.items():
        run = functools.partial(function, **arguments)
        CASES[f"{name}.{variant}"] = Case(f"{name}.{variant}", run, variant == smoke, notes, most, variant in rare)
    return function


def bounds(theirs: Tensor, dtype: torch.dtype, slack: Tensor | float) -> Tensor:
    """Returns the largest error of each row, by that of the reference."""
    return FACTOR * theirs + FLOOR[dtype] + slack


def off(actual: Tensor, exact: Tensor) -> Tensor:
    """Returns the relative error of each row; a row of zeros has to be one."""
    actual, exact = (x.double().reshape(len(x), -1) for x in (actual, exact))
    error = (actual - exact).norm(dim=1)
    return torch.where(error > 0, error / exact.norm(dim=1).clamp(min=1e-300), error)


def solved(got, reference, inputs, options, *, rounds=0, late=1, slack=0.0, again=None) -> Outcome:
    """Judges a solve by the reference's, in its dtype and in float64, after as many steps as each row took.

    Args:
        got: What it returned.
        reference: Does the same to (*inputs, **options), of which `tol` and `max_steps` are two.
        inputs, options: Its arguments; the tensors among the inputs are in the dtype of the solve.
        rounds: How many products one after another have increments that are rounded to bf16. What each step adds to an
            error, the later ones take down as they do the residual.
        late: How many steps a row may take more than the reference, or fewer.
        slack: Of the error.
        again: Returns the residuals of any iterates [B, N], in float64. Where it is given, a row may take another path
            than the reference, as Anderson does by differences that are rounded: it is then as far from the solution as
            the reference in float64 after as many steps.
    """
    got, eager = Solved(*got[:4]), Solved(*reference(*inputs, **options)[:4])
    outcome = Outcome(tuple(got))
    outcome.expect(got.status == eager.status, "status", got.status, eager.status)
    outcome.expect((got.steps - eager.steps).abs() <= late, "steps", got.steps, eager.steps)
    near, rough = _after(got.steps, reference, inputs, options)
    exact, residual = _after(got.steps, reference, double(inputs), options)
    allowed = residual * 0 + slack
    if rounds:
        for back in (1, 2):  # the second where a reference is exact at once
            _, before = _after((got.steps - back).clamp(min=1), reference, double(inputs), options)
            allowed = allowed + rounds * got.steps * ROUNDING**back * before
    failed = eager.status == NONFINITE
    outcome.expect(_same(got.z, eager.z) | ~failed, "iterate before NaN", got.z, eager.z)
    truth, theirs = exact, off(near, exact)
    beyond = (off(got.z, exact) > bounds(theirs, got.z.dtype, allowed)) & ~failed
    if beyond.any() and again is None:  # or the one error of the reference is small by luck
        theirs = torch.stack([theirs, *_moved(got.steps, reference, inputs, options)]).amax(0)
    elif beyond.any():
        end = Solved(*reference(*double(inputs), **options | {"tol": 1e-12, "max_steps": 500})[:4])
        outcome.expect((end.status == CONVERGED) | ~beyond, "status in float64", end.status, eager.status)
        truth = torch.where(beyond[:, None], end.z, exact)
        theirs = torch.where(beyond, off(exact, end.z), theirs)
        residual = torch.where(beyond, again(got.z.double()), residual)
    outcome.compare(got.z[~failed], theirs[~failed], truth[~failed], allowed[~failed])
    least = RESIDUAL_FLOOR if got.z.dtype == torch.float32 else FLOOR[torch.float64]
    allowed = allowed + RESIDUAL * residual + RESIDUAL_FACTOR * (rough - residual).abs() + least
    outcome.expect(((got.residual - residual).abs() <= allowed) | failed, "residual", got.residual, residual)
    return outcome


def _after(steps: Tensor, reference, inputs, options) -> tuple[Tensor, Tensor]:
    """Returns (the best iterate, its residual) of the reference after so many steps of each row, in float64."""
    z, residual = None, torch.empty(len(steps), dtype=torch.float64)
    for n in steps.unique().tolist():
        rows = steps == n
        one = reference(*inputs, **options | {"tol": 1e-30, "max_steps": n})
        z = torch.empty_like(one[0], dtype=torch.float64) if z is None else z
        z[rows], residual[rows] = one[0][rows].double(), one[2][rows].double()
    return z, residual


def _moved(steps: Tensor, reference, inputs, options) -> Iterator[Tensor]:
    """Yields errors of the reference by its rounding, where its inputs are others by a rounding of their own."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(MOVED):
        others = _by_a_rounding(inputs, draws)
        yield off(*(_after(steps, reference, x, options)[0] for x in (others, double(others))))


def _by_a_rounding(x, draws: torch.Generator):
    """Returns tensors, in any nesting of tuples and lists, each element of which goes up, down or nowhere."""
    if not isinstance(x, Tensor):
        return type(x)(_by_a_rounding(part, draws) for part in x)
    return x * (1 + torch.finfo(x.dtype).eps * torch.randint(-1, 2, x.shape, generator=draws)).to(x.dtype)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Returns which rows have the same values, NaN among them."""
    return ((a == b) | (a.isnan() & b.isnan())).all(1)


def in_terms(w: Tensor, terms: int) -> Tensor:
    """Returns w rounded to what so many bf16 terms hold."""
    near = torch.zeros_like(w)
    for _ in range(terms):
        near = near + (w - near).bfloat16().float()
    return near


def contraction(features: int, norm: float = 0.6, terms: int = 3) -> Tensor:
    """Returns W [D, D] of this spectral norm, which so many bf16 terms hold."""
    w = torch.randn(features, features)
    return in_terms(w * (norm / torch.linalg.matrix_norm(w, 2)), terms)


def double(x):
    """Returns tensors, in any nesting of tuples and lists, in float64."""
    return x.double() if isinstance(x, Tensor) else type(x)(double(part) for part in x)
