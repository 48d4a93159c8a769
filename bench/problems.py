"""Small problems, at least one for each op of kernels/dispatch, whose inputs have the same bits on every machine.

A problem runs on any device: by the op, or by the op's reference in torch in any floating dtype. Inputs are multiples
of 2^-11 from Python's generator, in float64, so that no rounding, and no library, has a part in them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from tritondeq import Anderson, Broyden, Picard, backend
from tritondeq.kernels import dispatch, formulas, launch
from tritondeq.loop import Settings, drive, iterate

Result = dict[str, Tensor]
BOTH: dict[str, dict] = {"solve": {}, "adjoint": {"relative": 0.0, "scale": 1.0}}  # what residuals are relative to
STEPS, TOL = 80, 2e-6
OUTCOME = ("steps", "residual", "status")


@dataclass(frozen=True)
class Problem:
    """A problem of one op.

    Attributes:
        name: Of the op, then which of its problems.
        op: Name of the op.
        solve: Takes (device, dtype, whether the op solves and not its reference, tol) and returns tensors by name.
        dtype: That of the op's results.
        tol: Residual at which a sample has converged; 0 of what is no solve.
        choice: Launch parameters that replace those of the pure function.
    """

    name: str
    op: str
    solve: Callable[[torch.device, torch.dtype, bool, float], Result]
    dtype: torch.dtype = torch.float32
    tol: float = 0.0
    choice: dict[str, Any] = field(default_factory=dict)

    def run(self, device: torch.device) -> Result:
        """Returns what the op makes of it, with launch parameters that no table of this machine changes."""
        with launch.override(self.op, self.choice):
            return self.solve(device, self.dtype, True, self.tol)

    def reference(self, device: torch.device, dtype: torch.dtype, tol: float) -> Result:
        """Returns what torch makes of it in this dtype."""
        return self.solve(device, dtype, False, tol)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Returns float64 numbers from -scale to scale, of 12 bits each where the scale is a power of two."""
    bits = random.Random(seed).getrandbits
    return scale * torch.tensor([bits(12) / 2048 - 1 for _ in range(prod(shape))], dtype=torch.float64).reshape(shape)


def sparse(seed: int, features: int) -> Tensor:
    """Returns W [D, D] with two weights of 1/4 or -1/4 in a row: sums of its products with bf16 take few bits."""
    chosen, w = random.Random(seed), torch.zeros(features, features, dtype=torch.float64)
    for row in w:
        for column in chosen.sample(range(features), 2):
            row[column] = chosen.choice((0.25, -0.25))
    return w


def placed(x: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns tensors, in any nesting of tuples, on this device in this dtype; they keep their memory format."""
    if isinstance(x, tuple):
        return tuple(placed(part, device, dtype) for part in x)
    return x.to(device, dtype)


def listed() -> list[Problem]:
    """Returns all problems."""
    return [*_affine(), *_cells(), *_steps(), *_products(), *_norms()]


def _whole(name: str, way: str, inputs: tuple, **options: Any) -> Problem:
    """A problem of rows.*, of which `way` is "solve" or "adjoint"."""
    op = name.split()[0]

    def solve(device: torch.device, dtype: torch.dtype, kernel: bool, tol: float) -> Result:
        call = getattr(dispatch.load(op), way if kernel else f"{way}_ref")
        got = call(*placed(inputs, device, dtype), tol=tol, max_steps=STEPS, **BOTH[way], **options)
        return dict(zip(("z", "steps", "residual", "status"), got, strict=True))

    return Problem(f"{name} {way}", op, solve, tol=TOL)


def _affine() -> list[Problem]:
    w, u, pre = draw(1, 40, 40, scale=1 / 16), draw(2, 20, 40, scale=2.0), draw(3, 20, 40)
    exact = sparse(4, 40)
    return [
        _whole("rows.affine", "solve", (w, u), activation="tanh"),
        _whole("rows.affine", "adjoint", (w, pre, u), activation="tanh"),
        _whole("rows.affine from a start", "solve", (w, u, pre), activation="gelu", terms=3),
        _whole("rows.affine Anderson", "solve", (w, u), activation="tanh", memory=3),
        _whole("rows.affine relu", "solve", (exact, u), activation="relu"),
        _whole("rows.affine relu", "adjoint", (exact, pre, u), activation="relu"),
    ]


def _cells() -> list[Problem]:
    sizes = ((40, 24), (24, 40), (40, 24))
    weights = tuple(draw(10 + i, *size, scale=1 / 8) for i, size in enumerate(sizes))
    biases = tuple(draw(20 + i, len(w), scale=0.25) for i, w in enumerate(weights))
    scale, u, g = 0.5 + draw(30, 24, scale=0.25), draw(31, 10, 24), draw(32, 10, 24)
    slopes = tuple(draw(40 + i, 10, 40) for i in range(2))
    post, pre = {"form": "post", "activation": "silu"}, {"form": "pre", "activation": "relu"}
    gates = tuple(draw(50 + i, 24, 24, scale=1 / 8) for i in range(3))
    inputs = tuple(draw(60 + i, 10, 24) for i in range(3))
    saved = formulas.gru_slopes(g, *formulas.gru(gates, inputs, g))
    return [
        _whole("rows.mlp", "solve", (weights[:2], biases[:2], scale, u), **post),
        _whole("rows.mlp", "adjoint", (weights[:2], scale, (1 + u, slopes[0]), g), **post),
        _whole("rows.mlp gate", "solve", (weights, biases, scale, u), **pre),
        _whole("rows.mlp gate", "adjoint", (weights, scale, (1 + u, *slopes), g), **pre),
        _whole("rows.gated", "solve", (gates, inputs)),
        _whole("rows.gated", "adjoint", (gates, saved, g)),
    ]


def _outcome(outcome: Any) -> Result:
    return {"z": outcome.value} | {name: getattr(outcome, name) for name in OUTCOME}


def _stepped(solver: Any, variant: str, width: int, dtype: torch.dtype, **choice: int) -> list[Problem]:
    """Problems of the fused steps: z = c + a z, which torch rounds twice on any device, by the rules of each way."""
    inputs = draw(70, 3, width, scale=0.5), draw(71, 3, width), draw(72, 3, width)

    def solve(rules: dict, device: torch.device, dtype: torch.dtype, kernel: bool, tol: float) -> Result:
        a, c, z = placed(inputs, device, dtype)
        with backend("triton" if kernel else "torch"):
            return _outcome(iterate(lambda z: c + a * z, z, Settings(solver, tol, STEPS, **rules)))

    def problem(way: str) -> Problem:
        tol = 1e-9 if dtype == torch.float64 else TOL
        run = lambda *known: solve(BOTH[way], *known)  # noqa: E731
        return Problem(f"{solver.fused_steps}{variant} {way}", solver.fused_steps, run, dtype, tol, choice)

    return [problem(way) for way in BOTH]


def _steps() -> list[Problem]:
    problems = []
    for solver in (Picard(), Anderson(memory=3), Broyden(memory=4)):
        problems += _stepped(solver, "", 200, torch.float32)
        problems += _stepped(solver, " split", 300, torch.float32, BLOCK_N=128)
        problems += _stepped(solver, " float64", 200, torch.float64)
    return problems


def _product(variant: str, way: str, inputs: tuple, **options: Any) -> Problem:
    """A problem of steps.affine, whose references are those of rows.affine."""

    def solve(device: torch.device, dtype: torch.dtype, kernel: bool, tol: float) -> Result:
        known = options | BOTH[way] | {"tol": tol, "max_steps": STEPS}
        if not kernel:
            got = getattr(dispatch.load("rows.affine"), f"{way}_ref")(*placed(inputs, device, dtype), **known)
            return dict(zip(("z", *OUTCOME), got, strict=True))
        steps = getattr(dispatch.load("steps.affine"), way)(*placed(inputs, device, dtype), **known)
        return _outcome(drive(steps, Settings(Picard(), tol, STEPS)))

    return Problem(f"steps.affine{variant} {way}", "steps.affine", solve, tol=TOL)


def _products() -> list[Problem]:
    w, u, z = draw(80, 40, 40, scale=1 / 16), draw(81, 18, 40, scale=2.0), draw(82, 18, 40)
    exact = sparse(83, 40)
    return [
        _product("", "solve", (w, u, z), activation="tanh"),
        _product("", "adjoint", (w, z, u), activation="tanh"),
        _product(" relu", "solve", (exact, u, z), activation="relu"),
        _product(" relu", "adjoint", (exact, z, u), activation="relu"),
    ]


def _norm(op: str, variant: str, names: tuple[str, ...], inputs: tuple, *rest: Any, **choice: int) -> Problem:
    """A problem of norms.*, which returns tensors of these names."""

    def solve(device: torch.device, dtype: torch.dtype, kernel: bool, tol: float) -> Result:
        one = dispatch.load(op)
        got = (one.run if kernel else one.ref)(*placed(inputs, device, dtype), *rest)
        return dict(zip(names, got if isinstance(got, tuple) else (got,), strict=True))

    return Problem(f"{op}{variant}", op, solve, choice=choice)


def _norms() -> list[Problem]:
    a, b = (draw(90 + i, 2, 7, 11, 12).movedim(-1, 1) for i in range(2))
    vectors = draw(92, 12), draw(93, 12)
    rows = draw(94, 9, 100), draw(95, 9, 100), draw(96, 100), draw(97, 100)
    return [
        _norm("norms.group_norm", "", ("y",), (a, b, *vectors), 3, 1e-5, "before"),
        _norm("norms.group_norm", " split", ("y",), (a, b, *vectors), 3, 1e-5, "after", BLOCK_P=32),
        _norm("norms.residual_rms", "", ("s", "n"), rows, 1e-6),
        _norm("norms.unit", "", ("unit", "scale"), rows[:1]),
        _far(rows[0], rows[1]),
    ]


def _far(y: Tensor, start: Tensor) -> Problem:
    """Residuals that are reported as half of what they are, or twice, of z = y (1 + 2^-6)."""
    reported = 2.0**-6 * torch.tensor([0.5, 2.0] * len(y))[: len(y)]
    limits = {"scale": 0.0, "factor": 1.0, "least": 0.0}

    def solve(device: torch.device, dtype: torch.dtype, kernel: bool, tol: float) -> Result:
        one = dispatch.load("norms.residual")
        image, begin, residuals = placed((y, start, reported), device, dtype)
        run = one.run if kernel else one.ref
        far = run(image, image * (1 + 2.0**-6), None, begin, None, residuals, **limits)
        return {"1 + far": 1 + far.to(dtype)[:, None]}

    return Problem("norms.residual", "norms.residual", solve)
