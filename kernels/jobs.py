"""The launches of every op as offline.py compiles them: kernel, types and constants, as the launchers pass them."""

import importlib
from typing import Any, NamedTuple

from . import launch, space, tails

FLOATS = {2: "bf16", 4: "fp32", 8: "fp64"}
ROWS = {name: "*fp32" for name in ("z0_ptr", "z_ptr", "residual_ptr")} | {"d_ptr": "*bf16"}
ROWS |= {"steps_ptr": "*i32", "status_ptr": "*i32", "B": "i32", "max_steps": "i32"}
ROWS |= {name: "fp32" for name in ("tol", "damping", "ridge")}
AFFINE = {f"{name}_ptr": "*fp32" for name in ("kept", "other", "pre", "best", "stats", "part")}
AFFINE |= {"d_ptr": "*bf16", "w_ptr": "*bf16", "moved_ptr": "*i1", "flags_ptr": "*i32", "left_ptr": "*i32"}
AFFINE |= {"B": "i32", "limit": "i32", "depth": "i32", "damping": "fp32"}
GRID = {f"{name}_ptr": "*fp32" for name in ("w", "u", "start", "part", "z")} | {"d_ptr": "*bf16"}
GRID |= {f"{name}_ptr": "*i32" for name in ("turn", "status", "steps", "residual")}
GRID |= {"B": "i32", "tol": "fp32", "max_steps": "i32", "damping": "fp32", "stride_wn": "i32", "stride_wk": "i32"}
STEPS = {"keep_ptr": "*u8", "flags_ptr": "*i32", "left_ptr": "*i32", "B": "i32", "N": "i32", "limit": "i32"}
STEPS |= {"D": "i32", "eps": "fp32", "mix": "fp32"}
POINTERS = {
    "picard:_step_kernel": "z prev next best numbers stats part",
    "anderson:_measure_kernel": "z next best g dg dh gram gamma numbers stats part",
    "anderson:_mix_kernel": "z next best dh gamma numbers",
    "broyden:_measure_kernel": "z next best u v coef numbers stats part",
    "broyden:_mix_kernel": "z next best u v coef",
    "tl_steps:finish_kernel": "z prev best",
}


class Tail(NamedTuple):
    """What a launch knows of a tails.Tail: how many parts, rows of how many features, 0 where they don't matter."""

    act: str = "identity"
    parts: int = 1
    scaled: tuple[bool, ...] = (False,) * tails.PARTS
    mixed: bool = False
    features: int = 0


PLAIN = Tail()
MEASURES = ("HAS_KEEP", "SPLITS", "BLOCK_S", "BLOCK_N", "FLOOR", "TAIL", "INTERP")
MIXES = ("M", "SPLITS", "BLOCK_N", "TAIL", "INTERP")
TAKES = {
    "picard:_step_kernel": MEASURES,
    "anderson:_measure_kernel": ("M", "HALF", "ONE_LAUNCH", *MEASURES),
    "anderson:_mix_kernel": MIXES,
    "broyden:_measure_kernel": ("M", "ONE_LAUNCH", *MEASURES),
    "broyden:_mix_kernel": ("HAS_KEEP", *MIXES),
    "tl_steps:finish_kernel": ("SPLITS", "BLOCK_N"),
}
GROUP_NORM = {"part_ptr": "*fp32", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "eps": "fp32"}
GROUP_NORM |= {"stride_ab": "i64", "stride_bb": "i64", "P": "i32", "C": "i32", "G": "i32", "SPLITS": "i32"}


def rows(
    op: str, chip: int, config: dict, *, shapes, terms: int, memory: int, act: str, adj: bool, form: str | None = None
) -> dict[str, Any]:
    """A whole solve, or its adjoint, as `Rows.solve` launches it."""
    cell = getattr(importlib.import_module(f"{__package__}.{op}"), "ADJOINT" if adj else "SOLVE")
    cell = cell[form] if form else cell
    features = shapes[0][1]
    vectors, inputs = _operands(op, shapes, adj, form)
    constants = cell.constants(features, shapes, vectors, [(width, width) for width in inputs])
    constants |= {"ACT": act, "HAS_Z0": not adj, "TERMS": terms, "MEMORY": memory, "INTERP": False}
    constants |= {name: f"{__package__}.{op}:{constants[name].__name__}" for name in ("START", "STEP")}
    lists = {"w_ptrs": ["*bf16"] * len(shapes), "v_ptrs": ["*fp32"] * max(1, len(vectors))}
    types = ROWS | lists | {"x_ptrs": ["*fp32"] * len(inputs)}
    return _job("rows:rows_kernel", chip, types, constants, {k: v for k, v in config.items() if k != "programs"})


def _operands(op: str, shapes, adj: bool, form: str | None) -> tuple[list[int], list[int]]:
    """Widths of the vectors and of the inputs of a cell."""
    d, h = shapes[0][1], shapes[0][0]
    if op == "mlp":
        into = [h] * (len(shapes) - 1)
        if adj:
            return [d], [d, d, *into]
        return ([d], [d, *into]) if form == "post" else ([d, *into], [d])
    if op == "gated":
        return [], [d] * (6 if adj else 3)
    return [], [d] * (1 + adj)


def affine_steps(
    chip: int, config: dict, *, features: int, terms: int, act: str, adj: bool, start: bool = False
) -> dict[str, Any]:
    """A step with its GEMM."""
    splits = -(-features // config["BLOCK_N"])
    constants = {"D": features, "WIDTH": -(-features // 256) * 256, "ACT": act, "ADJ": adj, "START": start}
    constants |= {"TERMS": terms, "BLOCK_S": space.power_of_two(splits), "INTERP": False}
    return _job("affine_steps:_step_kernel", chip, AFFINE, constants, config)


def affine_grid(chip: int, config: dict, *, features: int, terms: int, act: str, adj: bool) -> dict[str, Any]:
    """A whole solve spread over the chip, or its adjoint, of a W whose rows lie one after the other."""
    splits = -(-features // config["BLOCK_N"])
    polls = importlib.import_module(f"{__package__}.affine_grid").POLLS
    constants = {
        "D": features,
        "ACT": act,
        "ADJ": adj,
        "TERMS": terms,
        "SPLITS": splits,
        "BLOCK_S": space.power_of_two(splits),
    }
    constants |= {"POLLS": polls, "INTERP": False, "stride_wn" if adj else "stride_wk": 1}
    job = _job("affine_grid:grid_kernel", chip, GRID, constants, config)
    return job | {"launch_cooperative_grid": True}


def steps(
    kernel: str, chip: int, config: dict, *, width: int, itemsize: int, cell: int, memory: int, half: bool, tail=PLAIN
) -> dict[str, Any]:
    """A launch of fused solver steps, a key of POINTERS; `cell` is the size of what the cell gives, `tail` a Tail."""
    known = config | {"M": memory, "HALF": half, "HAS_KEEP": True, "FLOOR": 1e-2, "INTERP": False}
    op = kernel.partition(":")[0]
    known["ONE_LAUNCH"] = launch.one_launch(op, config, itemsize=itemsize, memory=memory)
    row = space.power_of_two(tail.features) if tail.features else 0
    known["TAIL"] = tail.act, tail.scaled, tail.mixed, row
    known["BLOCK_S"] = space.power_of_two(config["SPLITS"])
    types = {f"{name}_ptr": f"*{FLOATS[itemsize]}" for name in POINTERS[kernel].split()}
    types |= ({"dg_ptr": "*bf16"} if half else {}) | STEPS
    types |= {"y_ptrs": [f"*{FLOATS[cell]}"] * tail.parts, "v_ptrs": [f"*{FLOATS[itemsize]}"] * tail.parts}
    constants = {name: known[name] for name in TAKES[kernel]}
    job = _job(kernel, chip, types, constants, {"num_warps": config["num_warps"]})
    sizes = {"N": width, "D": tail.features}
    return job | {"multiples": [name for name in sizes if name in types and sizes[name] and sizes[name] % 16 == 0]}


def launched(kernel: str, config: dict, itemsize: int, memory: int) -> bool:
    """Whether a step launches this key of POINTERS."""
    op, _, name = kernel.partition(":")
    return name != "_mix_kernel" or not launch.one_launch(op, config, itemsize=itemsize, memory=memory)


def residual_rms(chip: int, config: dict, *, features: int, a: int, b: int) -> dict[str, Any]:
    """A sum and its norm; `a` and `b` are itemsizes."""
    types = {f"{name}_ptr": f"*{FLOATS[a]}" for name in ("a", "gamma", "weight", "s", "n")}
    types |= {"b_ptr": f"*{FLOATS[b]}", "R": "i32", "D": "i32", "eps": "fp32"}
    constants = dict.fromkeys(("HAS_GAMMA", "HAS_WEIGHT", "KEEP_SUM"), True) | {"INTERP": False}
    job = _job("residual_rms:_rms_kernel", chip, types, constants, config)
    return job | {"multiples": [] if features % 16 else ["D"]}


def group_norm(kernel: str, chip: int, config: dict, *, width: int, itemsize: int, relu: str) -> dict[str, Any]:
    """One of the launches of GroupNorm, "_measure_kernel" or "_normalise_kernel"."""
    splits = config["SPLITS"]
    constants = {"D": width, "HAS_B": True, "RELU": relu, "INTERP": False}
    if kernel == "_normalise_kernel":
        constants |= {"BLOCK_S": space.power_of_two(splits) if splits > 1 else 0, "ROUND": False}
    types = GROUP_NORM | {f"{name}_ptr": f"*{FLOATS[itemsize]}" for name in "aby"}
    return _job(f"group_norm:{kernel}", chip, types, constants, {k: v for k, v in config.items() if k != "SPLITS"})


def _job(kernel: str, chip: int, types: dict, constants: dict, config: dict) -> dict[str, Any]:
    options = {name: value for name, value in config.items() if name in ("num_warps", "num_stages")}
    constants = constants | {name: value for name, value in config.items() if name not in options}
    return {"kernel": f"{__package__}.{kernel}", "chip": chip, "types": types, "constants": constants, **options}


def of_candidate(op: str, chip: int, config: dict, dtype: str, shape: dict, form: str = "post") -> list[dict[str, Any]]:
    """All launches of an op at one of `launch.candidates`, at what people run most; `form` of the MLP cell."""
    itemsize = {"fp32": 4, "bf16": 2, "fp64": 8}[dtype]
    if op in ("affine_steps", "affine_grid"):
        of = {"features": shape["features"], "terms": shape["terms"], "act": "tanh"}
        if op == "affine_grid":
            return [affine_grid(chip, config, **of, adj=adj) for adj in (False, True)]
        of |= {"start": shape.get("start", False)}
        return [affine_steps(chip, config, **of, adj=adj) for adj in (False, True)]
    if launch.SHAPES[op] is launch.rows:
        of = {"shapes": shape["shapes"], "terms": shape["terms"], "memory": shape["memory"]}
        gate = "silu" if len(shape["shapes"]) == 3 else "gelu"
        of |= {"affine": {"act": "tanh"}, "mlp": {"act": gate, "form": form}, "gated": {"act": "tanh"}}[op]
        return [rows(op, chip, config, **of, adj=adj) for adj in (False, True)]
    if launch.SHAPES[op] is launch.steps:
        state = shape["itemsize"]
        memory = {"anderson": 5, "broyden": 10}.get(op, 0)
        of = {"width": shape["width"], "itemsize": state, "cell": min(state, itemsize), "memory": memory}
        features = shape.get("features", 0)
        of |= {"tail": Tail("rms", parts=2, features=features)} if features else {}
        kernels = [kernel for kernel in POINTERS if kernel.startswith((f"{op}:", "tl_steps:"))]
        kernels = [kernel for kernel in kernels if launched(kernel, config, state, memory)]
        return [steps(kernel, chip, config, **of, half=False) for kernel in kernels]
    if op == "residual_rms":
        return [residual_rms(chip, config, features=shape["features"], a=itemsize, b=itemsize)]
    kernels = ["_normalise_kernel"] + (["_measure_kernel"] if config["SPLITS"] > 1 else [])
    of = {"width": shape["width"], "itemsize": itemsize, "relu": "after"}
    return [group_norm(kernel, chip, config, **of) for kernel in kernels]
