"""Cases of the tails of fused steps: activations, gains, norms of rows, mixing, several parts, each in their dtype."""

import torch

from tritondeq.kernels import formulas
from tritondeq.kernels.tails import Tail

from .cases import case
from .cases_steps import SOLVERS, both

FAST_GELU = 1e-3  # by which this formula for GELU is off


def tailed(
    batch, rows, features, *, act="identity", parts=1, gains=(), mix=1.0, eps=1e-6, solver="picard",
    dtype=torch.float32, cell=None, **options,
):  # fmt: skip
    """Solves z = tail(c + a sin z, constant parts), of `rows` rows of so many features a sample.

    Args:
        batch, rows, features: Of the state.
        act, mix, eps: Of the Tail; the weight of "rms" is drawn.
        parts: How many.
        gains: Whether each part but the first has a gain; none where it is empty.
        solver: A name of SOLVERS.
        dtype: Of the state.
        cell: dtype of the parts but the first; that of the state if None.
        options: Of `both`.
    """
    width = rows * features
    a, c = 0.4 * torch.rand(width) + 0.1, torch.randn(batch, width)
    others = [torch.randn(batch, width).to(cell or dtype) for _ in range(parts - 1)]
    vectors = [torch.rand(features) + 0.5 for _ in range(parts)]

    def made(dtype):
        def f(z):
            flat = c.to(dtype) + a.to(dtype) * torch.sin(z)
            return (flat, *(other if cell else other.to(dtype) for other in others))

        return f

    def tail(dtype):
        scaled = tuple(v.to(dtype) if gain else None for v, gain in zip(vectors, gains, strict=False))
        weight = vectors[-1].to(dtype) if act == "rms" else None
        return _Rows(features, act, scaled, weight, eps, mix)

    return both(SOLVERS[solver], made, torch.zeros(batch, width, dtype=dtype), tail, **{"max_steps": 6} | options)


class _Rows(Tail):
    """A Tail that the loop in torch can call with parts [B, N], of rows of so many features."""

    def __init__(self, row, *arguments):
        super().__init__(*arguments)
        object.__setattr__(self, "row", row)

    def __call__(self, z, *parts):
        y = super().__call__(*(x.reshape(len(z), -1, self.row) for x in (z, *parts)))
        return y.reshape(z.shape)


@case(**{name: {"act": name} for name in formulas.ACTIVATIONS})
def tail_activation(act):
    return tailed(2, 1, 100, act=act, slack=FAST_GELU if act == "fast_gelu" else 0.0)


@case(
    smoke="rms_rows",
    two={"parts": 2},
    three={"parts": 3},
    gain={"parts": 2, "gains": (True,)},
    second_gain={"parts": 3, "gains": (False, True)},
    first_gain={"parts": 3, "gains": (True, False)},
    mix={"mix": 0.5, "act": "tanh"},
    rms={"act": "rms", "rows": 1, "features": 100},
    rms_rows={"act": "rms", "choice": {"num_warps": 2}, "rows": 9},
    rms_of_one={"act": "rms", "features": 1, "rows": 60, "eps": 1.0},
    rms_of_zeros={"act": "rms", "features": 5, "rows": 7, "eps": 0.0},
    all={"parts": 3, "gains": (True, True), "act": "rms", "mix": 0.5},
    bf16={"parts": 3, "gains": (True, True), "cell": torch.bfloat16},
    fp16={"parts": 2, "cell": torch.float16, "act": "silu"},
    float64={"parts": 3, "gains": (True, True), "act": "rms", "mix": 0.5, "dtype": torch.float64},
    float64_bf16={"parts": 2, "gains": (True,), "dtype": torch.float64, "cell": torch.bfloat16},
)
def tail_options(rows=3, features=30, **options):
    return tailed(2, rows, features, **options)


@case(**{name: {"solver": name} for name in ("picard", "anderson1", "anderson3", "half", "broyden3")})
def tail_everything(solver):
    return tailed(2, 7, 30, parts=3, gains=(True, True), act="rms", mix=0.7, solver=solver, choice={"num_warps": 2})


@case(**{name: {"solver": name} for name in ("picard", "anderson3", "anderson8", "broyden3")})
def tail_split(solver):
    """Programs have whole rows, and the last one fewer."""
    options = {"choice": {"BLOCK_N": 128}, "cell": torch.bfloat16, "solver": solver}
    return tailed(2, 11, 30, parts=2, gains=(True,), act="rms", mix=0.7, **options)


@case(**{name: {"solver": name} for name in ("picard", "anderson3", "broyden3")})
def tail_shipped(solver):
    return tailed(1, 2, 768, parts=2, act="rms", solver=solver, cell=torch.bfloat16, max_steps=4)
