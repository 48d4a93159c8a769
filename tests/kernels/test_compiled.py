"""What the compiler makes of every kernel at the launches that the library takes, for GPUs that are not here.

The bounds hold on all Tritons from 3.4 to 3.9, whose compilers differ in how they use registers.
"""

from itertools import product

import pytest
from compiled import SHARED, compile_launches, local

from tritondeq.kernels import launch
from tritondeq.kernels.dispatch import triton_version
from tritondeq.kernels.norms.residual_rms import MOST

REGISTERS = 65536  # of a multiprocessor
BOTH = (False, True)
MANY = 1 << 20  # rows that fill any GPU


def cases(call, chips=(90,), **axes):
    """Returns calls of compiled.py by name: one for each chip and each choice of the options' values."""
    made = {}
    for chip, *values in product(chips, *axes.values()):
        options = dict(zip(axes, values, strict=True))
        name = " ".join(f"{key}={value}" for key, value in options.items())
        made[f"sm{chip} {call} {name}"] = (chip, call, options)
    return made


def affine_rows():
    """Sizes that one launch takes: on Triton 3.4 the op refuses to read W's terms from memory."""

    def of(features, terms, batch, adjoint, chips=(90,), memory=(0,), activation=("tanh",)):
        axes = {"features": features, "terms": terms, "batch": batch, "adjoint": adjoint}
        return cases("affine_rows", chips, **axes, memory=memory, activation=activation)

    made = of((64, 128, 256), (1, 2), (1, MANY), BOTH) | of((32,), (2,), (1,), BOTH)
    made |= of((128, 256), (3,), (1,), (True,)) | of((64, 128), (2,), (1,), (True,), memory=(4,))
    made |= of((256,), (1, 2), (1,), (True,), memory=(2, 4))
    made |= of((128,), (1,), (MANY,), (False,), activation=("gelu", "sin"))
    made |= of((64, 128, 256), (1,), (MANY,), (False,), activation=("fast_tanh",))
    made |= of((64, 128, 256), (2,), (1, MANY), (False,), chips=(80, 100))
    made |= of((256,), (2,), (1,), (True,), chips=(80, 100), memory=(0, 4))
    if triton_version() < (3, 5):
        made = {name: case for name, case in made.items() if case[2]["features"] < 256 or case[2]["terms"] == 1}
    return made


def cell_rows():
    """The MLP and the gated cell, at the sizes that fill a multiprocessor and at smaller ones."""
    made = {}
    for (features, hidden, terms), gates in (((64, 128, 2), BOTH), ((128, 256, 1), (False,)), ((32, 64, 2), (True,))):
        size = {"features": (features,), "hidden": (hidden,), "terms": (terms,)}
        made |= cases("mlp_rows", **size, form=("post", "pre"), gate=gates, adjoint=BOTH)
    size = {"features": (64,), "hidden": (128,), "terms": (2,)}
    made |= cases("mlp_rows", (80, 100), **size, form=("post", "pre"), gate=(True,), adjoint=(False,))
    for features, terms, activation in ((64, 2, "tanh"), (128, 1, "fast_tanh")):
        options = {"features": (features,), "terms": (terms,), "activation": (activation,), "adjoint": BOTH}
        made |= cases("gated_rows", **options, memory=(0, 2))
        made |= cases("gated_rows", (80, 100), **options)
    return made


ROWS = {"large": 1 << 16, "wide": 3200, "middle": 2048, "small": 16}  # by the tile that they take


def affine_steps():
    def of(rows, terms, adjoint=(False,), chips=(90,), features=(512,), activation=("tanh",), start=(False,)):
        axes = {"batch": [ROWS[size] for size in rows], "terms": terms, "adjoint": adjoint, "features": features}
        return cases("affine_steps", chips, **axes, activation=activation, start=start)

    others = (80, 100)
    made = of(ROWS, (1, 2, 3)) | of(ROWS, (2,), (True,)) | of(("large", "middle", "small"), (2,), chips=others)
    made |= of(("large",), (2,), (True,), others) | of(("large",), (1, 3), chips=others)
    made |= of(("middle", "small"), (1, 2, 3), start=(True,)) | of(("middle",), (2,), chips=others, start=(True,))
    made |= of(("middle",), (2,), (True,), start=(True,)) | of(("large",), (2,), activation=("gelu", "sin"))
    return made | of(("large",), (2,), features=(4096, 300))


RMS = {"act": "rms", "eps": 1e-6}
GAINS = {"gains": (512, 512)}


def fused_steps():
    """Every solver: samples that one program holds and wider ones, memories from 1 to the most, and tails."""
    tanh, plain = {"act": "tanh"}, {}
    states = [(64, "float32", "float32", 5, tanh), (8192, "float32", "bfloat16", 8, plain)]
    states += [(MANY, "float32", "float32", 5, tanh), (4096, "float64", "float64", 8, plain)]
    states += [(999, "float64", "float64", 1, plain), (2048, "float32", "bfloat16", 8, plain)]
    states = [(90, *state, 1) for state in [*states, (2048, "float32", "float32", 1, tanh)]]
    states += [(chip, 8192, "float32", "float32", 5, tanh, 1) for chip in (80, 100)]
    states += [(90, MANY, "float32", "float32", 5, plain, 2), (90, MANY, "float32", "float32", 5, GAINS, 3)]
    for features in (16, 768, 4096):
        states.append((90, 1024 * features, "float32", "bfloat16", 5, RMS | {"weight": features}, 2))
    states.append((90, 1 << 20, "float64", "float64", 5, RMS | {"weight": 1024}, 2))
    states.append((90, 1536, "float32", "bfloat16", 5, RMS | {"weight": 768}, 2))
    mixed = RMS | {"weight": 1024, "gains": (1024, 1024), "mix": 0.5}
    states += [(chip, width, "float32", "float32", 5, mixed, 3) for chip in (80, 90, 100) for width in (2048, MANY)]
    made = {}
    for op, (chip, width, dtype, cell, memory, tail, parts) in product(("picard", "anderson", "broyden"), states):
        options = {"op": f"steps.{op}", "width": width, "dtype": dtype, "cell": cell, "tail": tail, "parts": parts}
        options |= {} if op == "picard" else {"memory": memory}
        options |= {"picard": {"damping": 0.5}, "anderson": {"damping": 0.5, "ridge": 0.0, "half": memory == 8}}.get(
            op, {}
        )
        made |= cases("fused_steps", (chip,), **{name: (value,) for name, value in options.items()})
    most = {"width": 64, "dtype": "float32", "cell": "float32", "tail": {}, "memory": 10}
    return made | cases("fused_steps", (80, 90, 100), op=("steps.broyden",), **{n: (v,) for n, v in most.items()})


def norms():
    made = cases("residual_rms", features=(1, 100, 1024, MOST), a=("float32",), b=("float32",))
    made |= cases("residual_rms", (80, 90, 100), features=(64, MOST), a=("float32",), b=("bfloat16",))
    made |= cases("residual_rms", features=(MOST,), a=("bfloat16",), b=("bfloat16",))
    made |= cases("unit", features=(64, MOST), masked=BOTH)
    made |= cases("residual", (80, 90, 100), features=(64, MOST), masked=(True,), based=BOTH)
    made |= cases("group_norm", pixels=(1024,), width=(4,), dtype=("float32", "bfloat16"), relu=("before", "after"))
    made |= cases("group_norm", pixels=(1 << 16,), width=(15,), dtype=("float32",), relu=("after",))
    made |= cases("group_norm", (80, 90, 100), pixels=(1 << 12,), width=(32,), dtype=("float32",), relu=("before",))
    return made | cases("group_norm", pixels=(1,), width=(8192,), dtype=("bfloat16",), relu=("after",))


CASES = affine_rows() | cell_rows() | affine_steps() | fused_steps() | norms()
# Each kernel once, in the half minute that every run of the tests has for it.
QUICK = [
    "sm90 affine_rows features=64 terms=2 batch=1 adjoint=False memory=0 activation=tanh",
    "sm90 mlp_rows features=64 hidden=128 terms=2 form=post gate=False adjoint=False",
    "sm90 gated_rows features=64 terms=2 activation=tanh adjoint=False memory=0",
    "sm90 affine_steps batch=16 terms=2 adjoint=False features=512 activation=tanh start=False",
    *(name for name in CASES if name.startswith("sm90 fused_steps") and "width=1048576" in name and "'tanh'" in name),
    "sm90 residual_rms features=1024 a=float32 b=float32",
    "sm90 unit features=8192 masked=True",
    "sm90 residual features=8192 masked=True based=False",
    "sm90 group_norm pixels=65536 width=15 dtype=float32 relu=after",
    "sm90 group_norm pixels=1 width=8192 dtype=bfloat16 relu=after",
]


@pytest.fixture(scope="module")
def compiled(request):
    """What each call launched, of the calls whose tests run."""
    params = [getattr(item, "callspec", None) and item.callspec.params for item in request.session.items]
    wanted = {one["name"] for one in params if one and one.get("name") in CASES}
    return compile_launches({name: CASES[name] for name in CASES if name in wanted})


def test_each_kernel_is_compiled_once_in_every_run():
    assert {CASES[name][1] for name in QUICK} == {call for _, call, _ in CASES.values()}
    assert {CASES[name][2].get("op") for name in QUICK} >= {"steps.picard", "steps.anderson", "steps.broyden"}


def each(*calls, chips=(80, 90, 100)):
    """Parametrizes a test by the names of these calls' cases; all but the quick ones are slow."""
    names = [name for name, (chip, call, _) in CASES.items() if call in calls and chip in chips]
    marked = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marked, ids=names)


@each("affine_rows", "mlp_rows", "gated_rows")
def test_rows(compiled, name):
    """Weights stay in shared memory and rows in registers, but for a few where nothing else can give way."""
    (*terms, kernel), (chip, _, options) = compiled[name], CASES[name]
    assert bool(terms) != kernel.constants["SPLIT"] and all(local(launched.total) == 0 for launched in terms)
    assert kernel.shared <= SHARED[chip]
    assert kernel.hot is not None, "no loop with both tensor-core and special-function instructions"
    share = 0.0
    if options["features"] >= 128 and kernel.constants["BLOCK_B"] == 64:
        share = 0.1  # by wgmma they take less time a row than 32 rows by mma all the same
    elif options["features"] == 256:  # 16 rows are the least that a tile can have, and Anderson's history has no room
        share = 0.2 if options["memory"] == 4 else 0.01
    assert local(kernel.hot) <= share * sum(kernel.hot.values())
    if not kernel.constants["STREAM"]:
        assert not {"LDG", "LDGSTS", "UTMALDG"} & set(kernel.hot), "W is loaded again in the hot loop"


@pytest.mark.slow
@pytest.mark.parametrize("features", [64, 128, 256])
def test_the_hardwares_tanh_is_one_instruction(features):
    """Of each element; the other takes eight more, with two special functions in them."""
    case = {"features": features, "terms": 1, "batch": MANY}
    calls = {name: (90, "affine_rows", case | {"activation": name}) for name in ("fast_tanh", "tanh")}
    fast, exact = (kernels[-1] for kernels in compile_launches(calls).values())
    elements = 64 * features // (32 * exact.warps)
    assert exact.hot["MUFU"] - fast.hot["MUFU"] == elements
    assert sum(exact.hot.values()) - sum(fast.hot.values()) >= 8 * elements


@each("affine_steps")
def test_affine_steps(compiled, name):
    """The loop over the depth spills nothing and loads ahead; the epilogue spills next to nothing."""
    (*_, kernel), (chip, _, options) = compiled[name], CASES[name]
    assert kernel.shared <= SHARED[chip]
    if options["start"] and options["adjoint"]:
        assert kernel.gemm is None  # v starts at zero
        return
    assert kernel.gemm is not None and local(kernel.gemm) == 0
    assert local(kernel.total) <= 0.01 * sum(kernel.total.values())
    assert kernel.gemm.get("LDGSTS", 0), "tiles are not on their way while others are multiplied"


def test_every_tile_of_affine_steps_is_compiled():
    tiles = set()
    for chip, call, options in CASES.values():
        if call == "affine_steps":
            shape = {name: options[name] for name in ("batch", "features", "terms", "start")}
            config = launch.parameters("steps.affine", **shape, shared=SHARED[chip])
            tiles.add((options["terms"], config["BLOCK_M"]))
    assert tiles == {(terms, tile[0]) for terms, shipped in launch.TILES.items() for tile in shipped}


@each("fused_steps")
def test_fused_steps(compiled, name):
    """Next to no spills, and room for a second program or for 16 warps, to hide the latency of memory behind."""
    begin, *steps, end = compiled[name]
    assert (begin.name, end.name) == ("begin_kernel", "finish_kernel") and 1 <= len(steps) <= 2
    itemsize = 8 if CASES[name][2]["dtype"] == "float64" else 4
    for kernel in steps:
        assert local(kernel.total) <= 0.01 * sum(kernel.total.values())
        if itemsize == 4:
            assert kernel.registers * kernel.warps * 32 <= REGISTERS // (1 if kernel.warps == 16 else 2)
        tile = kernel.constants["BLOCK_N"] * itemsize
        assert kernel.shared <= max(4096, tile), "more than a tile on its way from one layout to another"


@each("affine_steps", "fused_steps", chips=(90,))
def test_the_last_program_to_arrive_sees_what_the_others_stored(compiled, name):
    """All threads have stored before one of them counts the program, and wait for that before they go on."""
    kernel = next(one for one in compiled[name] if one.name == "_step_kernel")
    if kernel.constants.get("SPLITS", 2) == 1:
        return
    order = kernel.order
    # what all threads wait for; the others count samples that go on
    arrivals = [i for i, op in enumerate(order) if op.startswith("atom") and "bar.sync" in order[i + 1 : i + 2]]
    assert arrivals
    for arrival in arrivals:
        assert "gpu.acq_rel" in order[arrival]
        stores = [i for i in range(arrival) if order[i].startswith("st.global")]
        assert "bar.sync" in order[stores[-1] if stores else 0 : arrival]


@each("residual_rms")
def test_residual_rms(compiled, name):
    """No spills, room for a second program on a multiprocessor, and 16 bytes a load where features allow it."""
    (kernel,) = compiled[name]
    assert local(kernel.total) == 0
    assert kernel.registers * kernel.warps * 32 <= REGISTERS // 2
    assert kernel.shared <= 16384  # through which a bf16 b comes into the layout of an fp32 a
    if CASES[name][2]["features"] % 16 == 0:
        assert kernel.total["LDG"] <= 4 * 16 * 4 // 16 and kernel.total["STG"] <= 2 * 16 * 4 // 16


@each("unit", "residual")
def test_ends(compiled, name):
    """No spills, and room for a second program on a multiprocessor."""
    (kernel,) = compiled[name]
    assert local(kernel.total) == 0
    assert kernel.registers * kernel.warps * 32 <= REGISTERS // 2


@each("group_norm")
def test_group_norm(compiled, name):
    """No spills, and room for 20 warps on a multiprocessor, to hide the latency of memory behind."""
    for kernel in compiled[name]:
        assert local(kernel.total) == 0
        assert kernel.registers * 20 * 32 <= REGISTERS
        assert kernel.shared <= 16384
