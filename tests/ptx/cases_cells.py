"""Cases of rows/mlp.py and rows/gated.py."""

from contextlib import nullcontext

import torch

from tritondeq.kernels import devices, dispatch, formulas, launch

from .cases import Outcome, case, contraction, double, in_terms, solved

FORMS = {
    f"{form}{'_gate' if gate else ''}{'_adjoint' if adjoint else ''}": dict(form=form, gate=gate, adjoint=adjoint)
    for form in ("post", "pre")
    for gate in (False, True)
    for adjoint in (False, True)
}
FAST = {"fast_gelu": 1e-3, "fast_silu": 0.0}  # by which a formula is off, whose tanh is exact here


def _solve(op, name, fixed, start, adjoint, choice, options, terms, late, slack=0.0) -> Outcome:
    """Solves from `start`, () or (z0,); of an adjoint there is none."""
    run, reference = (op.adjoint, op.adjoint_ref) if adjoint else (op.solve, op.solve_ref)
    with launch.override(name, choice) if choice else nullcontext():
        got = run(*fixed, *start, terms=terms, **options)

    def again(z):
        return reference(*double(fixed), z, **options | {"max_steps": 1})[2]

    again = again if options.get("memory") and not adjoint else None
    return solved(got, reference, (*fixed, *start), options, rounds=1, late=late, slack=slack, again=again)


def mlp(
    batch=5, features=20, hidden=40, *, form="post", gate=False, adjoint=False, start=False, terms=2, choice=None,
    change=None, late=1, **options,
):  # fmt: skip
    """Solves the MLP cell, or its adjoint at some point; arguments are those of cases_rows.affine."""
    op = dispatch.load("rows.mlp")
    sizes = [(hidden, features), (features, hidden), *([(hidden, features)] if gate else [])]
    weights = [in_terms(0.3 * torch.randn(n, m) / m**0.5, terms) for n, m in sizes]
    biases = [0.3 * torch.randn(len(w)) for w in weights]
    scale = (0.6 + 0.3 * torch.rand(features)) * (1.0 if form == "post" else 0.5)
    u, z = torch.randn(batch, features), torch.randn(batch, features)
    options = {"form": form, "activation": "silu", "tol": 1e-6, "max_steps": 25} | options
    if change:
        change(u)
    if adjoint:
        pre = formulas.mlp_inner(form, weights, biases, u, z)
        at = formulas.mlp_outer(form, options["activation"], weights, biases, u, z, pre) if form == "post" else z
        saved = at, *formulas.hidden_slopes(options["activation"], pre)
        fixed = weights, scale, saved, torch.randn(batch, features)
    else:
        fixed = weights, biases, scale, u
    start = (0.5 * z,) if start and not adjoint else ()
    slack = FAST.get(options["activation"], 0.0)
    return _solve(op, "rows.mlp", fixed, start, adjoint, choice, options, terms, late, slack)


def gated(batch=5, features=20, *, adjoint=False, start=False, terms=2, choice=None, change=None, late=1, **options):
    """Solves the gated cell, or its adjoint at some point; arguments are those of cases_rows.affine."""
    op = dispatch.load("rows.gated")
    weights = [contraction(features, 0.8, terms) for _ in range(3)]
    inputs = tuple(torch.randn(batch, features) for _ in range(3))
    z = 0.5 * torch.randn(batch, features)
    if change:
        change(inputs[1])
    if adjoint:
        fixed = weights, formulas.gru_slopes(z, *formulas.gru(weights, inputs, z)), torch.randn(batch, features)
    else:
        fixed = weights, inputs
    options = {"tol": 1e-6, "max_steps": 25} | options
    start = (z,) if start and not adjoint else ()
    return _solve(op, "rows.gated", fixed, start, adjoint, choice, options, terms, late)


def poisoned(u):
    """Makes rows of NaN, of values whose squares are infinite, and rows that take many numbers of steps."""
    u *= 10.0 ** torch.linspace(-2, 1, len(u))[torch.randperm(len(u)), None]
    u[3] = float("nan")
    u[7, 0] = 1e30


@case(smoke="pre_gate_adjoint", **FORMS)
def mlp_form(**options):
    return mlp(**options)


@case(**{name: {"activation": name} for name in ("relu", "gelu", "fast_gelu", "fast_silu")})
def mlp_activation(activation):
    return mlp(activation=activation)


@case(
    anderson={"memory": 2},
    anderson_adjoint={"memory": 4, "adjoint": True, "form": "pre"},
    start={"start": True},
    start_pre={"start": True, "form": "pre", "gate": True},
    batch_of_one={"batch": 1},
    narrow={"batch": 1, "features": 1, "hidden": 1, "late": 2},
    one_term={"terms": 1, "gate": True},
    three_terms={"terms": 3, "form": "pre"},
    loose={"tol": 1e-3, "gate": True},
    two_warps={"choice": {"num_warps": 2}},
    one_row={"choice": {"programs": 1}, "batch": 17},
)
def mlp_options(**options):
    return mlp(**options)


@case(post={}, pre={"form": "pre", "gate": True}, anderson={"memory": 3, "tol": 1e-6, "late": 2})
def mlp_new_rows(**options):
    choice = {"programs": 1, "REFILL": 4}
    return mlp(batch=40, change=poisoned, choice=choice, **{"tol": 1e-5, "max_steps": 40} | options)


@case(smoke="adjoint", solve={}, adjoint={"adjoint": True}, fast={"activation": "fast_tanh"})
def gated_way(**options):
    return gated(**options)


@case(
    anderson={"memory": 2},
    anderson_adjoint={"memory": 3, "adjoint": True},
    start={"start": True},
    batch_of_one={"batch": 1},
    narrow={"batch": 1, "features": 1},
    one_term={"terms": 1},
    three_terms={"terms": 3, "adjoint": True},
    loose={"tol": 1e-3},
    two_warps={"choice": {"num_warps": 2}},
)
def gated_options(**options):
    return gated(**options)


@case(plain={}, anderson={"memory": 2})
def gated_new_rows(**options):
    choice = {"programs": 1, "REFILL": 4}
    return gated(batch=40, change=poisoned, choice=choice, **{"tol": 1e-5, "max_steps": 40} | options)


def _ships(op, shapes, terms, memory=0) -> None:
    device = torch.device("cpu")
    limits = {"shared": devices.shared_memory(device), "chip": devices.chip(device)}
    assert launch.parameters(op, batch=5, shapes=tuple(map(tuple, shapes)), terms=terms, memory=memory, **limits), (
        "it does not fit"
    )


@case(
    most=2,
    w64={"features": 64, "hidden": 128},
    w64_gate={"features": 64, "hidden": 64, "gate": True, "form": "pre", "adjoint": True},
    w128={"features": 128, "hidden": 128, "terms": 1},
    w128_anderson={"features": 128, "hidden": 128, "terms": 1, "memory": 4},
)
def mlp_shipped(features, hidden, terms=2, memory=0, **options):
    _ships("rows.mlp", [(hidden, features), (features, hidden)] + [(hidden, features)] * options.get("gate", 0), terms)
    return mlp(5, features, hidden, terms=terms, memory=memory, max_steps=15, **options)


@case(
    most=2,
    w64={"features": 64},
    w64_adjoint={"features": 64, "adjoint": True, "memory": 2},
    w128={"features": 128, "terms": 1},
)
def gated_shipped(features, terms=2, **options):
    _ships("rows.gated", [(features, features)] * 3, terms)
    return gated(5, features, terms=terms, max_steps=15, **options)
