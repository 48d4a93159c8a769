"""Every kind of launch that a user can ask for compiles: every value of an option beside every value of any other.

A covering array has all pairs of values in a fraction of all combinations. The axes are those of the launchers'
signatures; the launch goes through Triton's binder and specialisation, and an argument that is 1 becomes a constant.
"""

import inspect
import random
from itertools import combinations, product

import compiled
import pytest
from compiled import compile_launches
from uneven import uneven_sums

from tritondeq.kernels.formulas import ACTIVATIONS
from tritondeq.kernels.rows.mlp import ACTS

CHIPS, BOTH = (80, 90, 100), (False, True)
MANY = 1 << 20
CHOICES = tuple(range(27))  # of tune: more than any shape has
TAILS = [
    {}, {"act": "tanh"}, {"act": "gelu", "mix": 0.5}, {"gains": (1,)}, {"gains": (None, 7)}, {"gains": (32, 32)},
    {"act": "rms", "weight": 1}, {"act": "rms", "weight": 7, "gains": (7,)}, {"act": "rms", "weight": 32, "mix": 0.5},
    {"act": "rms", "weight": 100},
]  # fmt: skip
AXES = {
    "affine_rows": {
        "features": (1, 16, 33, 64, 128, 256), "terms": (1, 2, 3), "memory": (0, 1, 2, 4), "adjoint": BOTH,
        "warm": BOTH, "batch": (1, 20, MANY), "activation": tuple(ACTIVATIONS),
    },
    "mlp_rows": {
        "features": (1, 16, 64), "hidden": (1, 32, 128), "form": ("post", "pre"), "gate": BOTH, "adjoint": BOTH,
        "terms": (1, 2, 3), "memory": (0, 1, 4), "warm": BOTH, "batch": (1, 20), "activation": ACTS,
    },
    "gated_rows": {
        "features": (1, 16, 64), "terms": (1, 2, 3), "memory": (0, 1, 4), "adjoint": BOTH, "warm": BOTH,
        "batch": (1, 20), "activation": ("tanh", "fast_tanh"),
    },
    "affine_steps": {
        "features": (257, 300, 512), "batch": (1, 16, 2048, 1 << 16), "terms": (1, 2, 3), "adjoint": BOTH,
        "start": BOTH, "activation": tuple(ACTIVATIONS),
    },
    "fused_steps": {
        "solver": ("picard", *product(("anderson", "half", "broyden"), (1, 2, 5, 8))), "width": (1, 32, 700, 44800),
        "dtype": ("float32", "float64"), "cell": ("float32", "bfloat16", "float16", "float64"), "tail": TAILS,
        "parts": (1, 2, 3), "batch": (1, 2), "masked": BOTH,
    },
    "residual_rms": {
        "features": (1, 7, 32, 1024, 8192), "a": ("float32", "bfloat16"), "b": ("float32", "bfloat16"),
        "batch": (1, 64), "gamma": BOTH, "weight": BOTH, "keep_sum": BOTH,
    },
    "unit": {"features": (1, 32, 8192), "batch": (1, 64), "masked": BOTH},
    "residual": {"features": (1, 32, 8192), "batch": (1, 64), "masked": BOTH, "based": BOTH},
    "group_norm": {
        "pixels": (1, 49, 1 << 16), "width": (1, 4, 15, 8192), "dtype": ("float32", "bfloat16", "float16"),
        "relu": ("before", "after", None), "batch": (1, 2), "groups": (1, 2), "sum": BOTH,
    },
}  # fmt: skip


# Beside every value of any other axis: one of each kind that is compiled in its own way.
_ACTIVATIONS = {"activation": ("tanh", "fast_tanh", "gelu", "sin", "identity")}
PAIRED = {
    "affine_rows": _ACTIVATIONS,
    "affine_steps": _ACTIVATIONS,
    "fused_steps": {
        "solver": ("picard", ("anderson", 8), ("half", 2), ("broyden", 2), ("broyden", 8)),
        "tail": TAILS[::2],
    },
}


def test_the_axes_are_all_options_that_change_what_is_compiled():
    free = {
        "damping",
        "ridge",
        "max_steps",
        "tol",
        "op",
        "options",
    }  # numbers of a launch, and what `solver` is made of
    for call, axes in AXES.items():
        known = set(inspect.signature(getattr(compiled, call)).parameters)
        assert known - free <= axes.keys(), call


def each_value(axes):
    """Returns choices of a value of each axis that have every value of every axis, as dicts."""
    draw, most = random.Random(0), max(map(len, axes.values()))
    order = {name: draw.sample(list(values), len(values)) for name, values in axes.items()}
    return [{name: values[i % len(values)] for name, values in order.items()} for i in range(most)]


def covering(axes, seed=0):
    """Returns choices of a value of each axis that have every pair of values of two axes, as dicts."""
    draw = random.Random(seed)
    names = list(axes)
    left = {(a, i, b, j) for a, b in combinations(names, 2) for i in range(len(axes[a])) for j in range(len(axes[b]))}
    rows = []
    while left:
        a, i, b, j = min(left)
        best = max((_filled(axes, {a: i, b: j}, draw) for _ in range(30)), key=lambda row: len(left & _pairs(row)))
        left -= _pairs(best)
        rows.append({name: axes[name][best[name]] for name in names})
    return rows


def _filled(axes, fixed, draw):
    return {name: fixed.get(name, draw.randrange(len(values))) for name, values in axes.items()}


def _pairs(row):
    return {(a, row[a], b, row[b]) for a, b in combinations(row, 2)}


def calls(call, chosen, fewer=None):
    """Returns calls of compiled.py by name, for the choices that `chosen` makes of the axes, or of `fewer` values."""
    made = {}
    for i, row in enumerate(chosen(AXES[call] | {"chip": CHIPS} | (fewer or {}))):
        chip, options = row.pop("chip"), row | {"choice": CHOICES[i % len(CHOICES)]}
        made[f"{call} {i}"] = (chip, call, _steps(options) if call == "fused_steps" else options)
    return made


def _steps(options):
    """Returns the options of `fused_steps` for a solver, and for as many gains as the parts take."""
    solver, parts = options.pop("solver"), options["parts"]
    name, memory = (solver, 0) if solver == "picard" else solver
    more = {"picard": {"damping": 0.5}, "broyden": {"memory": memory}}.get(
        name, {"memory": memory, "damping": 0.5, "ridge": 0.0, "half": name == "half"}
    )
    tail = options["tail"] | {"gains": (*options["tail"].get("gains", ()), None, None)[: parts - 1]}
    return options | more | {"op": f"steps.{'anderson' if name == 'half' else name}", "tail": tail}


def test_a_covering_array_has_every_pair():
    axes = {"a": (1, 2, 3), "b": "xyz", "c": BOTH, "d": range(5)}
    rows = covering(axes)
    for one, other in combinations(axes, 2):
        assert {(row[one], row[other]) for row in rows} == set(product(axes[one], axes[other]))
    assert len(rows) <= 20
    assert all({row[name] for row in each_value(axes)} == set(values) for name, values in axes.items())


def check(calls):
    launched = compile_launches(calls, until="ptx")
    kernels = [(name, kernel.name, kernel.uneven) for name, some in launched.items() for kernel in some]
    assert len(kernels) >= len(launched) / 2, "most of these problems are refused"
    assert not [kernel for kernel in kernels if kernel[2]]


@pytest.mark.slow
def test_each_value_of_an_option_compiles():
    """In a minute, for every Triton that is supported."""
    check({name: one for call in AXES for name, one in calls(call, each_value).items()})


@pytest.mark.slow
@pytest.mark.parametrize("call", AXES)
def test_every_variant_compiles_and_its_sums_have_the_same_bits_in_every_lane(call):
    check(calls(call, covering, PAIRED.get(call)))


def test_an_uneven_sum_is_found():
    product = "mul.f32 %r5, %r1, %r2; shfl.sync.bfly.b32 %r6, %r5, 16, 31, -1;"
    assert uneven_sums(f"{product} fma.rn.f32 %r7, %r2, %r1, %r6;")
    assert uneven_sums(f"{product} add.f32 %r7, %r5, %r6;"), "ptxas may fuse the two"
    assert not uneven_sums(f"{product} add.rn.f32 %r7, %r5, %r6;")
    assert not uneven_sums(f"{product} fma.rn.f32 %r7, %r2, %r3, %r6;"), "another product"
    rounded = product.replace("mul.f32 %r5, %r1, %r2", "fma.rn.f32 %r5, %r1, %r2, 0f00000000")
    assert not uneven_sums(f"{rounded} add.f32 %r7, %r5, %r6;")
    double = """
        mul.f64 %rd8, %rd1, %rd1;
        mov.b64 {%r4, %r3}, %rd8;
        shfl.sync.bfly.b32 %r5, %r4, 16, 31, -1;
        shfl.sync.bfly.b32 %r6, %r3, 16, 31, -1;
        cvt.u64.u32 %rd9, %r5;
        cvt.u64.u32 %rd10, %r6;
        shl.b64 %rd11, %rd10, 32;
        or.b64 %rd12, %rd9, %rd11;
        fma.rn.f64 %rd13, %rd1, %rd1, %rd12;
    """
    assert len(uneven_sums(double)) == 1
