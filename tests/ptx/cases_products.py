"""Cases of steps/affine.py: steps of the affine cell with their product, in every tile."""

from contextlib import nullcontext

import torch

from tritondeq import Picard
from tritondeq.kernels import devices, dispatch, launch
from tritondeq.loop import Settings, drive

from .cases import case, contraction, in_terms, solved

SMALL = {"TILE": (16, 32, 32, 2)}
SPLIT = {"TILE": (64, 64, 64, 2)}


def products(
    batch,
    features,
    *,
    adjoint=False,
    start=False,
    norm=0.6,
    terms=2,
    choice=None,
    change=None,
    late=1,
    slack=0.0,
    **options,
):
    """Solves the affine cell by steps; arguments are those of cases_rows.affine."""
    op, rows = dispatch.load("steps.affine"), dispatch.load("rows.affine")
    w, u, z0 = contraction(features, norm, terms), torch.randn(batch, features), 0.5 * torch.randn(batch, features)
    if change:
        change(w, u)
        z0 *= u.norm(dim=1, keepdim=True).clamp(max=1.0)
    options = {"activation": "tanh", "tol": 1e-6, "max_steps": 8} | options
    reference = rows.adjoint_ref if adjoint else rows.solve_ref
    inputs = (w, z0, u) if adjoint else (w, u, z0 if start else torch.zeros(batch, features))
    with launch.override("steps.affine", choice) if choice else nullcontext():
        steps = (op.adjoint if adjoint else op.solve)(*inputs, terms=terms, **options)
        outcome = drive(steps, Settings(Picard(), options["tol"], options["max_steps"], trace=True))
    got, evaluations = (outcome.value, outcome.steps, outcome.residual, outcome.status), len(outcome.trace)
    judged = solved(got, reference, inputs, options, rounds=1, late=late, slack=slack)
    if evaluations != outcome.steps.max():
        judged.wrong.append(f"{evaluations} evaluations, of which a row took {outcome.steps.max()} at most")
    return judged


def uneven(w, u):
    """Makes rows that take many numbers of steps, among them one of zeros."""
    u *= 10.0 ** torch.linspace(-2, 1, len(u))[torch.randperm(len(u)), None]
    u[1] = 0.0


def poisoned(w, u):
    """Makes rows of NaN and of values whose squares are infinite."""
    uneven(w, u)
    u[3] = float("nan")
    u[7] = 1e30


@case(
    smoke="start",
    plain={},
    start={"start": True},
    adjoint={"adjoint": True},
    one_term={"terms": 1},
    three_terms={"terms": 3, "start": True},
    three_adjoint={"terms": 3, "adjoint": True},
    batch_of_one={"batch": 1, "start": True},
    one_feature={"batch": 1, "features": 1},
    loose={"tol": 1e-3},
    damped={"damping": 1.2},
    linear={"relative": 0.0, "scale": 1.0, "tol": 1e-4},
)
def products_small(batch=18, features=40, **options):
    return products(batch, features, choice=SMALL, **{"max_steps": 9} | options)


@case(plain={}, start={"start": True}, adjoint={"adjoint": True})
def products_split(**options):
    """An epilogue of two parts, and two column tiles of which the last is not full."""
    return products(66, 96, choice=SPLIT, max_steps=4, tol=1e-4, **options)


@case(wide={"GROUP": 8}, narrow={"GROUP": 2}, one={"GROUP": 1})
def products_group(GROUP):
    """Three row tiles by three column tiles, in groups of which the last is not full."""
    return products(40, 72, choice=SMALL | {"GROUP": GROUP}, change=uneven, tol=1e-4, max_steps=8)


@case(plain={}, adjoint={"adjoint": True}, start={"start": True})
def products_failing(**options):
    return products(40, 40, choice=SMALL, change=poisoned, tol=1e-4, max_steps=14, **options)


def fading(w, u):
    """Makes residuals fall, by 0.3 a step, until a direction that grows by 1.2 takes over: sooner from row to row."""
    grows = torch.nn.functional.normalize(torch.randn(len(w)), dim=0)
    w.copy_(in_terms(0.3 * torch.eye(len(w)) - 1.5 * torch.outer(grows, grows), 2))
    u -= torch.outer(u @ grows, grows)
    u += torch.outer(10.0 ** torch.linspace(-1.0, 1.0, len(u)), grows)


@case(solve={}, adjoint={"adjoint": True})
def products_fading(**options):
    """A row whose best iterate was saved keeps it while others save theirs; the last rows and columns are not full."""
    grown = 2.0**-8 * 1.2**8  # of what the first increment loses in rounding
    return products(18, 40, choice=SMALL, activation="identity", change=fading, max_steps=8, slack=grown, **options)


@case(plain={}, sin={"activation": "sin"})
def products_growing(activation="identity"):
    return products(20, 40, norm=2.0, choice=SMALL, activation=activation, change=uneven, max_steps=5)


@case(
    gelu={}, sin_slope={"activation": "sin", "adjoint": True}, tanh_slope={"activation": "fast_tanh", "adjoint": True}
)
def products_activation(activation="gelu", **options):
    return products(5, 24, choice=SMALL, activation=activation, **options)


TILES = {
    f"{'x'.join(map(str, tile))}_{terms}{'_start' if start else ''}": {"TILE": tile, "terms": terms, "start": start}
    for terms, tiles in launch.TILES.items()
    for tile in tiles
    for start in (False, True)
    if not start or tile in tiles[-2:]
}


@case(most=2, **TILES)
def products_shipped(TILE, terms, start):
    """Every tile, deep enough for all its stages; a smaller one where it does not fit."""
    shape = {"batch": 5, "features": 256, "terms": terms, "shared": devices.shared_memory(torch.device("cpu"))}
    fits = launch.affine_steps(**shape, TILE=TILE, start=start)
    TILE = TILE if fits else launch.TILES[terms][-1]
    features = TILE[2] * (TILE[3] - 1) + 8
    return products(TILE[0] - 3, features, terms=terms, start=start, choice={"TILE": TILE}, max_steps=2)
