"""Cases of rows/affine.py, which takes the paths of every whole solve: tiles, streams, new rows, what stops a row."""

from contextlib import nullcontext

import torch

from tritondeq.kernels import devices, dispatch, launch
from tritondeq.kernels.formulas import ACTIVATIONS

from .cases import case, contraction, solved

FAST_GELU = 1e-3  # by which this formula for GELU is off
LAG = 0.03  # of the tolerance: what a term of W that lags behind may move an iterate by, as skeleton.py has it
# Launch parameters by their pure function, for these features, terms and memory: each gives another kernel.
SHIPPED = {
    f"{features}x{terms}{'_anderson' if memory else ''}{'_large' if large else ''}": dict(
        features=features, terms=terms, memory=memory, large=large
    )
    for features in (16, 64, 128, 256)
    for terms in (1, 2, 3)
    for memory, large in ((0, False), (4, False), (0, True))
    if terms == 2 or (features >= 128 and not memory)
}


def affine(
    batch, features, *, adjoint=False, start=False, norm=0.6, terms=2, choice=None, change=None, late=1, **options
):
    """Solves the affine cell; see `solved` for how it is judged.

    Args:
        batch, features: B and D.
        adjoint: Whether the adjoint is solved, and not the cell.
        start: Whether a start is given.
        norm: Of W.
        terms: Of W.
        choice: Launch parameters that replace those of the pure function.
        change: What is done to (W, u) before the solve.
        late: As of `solved`.
        options: Of the solve.
    """
    op = dispatch.load("rows.affine")
    w, u, z0 = contraction(features, norm, terms), torch.randn(batch, features), 0.5 * torch.randn(batch, features)
    if change:
        change(w, u)
        z0 *= u.norm(dim=1, keepdim=True).clamp(max=1.0)
    options = {"activation": "tanh", "tol": 1e-6, "max_steps": 12} | options
    run, reference = (op.adjoint, op.adjoint_ref) if adjoint else (op.solve, op.solve_ref)
    inputs = (w, z0, u) if adjoint else (w, u, *([z0] if start else []))
    with launch.override("rows.affine", choice) if choice else nullcontext():
        got = run(*inputs, terms=terms, **options)
    slack = FAST_GELU if options["activation"] == "fast_gelu" and not adjoint else 0.0
    if choice and choice.get("STREAM"):
        slack += LAG * options["tol"]
    return solved(got, reference, inputs, options, rounds=1, late=late, slack=slack)


def uneven(w, u):
    """Makes rows that take many numbers of steps."""
    u *= 10.0 ** torch.linspace(-3, 1, len(u))[torch.randperm(len(u)), None]


def poisoned(w, u):
    """Makes rows of NaN and of values whose squares are infinite."""
    uneven(w, u)
    u[3] = float("nan")
    u[7] = 1e30
    u[len(u) - 2, 0] = float("inf")


@case(one={"features": 16}, two={"features": 16, "w": 2}, four={}, eight={"w": 8}, more={"features": 100})
def affine_warps(features=40, w=None):
    return affine(20, features, choice={"num_warps": w} if w else None)


@case(**{name: {"activation": name} for name in ACTIVATIONS})
def affine_activation(activation):
    return affine(5, 24, activation=activation)


@case(**{name: {"activation": name} for name in ACTIVATIONS})
def affine_slope(activation):
    return affine(5, 24, activation=activation, adjoint=True)


@case(one={}, zero={"change": lambda w, u: u.zero_()}, start={"start": True}, features={"features": 1})
def affine_batch_of_one(features=24, **options):
    return affine(1, features, **options)


@case(one={"terms": 1}, two={}, three={"terms": 3}, loose={"tol": 1e-3, "max_steps": 40})
def affine_start(**options):
    return affine(20, 40, start=True, **options)


@case(m1={"memory": 1}, m2={"memory": 2, "damping": 0.7}, m3={"memory": 3, "adjoint": True}, m4={"memory": 4})
def affine_anderson(**options):
    return affine(5, 32, **options)


@case(damped={"damping": 0.7, "max_steps": 20}, linear={"relative": 0.0, "scale": 1.0}, scale={"scale": 4.0})
def affine_rules(**options):
    return affine(5, 24, tol=1e-4, **options)


@case(
    smoke="stream",
    plain={},
    anderson={"memory": 2},
    adjoint={"adjoint": True},
    stream={"features": 64, "choice": {"STREAM": True}},
    start={"start": True},
    failing={"change": poisoned},
)
def affine_new_rows(features=24, choice=None, **options):
    """Lanes of one program take new rows when half of a tile has stopped, or a quarter."""
    choice = {"programs": 1, "REFILL": 4} | (choice or {})
    return affine(40, features, choice=choice, **{"change": uneven, "tol": 1e-5, "max_steps": 60} | options)


@case(
    two={},
    three={"terms": 3, "start": True},
    anderson={"memory": 3, "terms": 3},
    adjoint={"adjoint": True},
    loose={"tol": 1e-3},
    wide={"features": 128, "batch": 3},
    failing={"change": poisoned},
)
def affine_stream(features=64, batch=20, **options):
    options = {"tol": 1e-6, "max_steps": 60} | options
    return affine(batch, features, choice={"STREAM": True}, late=2, **options)


@case(plain={}, anderson={"memory": 3}, adjoint={"adjoint": True})
def affine_failing(**options):
    return affine(20, 24, change=poisoned, **options)


@case(plain={}, anderson={"memory": 2}, sin={"activation": "sin"})
def affine_growing(activation="identity", **options):
    """Rows that end GROWING or at MAX_STEPS are solved a second time, up to their best."""
    return affine(20, 24, norm=2.0, change=uneven, activation=activation, max_steps=5, **options)


@case
def affine_plateau():
    """A small part of the state turns its sign for ever, at a residual that stands still."""

    def turning(w, u):
        w.zero_()
        w[0, 0] = -1.0
        u[:, 0] = 2.0**-6

    outcome = affine(5, 24, change=turning, activation="identity", tol=1e-6, max_steps=60)
    if outcome.bits[3].unique().tolist() != [1]:
        outcome.wrong.append("not a plateau")
    return outcome


@case(most=2, **SHIPPED)
def affine_shipped(features, terms, memory, large):
    """The launch parameters of the pure function; those for large batches on a smaller one, by the same kernel."""
    device = torch.device("cpu")
    problem = {"batch": launch.LARGE + 1 if large else 1, "shapes": ((features, features),), "terms": terms}
    limits = {"shared": devices.shared_memory(device), "chip": devices.chip(device)}
    config = launch.parameters("rows.affine", **problem, memory=memory, **limits)
    choice = {name: config[name] for name in ("BLOCK_B", "STREAM", "num_warps", "REFILL")}
    batch = config["BLOCK_B"] + 5 if large else 5
    steps = 40 if config["STREAM"] else 8
    return affine(
        batch, features, terms=terms, memory=memory, choice=choice, late=1 + config["STREAM"], max_steps=steps
    )
