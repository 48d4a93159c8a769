"""What ptxas makes of GroupNorm, on chips that are not here."""

import offline
import pytest
import triton

from tritondeq.kernels import launch

TYPES = {"part_ptr": "*fp32", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "eps": "fp32"}
TYPES |= {"stride_ab": "i64", "stride_bb": "i64", "P": "i32", "C": "i32", "G": "i32", "SPLITS": "i32"}


def jobs():
    cases = [(90, *case) for case in [(64, 2, "fp32"), (1024, 4, "fp32"), (1024, 4, "bf16"), (1 << 16, 15, "fp32")]]
    cases += [(chip, 1 << 12, 32, "fp32") for chip in (80, 90, 100)] + [(90, 1, 8192, "bf16"), (90, 9, 5, "bf16")]
    found = {}
    for chip, pixels, width, kind in cases:
        config = launch.parameters("group_norm", pixels=pixels, width=width)
        splits = config["SPLITS"]
        flags = {"D": width, "HAS_B": True, "INTERP": False} | {k: config[k] for k in ("BLOCK_P", "BLOCK_D")}
        for kernel in ("_normalise_kernel", "_measure_kernel") if splits > 1 else ("_normalise_kernel",):
            for relu in ("before", "after") if kernel == "_normalise_kernel" else ("before",):
                own = {"BLOCK_S": triton.next_power_of_2(splits) if splits > 1 else 0, "ROUND": False}
                found[f"sm{chip} {kernel} P{pixels} D{width} {kind} {relu}"] = {
                    "kernel": f"tritondeq.kernels.group_norm:{kernel}",
                    "chip": chip,
                    "types": TYPES | {f"{name}_ptr": f"*{kind}" for name in "aby"},
                    "constants": flags | {"RELU": relu} | (own if kernel == "_normalise_kernel" else {}),
                    "num_warps": config["num_warps"],
                }
    return found


JOBS = jobs()


@pytest.fixture(scope="module")
def found():
    return dict(zip(JOBS, offline.run(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_machine_code(found, name):
    """No spills, and room for 20 warps on a multiprocessor, to hide the latency of memory behind."""
    seen = found[name]
    assert "error" not in seen, seen["error"]
    assert seen["total"].get("LDL", 0) + seen["total"].get("STL", 0) == 0
    assert seen["registers"] * 20 * 32 <= 65536
    assert seen["shared"] <= 8192
