"""Kinds of cases that are one solve of a user's module or closure. `MORE` is the table."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_draw import WIDE, Draw, options
from fuzz_judge import Problem
from fuzz_kinds import of_cell
from fuzz_modules import (
    Attending,
    BatchNormed,
    Counting,
    Custom,
    Energy,
    Normed,
    Recurrent,
    Tanh,
    Transformed,
    Within,
    wrapped,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import tritondeq as tdeq
from tritondeq import Anderson, Implicit, Neumann, OneStep, Picard


def module(
    make: Callable[[Draw, int], nn.Module], shapes: tuple = ((3,), (1,), (2, 2), (0,)), **given: Any
) -> Callable:
    """Returns a kind: a module of a user, as a cell."""

    def kind(draw: Draw) -> Problem:
        n = draw.choice([2, 3, 5])
        return of_cell(draw, make(draw, n), draw.stored(draw.randn(*draw.choice(shapes), n)), **given)

    return kind


def of_function(draw: Draw, f: Callable, z0: Any, leaves: list[Tensor], *, true: Callable | None = None, **given: Any):
    """Returns a case of fixed_point with f(z, *leaves), in float64; `true` is f where f does not compute plainly."""
    asked = options(draw, WIDE) | {k: given.pop(k) for k in ("solver", "adjoint", "tol", "max_steps") if k in given}
    leaves = [leaf.requires_grad_() for leaf in leaves]
    by_arguments, grads = draw.chance(0.3), draw.chance(0.9) or given.pop("always", False)
    given.pop("always", None)

    def call() -> Any:
        g, args = (f, tuple(leaves)) if by_arguments else (lambda z: f(z, *leaves), ())
        with torch.set_grad_enabled(grads):
            extra = {"batch_dims": given.get("dims", 1), "mask": given.get("mask")}
            return tdeq.fixed_point(g, z0, args, **asked, **extra)

    def truth(dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
        points = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        return lambda z: (true or f)(z, *points), points

    return Problem(call, truth, leaves, z0, asked["adjoint"], asked["solver"], asked["tol"], grads=grads, **given)


def closure(draw: Draw) -> Problem:
    """Captured tensors, some of them no leaves; a state that repels plain iteration, now and then."""
    n, b = draw.choice([1, 2, 5]), draw.choice([1, 3])
    w, x = draw.contraction(n, draw.choice([0.5, 0.9, 0.97, 1.3])), draw.randn(b, n)

    def f(z, w, x):
        return torch.tanh(z @ (2 * w / 2).to(z.dtype).T + (x * 1).to(z.dtype))

    return of_function(draw, f, draw.stored(draw.randn(b, n)), [w, x])


def nested_state(draw: Draw) -> Problem:
    n, b = draw.choice([1, 2, 3]), draw.choice([1, 3])
    w, v, x = draw.contraction(n, 0.6), draw.contraction(n, 0.6), draw.randn(b, n)

    def f(z, w, v, x):
        p, (q, r) = z["p"], z["q"]
        return {"p": torch.tanh(q[:, 0] @ w.T + x), "q": (torch.stack([p @ v.T, 0.3 * q[:, 0]], 1), 0.5 * r.cos())}

    return of_function(draw, f, {"p": draw.randn(b, n), "q": (draw.randn(b, 2, n), draw.randn(b, 1))}, [w, v, x])


def batch_dims(draw: Draw) -> Problem:
    """Rows that depend on one another, and batch_dims that admits it."""
    w, a, x = draw.contraction(2, 0.7), draw.contraction(3, 0.9), draw.randn(2, 3, 2)
    dims = draw.choice([0, 1, -2])
    return of_function(draw, lambda z, w, a, x: torch.tanh(a @ z @ w.T + x), draw.randn(2, 3, 2), [w, a, x], dims=dims)


def masked(draw: Draw) -> Problem:
    """What a mask leaves out depends on nothing that counts, and nothing that counts depends on it."""
    w, x, mask = draw.contraction(2, 0.8), draw.randn(3, 4), torch.tensor([[True, True, False, False]])

    def f(z, w, x):
        return torch.cat([torch.tanh(z[:, :2] @ w.T + x[:, :2]), 0.9 * z[:, 2:] + x[:, 2:]], 1)

    return of_function(draw, f, draw.randn(3, 4), [w, x], mask=mask.expand(3, 4))


def nan_row(draw: Draw) -> Problem:
    w, x = draw.contraction(3, 0.7), draw.randn(3, 3)
    x[draw.randrange(3), draw.randrange(3)] = float("nan")
    return of_function(draw, lambda z, w, x: torch.tanh(z @ w.T + x), draw.randn(3, 3), [w, x], nan_is_due=True)


def zero_solution(draw: Draw) -> Problem:
    w = draw.contraction(3, 0.7)
    return of_function(draw, lambda z, w: torch.tanh(z @ w.T), draw.choice([1, 0]) * draw.randn(2, 3), [w])


IN_PLACE = r"in.?place|overw|modif|chang"


def in_place(draw: Draw) -> Problem:
    """Forms of work in place on the state; torch refuses those that autograd can't do with words of its making."""

    def step(z, w, x):
        return torch.tanh(z.clone() @ w.T + x)

    def damped(z, w, x):
        y = step(z, w, x)
        return z.mul_(0.5).add_(0.5 * y)

    def spoil(z, w, x):
        y = step(z, w, x)
        z.zero_()
        return y

    def clamped(z, w, x):
        return step(z.clamp_(-0.3, 0.3), w, x)

    def overwritten(z, w, x):
        return z.copy_(step(z, w, x))

    f = draw.choice([damped, spoil, clamped, overwritten])
    leaves = [draw.contraction(3, 0.7), draw.randn(2, 3)]
    true = lambda z, *leaves: f(z.clone(), *leaves)  # noqa: E731
    return of_function(draw, f, draw.randn(2, 3, scale=0.1), leaves, true=true, words=IN_PLACE)


def nested(levels: int) -> Callable[[Draw], Problem]:
    """Returns a kind: a solve inside f, `levels` deep, against loops."""

    def kind(draw: Draw) -> Problem:
        n, q = 2, 0.4 if levels == 2 else 0.2
        leaves = [*(draw.contraction(n, q) for _ in range(levels)), draw.randn(2, n)]
        adjoint = draw.choice([Implicit(), Implicit(), OneStep(), Neumann(3)])

        def level(i: int, z: Tensor, solve: Callable, leaves: tuple) -> Tensor:
            inner = z if i == levels - 1 else solve(lambda y: level(i + 1, y, solve, leaves) + z, torch.zeros_like(z))
            return torch.tanh(inner @ leaves[i].T + leaves[-1])

        def solved(f: Callable, z: Tensor) -> Tensor:
            return tdeq.fixed_point(f, z, tol=1e-11, max_steps=200).value

        def looped(f: Callable, z: Tensor) -> Tensor:
            for _ in range(36 if levels == 2 else 18):
                z = f(z)
            return z

        given = {
            "adjoint": adjoint,
            "solver": Picard(),
            "tol": 1e-6,
            "words": r"nest|inside|within|inner|another solve",
        }
        f, true = (lambda z, *t, solve=solve: level(0, z, solve, t) for solve in (solved, looped))
        return of_function(draw, f, torch.zeros(2, n, dtype=WIDE), leaves, true=true, **given)

    return kind


RANDOM = r"differ|random|noise|dropout|not a function|no function|draws"


def randomness(draw: Draw) -> Problem:
    """No fixed point exists."""
    noise = draw.choice(
        [lambda y: F.dropout(y, 0.3), lambda y: y + 0.1 * torch.randn_like(y), lambda y: F.rrelu(y, training=True)]
    )
    leaves = [draw.contraction(3, 0.7), draw.randn(2, 3)]
    f = lambda z, w, x: torch.tanh(noise(z @ w.T + x - 0.5))  # noqa: E731
    return of_function(draw, f, draw.randn(2, 3), leaves, words=RANDOM, max_steps=40, adjoint=Implicit())


def clocked(draw: Draw) -> Problem:
    """A time embedding: each evaluation has another one, by a counter that f keeps; seen where gradients are taken."""
    ticks = iter(range(10**9))
    size = draw.choice([0.1, 1e-2])

    def f(z, w, x):
        return torch.tanh(z @ w.T + x + size * (next(ticks) % 3))

    leaves = [draw.contraction(3, 0.7), draw.randn(2, 3)]
    return of_function(draw, f, draw.randn(2, 3), leaves, words=RANDOM, max_steps=40, adjoint=Implicit(), always=True)


COUPLED = r"batch|sample|node|row"


def graph(draw: Draw) -> Problem:
    """Nodes of a path as rows, without a batch_dims for it."""
    n = 6
    a = torch.diag(torch.ones(n - 1, dtype=WIDE), 1)
    a, rate = (a + a.T) / (a + a.T).sum(1, keepdim=True), draw.choice([0.5, 0.9])
    x = draw.randn(n, 2) * torch.logspace(0, -draw.choice([0, 4]), n, dtype=WIDE)[:, None]
    given = {"words": COUPLED, "coupled": True, "max_steps": 2000, "solver": draw.choice([Picard(), Anderson()])}
    f = lambda z, w, x: rate * (a.to(z.dtype) @ z @ w) + x  # noqa: E731
    return of_function(draw, f, torch.zeros_like(x), [torch.eye(2, dtype=WIDE), x], adjoint=Implicit(), **given)


def root(draw: Draw) -> Problem:
    """The Jacobian has NaN where torch.where did not take a branch; the true one is that of the other branch."""
    b = -draw.randn(2, 1).abs() - 0.1
    safe = lambda z, b: 0.3 * z + b  # noqa: E731

    def f(z, b):
        return 0.25 * torch.where(z > 0, torch.sqrt(z), 0.0) + 0.3 * z + b

    start = -torch.ones(2, 1, dtype=WIDE)
    return of_function(draw, f, start, [b], true=safe, words=r"nan|finite", nan_is_due=True)


MORE: dict[str, tuple[int, Callable[[Draw], Any]]] = {
    "module": (3, module(Tanh)),
    "weight_norm": (3, module(wrapped(weight_norm))),
    "old weight_norm": (1, module(wrapped(torch.nn.utils.weight_norm))),
    "spectral_norm": (3, module(wrapped(spectral_norm))),
    "LayerNorm, FixedDropout": (3, module(Normed)),
    "attention": (2, module(Attending, ((2, 3), (1, 1), (0, 2)))),
    "GRUCell": (1, module(Recurrent, ((3,), (1,)))),
    "energy": (2, module(Energy, inference=False)),
    "torch.func in f": (1, module(Transformed, words=r"torch\.func|functorch|transform")),
    "custom Function": (1, module(Custom)),
    "counts evaluations": (1, module(Counting)),
    "layer in a cell": (2, module(Within, ((2,),), wide=True, words=r"nest|inside|within|inner|another solve")),
    "BatchNorm": (2, module(BatchNormed, ((4,),), wide=True, train=True, words=COUPLED, coupled=True)),
    "closure": (4, closure),
    "nested state": (2, nested_state),
    "batch_dims": (2, batch_dims),
    "mask": (2, masked),
    "NaN in one row": (2, nan_row),
    "solution 0": (1, zero_solution),
    "in place": (3, in_place),
    "two levels": (2, nested(2)),
    "three levels": (1, nested(3)),
    "randomness": (1, randomness),
    "clock": (1, clocked),
    "graph": (2, graph),
    "NaN in a Jacobian": (1, root),
}
