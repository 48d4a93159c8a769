"""Launch parameters: what fits, what a choice may depend on, and that every choice gives the right values."""

import copy
import itertools
import threading

import pytest
import torch
from torch.nn.functional import group_norm, rms_norm

from tritondeq import DEQ, Anderson, Broyden, Picard, backend, cells, fixed_point
from tritondeq.kernels import devices, dispatch, launch

CHIPS = [(80, 166912), (86, 101376), (90, 232448), (100, 232448)]
SIZES = [((d, d),) for d in (1, 16, 37, 64, 128, 256)] + [((64, 32), (32, 64)), ((128, 128),) * 3]


def shapes():
    """Yields (op, shape) of every kind of op, on every chip where its limits matter."""
    for chip, shared in CHIPS:
        for size, terms, memory, batch in itertools.product(SIZES, (1, 2, 3), (0, 4), (1, 4096, 4097)):
            shape = {"batch": batch, "shapes": size, "terms": terms, "memory": memory}
            yield "rows.affine", shape | {"chip": chip, "shared": shared}
        for features, terms, batch, start in itertools.product((257, 4096), (1, 2, 3), (1, 1 << 16), (False, True)):
            shape = {"batch": batch, "features": features, "terms": terms, "start": start}
            yield "steps.affine", shape | {"shared": shared}
    for width, itemsize in itertools.product((1, 127, 129, 4096, 1 << 20), (4, 8)):
        yield "steps.picard", {"width": width, "itemsize": itemsize}
    for tokens, features, itemsize in itertools.product((1, 37, 5000), (1, 7, 129, 2048), (4, 8)):
        yield "steps.picard", {"width": tokens * features, "itemsize": itemsize, "features": features}
    for features in (1, 3, 64, 1000, 8192):
        yield "norms.residual_rms", {"features": features}
    for pixels, width in itertools.product((1, 49, 65536), (1, 15, 8192, 8193)):
        yield "norms.group_norm", {"pixels": pixels, "width": width}


ALL = [(op, shape, launch.SHAPES[op](**shape), launch.candidates(op, **shape)) for op, shape in shapes()]
CONFIGS = [(op, shape, launch.SHAPES[op](**shape, **choice)) for op, shape, _, some in ALL for choice in some]


def test_candidates_are_distinct_and_begin_with_the_pure_function():
    for op, shape, base, choices in ALL:
        configs = [launch.SHAPES[op](**shape, **choice) for choice in choices]
        assert configs[:1] == [base] if base else not configs
        assert all(configs.count(config) == 1 and config.keys() == base.keys() for config in configs)
        assert len(configs) <= 26
    for op in {op for op, *_ in ALL}:
        assert max(len(choices) for name, _, _, choices in ALL if name == op) > 8


def test_tiles_fit():
    for op, shape, config in CONFIGS:
        sizes = [size for name, size in config.items() if name.startswith("BLOCK_") or name == "num_warps"]
        assert all(size > 0 and size & (size - 1) == 0 for size in sizes) and config["num_warps"] <= 16
        if op == "rows.affine":
            resident = 1 if config["STREAM"] else shape["terms"]
            weights = sum(launch.block(n) * launch.block(m) for n, m in shape["shapes"])
            assert 2 * resident * weights + 4 * config["BLOCK_B"] * config["BLOCK_D"] <= shape["shared"]
            assert config["BLOCK_D"] % config["BLOCK_K"] == 0 and 0 < config["REFILL"] < config["BLOCK_B"]
            assert not config["STREAM"] or (len(shape["shapes"]) == 1 and shape["terms"] > 1)
            assert config["BLOCK_B"] < 64 or config["num_warps"] >= 4, "wgmma is of 4 warps"
        elif op == "steps.affine":
            m, n, k, stages = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages"))
            assert stages * k * ((4 if shape["start"] else 2) * m + 2 * shape["terms"] * n) + m * n <= shape["shared"]
            assert config["SUB"] == max(1, m * n // (512 * config["num_warps"])) and (m <= 64 or not shape["start"])


def test_programs_cover_a_sample():
    for op, shape, config in CONFIGS:
        if "SPLITS" in config:
            size, part = ("width", "BLOCK_N") if op == "steps.picard" else ("pixels", "BLOCK_P")
            size, part = shape[size], config[part]
            if shape.get("features"):  # whole rows
                size, part = size // shape["features"], part // launch.power_of_two(shape["features"])
            assert (config["SPLITS"] - 1) * part < size <= config["SPLITS"] * part


def test_what_does_not_fit_has_no_parameters():
    for op, shape in (
        ("rows.affine", {"batch": 1, "shapes": ((512, 512),), "terms": 1, "memory": 0}),
        ("steps.picard", {"width": 8192, "itemsize": 4, "features": 8192}),
        ("norms.group_norm", {"pixels": 1, "width": launch.GROUP + 1}),
    ):
        assert launch.parameters(op, **shape) is None and launch.candidates(op, **shape) == []
        with launch.override(op, {"num_warps": 4}):
            assert launch.parameters(op, **shape) is None


def test_only_weights_that_do_not_fit_are_streamed():
    streamed = [launch.rows(batch=1, shapes=[(256, 256)], terms=terms, memory=0)["STREAM"] for terms in (1, 2, 3)]
    assert streamed == [False, True, True]
    assert not any(launch.rows(batch=1, shapes=[(128, 128)], terms=terms, memory=0)["STREAM"] for terms in (1, 2, 3))


def test_few_rows_have_small_tiles_and_many_rows_large_ones():
    shape = {"shapes": [(64, 64)], "terms": 2, "memory": 0}
    assert launch.rows(batch=launch.LARGE, **shape)["BLOCK_B"] == 16
    many = [launch.rows(batch=1 << 20, chip=chip, **shape)["BLOCK_B"] for chip in (80, 90, 100)]
    assert many == [32, 64, 32], "wgmma is of sm_90"


@pytest.mark.parametrize(("shared", "largest"), [(devices.SHARED, 128), (101376, 64), (232448, 256)])
def test_affine_steps_keep_a_gpu_busy(shared, largest):
    sizes = itertools.product((257, 1000, 4096), (1, 2, 3), (1, 64, 2048, 1 << 20), (False, True))
    for features, terms, batch, start in sizes:
        config = launch.affine_steps(batch=batch, features=features, terms=terms, start=start, shared=shared)
        m, n = config["BLOCK_M"], config["BLOCK_N"]
        assert m == 16 or -(-batch // m) * -(-features // n) >= launch.ENOUGH
    assert launch.affine_steps(batch=1 << 20, features=512, terms=2, shared=shared)["BLOCK_M"] == largest


def test_a_key_is_a_shape_whose_pure_function_is_the_same():
    for op, shape, base, _ in ALL:
        key = launch.key(op, **shape)
        limits = {name: shape[name] for name in ("chip", "shared") if name in shape}
        assert launch.key(op, **key, **limits) == key
        if "width" not in shape or shape["width"] <= launch.WIDE:
            assert launch.SHAPES[op](**key, **limits) == base


def test_a_sample_does_not_depend_on_its_batch():
    """Batches for which the pure function is the same have one key; other ops don't know the batch."""
    for (chip, shared), size, terms, memory in itertools.product(CHIPS, SIZES, (1, 2, 3), (0, 2)):
        shape = {"shapes": size, "terms": terms, "memory": memory, "shared": shared, "chip": chip}
        configs = [launch.rows(batch=batch, **shape) for batch in (1, 4096, 4097, 1 << 20)]
        keys = [launch.key("rows.affine", batch=batch, **shape)["batch"] for batch in (1, 4096, 4097, 1 << 20)]
        assert keys[0] == keys[1] and keys[2] == keys[3]
        if memory or len(size) > 1 or (configs[0] and configs[0]["STREAM"]):
            assert keys[0] == keys[2] and configs[0] == configs[2]
    others = [(op, shape) for op, shape, *_ in ALL if op not in ("rows.affine", "steps.affine")]
    assert not any("batch" in launch.key(op, **shape) for op, shape in others)


def test_a_table_leaves_the_bits_of_a_row_alone(monkeypatch):
    """The row of a batch of 1 and of 64, with a choice that is not the pure function's."""
    monkeypatch.setattr(devices, "gpu", lambda device: "Fake 9000")
    choice = {"BLOCK_B": 32, "STREAM": False, "num_warps": 2}
    entry = launch.tables.Entry("rows.affine", {}, choice, 1.1, [], "2026-01-31")
    monkeypatch.setattr(launch.tables, "nearest", lambda gpu, op, key: entry if key["batch"] == 1 else None)
    launch.reread()
    shape = {"shapes": ((16, 16),), "terms": 2, "memory": 0}
    configs = [launch.parameters("rows.affine", torch.device("cpu"), batch=batch, **shape) for batch in (1, 64, 4096)]
    launch.reread()
    assert configs[0]["BLOCK_B"] == 32 and configs[0] == configs[1] == configs[2]


def picard(**shape):
    return launch.parameters("steps.picard", **{"width": 4096, "itemsize": 4} | shape)


PURE = picard()


def test_an_override_is_a_choice_from_which_the_rest_follows():
    with launch.override("steps.picard", {"BLOCK_N": 1024, "num_warps": 2}):
        assert picard() == {"BLOCK_N": 1024, "SPLITS": 4, "num_warps": 2}
        assert launch.parameters("steps.anderson", width=4096, itemsize=4) == PURE, "another op"
        with launch.override("steps.picard", {"num_warps": 4}):
            assert picard() == PURE | {"num_warps": 4}, "the inner one holds"
        assert picard()["BLOCK_N"] == 1024
    with launch.override("steps.picard", {"num_warps": 4}, launch.key("steps.picard", width=4096, itemsize=4)):
        assert picard()["num_warps"] == 4 and picard(width=2048) == launch.steps(width=2048, itemsize=4), "one key"
    for choice in ({"BLOCK_N": 1 << 20}, {"num_warps": 1}):
        with launch.override("steps.picard", choice):
            assert picard() == PURE, "what does not fit is the pure function's"
    with launch.override("steps.picard", {"REFILL": 0, "SPLITS": 9}):
        assert picard() == PURE | {"REFILL": 0, "SPLITS": 9}, "other constants are taken as they are"


def test_an_override_ends_with_an_error_and_holds_in_other_threads():
    seen = []
    with pytest.raises(KeyError), launch.override("steps.picard", {"num_warps": 4}):
        thread = threading.Thread(target=lambda: seen.append(picard()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen[0]["num_warps"] == 4 and picard() == PURE


def test_launches_are_recorded_with_their_devices_only():
    shape = {"width": 4096, "itemsize": 4}
    with launch.recorded() as asked:
        picard()
        launch.parameters("steps.picard", torch.device("cpu"), **shape)
    launch.parameters("steps.picard", torch.device("cpu"), **shape)
    assert asked == [("steps.picard", shape)]


def solved(cell, scale=1.0):
    """Returns a call that solves a layer with this cell, and what it should give."""
    x = torch.randn(3, cell.features)
    for parameter in cell.parameters():
        parameter.data.mul_(scale)

    def value():
        with torch.no_grad(), backend("triton"):
            return DEQ(cell, tol=1e-2)(x)

    with torch.no_grad(), backend("torch"):
        return value, DEQ(copy.deepcopy(cell).double(), tol=1e-9, max_steps=500)(x.double())


def stepped(solver):
    c = torch.linspace(-1, 1, 600).reshape(2, 300)

    def value(solver=solver, tol=1e-2, name="triton"):
        with torch.no_grad(), backend(name):
            return fixed_point(lambda z: c + 0.1 * torch.tanh(z), torch.zeros_like(c), solver=solver, tol=tol).value

    return value, value(Picard(), 1e-6, "torch")


def rms():
    a, b, weight = torch.randn(5, 60), torch.randn(5, 60), torch.rand(60)
    run = dispatch.load("norms.residual_rms").run
    return lambda: run(a, b, None, weight, 1e-6)[1], rms_norm(a + b, (60,), weight, 1e-6)


def groups():
    a = torch.randn(2, 40, 4).movedim(-1, 1)  # channels_last
    weight, bias = torch.rand(2, 4)
    run = dispatch.load("norms.group_norm").run
    return lambda: run(a, None, weight, bias, 2, 1e-5, None), group_norm(a, 2, weight, bias, 1e-5)


PROBLEMS = {
    "rows.affine": lambda: solved(cells.Affine(16)),
    "rows.mlp": lambda: solved(cells.MLP(16)),
    "rows.gated": lambda: solved(cells.Gated(16)),
    "steps.affine": lambda: solved(cells.Affine(260), 0.05),  # few steps: large tiles take the interpreter long
    "steps.picard": lambda: stepped(Picard()),
    "steps.anderson": lambda: stepped(Anderson(memory=1)),
    "steps.broyden": lambda: stepped(Broyden(memory=1)),
    "norms.residual_rms": rms,
    "norms.group_norm": groups,
}


@pytest.mark.skipif(not dispatch.has_triton(), reason="needs triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; on a GPU tune checks each candidate")
@pytest.mark.parametrize("op", [op for op, pure in launch.SHAPES.items() if launch.TUNABLE[pure]])
def test_candidates_give_the_right_values(op):
    """The interpreter does the same for any number of warps, and takes long for each of many tiles."""
    value, exact = PROBLEMS[op]()
    with launch.recorded() as asked:
        value()
    keys = {str(launch.key(name, **shape)): shape for name, shape in asked if name == op}
    choices = [choice for shape in keys.values() for choice in launch.candidates(op, **shape)]
    choices = [{name: value for name, value in choice.items() if name != "num_warps"} for choice in choices]
    choices = [choice for i, choice in enumerate(choices) if choice not in choices[:i]]
    assert len(choices) > 2
    for choice in choices[1 :: len(choices) // 2]:
        with launch.override(op, choice):
            assert (value() - exact).norm() <= 0.03 * exact.norm(), choice
