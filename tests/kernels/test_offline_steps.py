"""What ptxas makes of the fused solver steps, on chips that are not here."""

import offline
import pytest
import triton

from tritondeq.kernels import launch

FLOATS = {2: "bf16", 4: "fp32", 8: "fp64"}
INTEGERS = {"keep_ptr": "*u8", "flags_ptr": "*i32", "left_ptr": "*i32", "B": "i32", "N": "i32", "limit": "i32"}
POINTERS = {
    "picard:_step_kernel": "z y prev next best numbers stats part",
    "anderson:_measure_kernel": "z y prev next best g dg dh gram gamma numbers stats part",
    "anderson:_mix_kernel": "z y next dh gamma numbers",
    "broyden:_measure_kernel": "z y prev next best g u v coef numbers stats part",
    "broyden:_mix_kernel": "z y next u v coef",
    "tl_steps:finish_kernel": "z prev best",
}
TAKES = {
    "picard:_step_kernel": ("HAS_KEEP", "SPLITS", "BLOCK_S", "BLOCK_N", "FLOOR", "TAIL", "INTERP"),
    "anderson:_measure_kernel": ("M", "HALF", "HAS_KEEP", "SPLITS", "BLOCK_S", "BLOCK_N", "FLOOR", "TAIL", "INTERP"),
    "anderson:_mix_kernel": ("M", "SPLITS", "BLOCK_N", "TAIL", "INTERP"),
    "tl_steps:finish_kernel": ("SPLITS", "BLOCK_N"),
}
TAKES |= {
    "broyden:_measure_kernel": ("M", *TAKES["picard:_step_kernel"]),
    "broyden:_mix_kernel": TAKES["anderson:_mix_kernel"],
}


SPILLS = {"sm90 broyden:_measure_kernel N1048576 fp32 cell fp32 memory5": 2}  # with Triton 3.4 and 3.5, none since


def step_jobs():
    cases = [
        (90, *case) for case in [(64, 4, 4, 5), (8192, 4, 2, 8), (1 << 20, 4, 4, 5), (4096, 8, 8, 8), (999, 8, 8, 1)]
    ]
    cases += [(chip, 8192, 4, 4, 5) for chip in (80, 100)]
    jobs = {}
    for kernel in TAKES:
        for chip, width, itemsize, cell, memory in cases:
            config = launch.parameters("picard", width=width, itemsize=itemsize)
            known = config | {"M": memory, "HALF": memory == 8, "HAS_KEEP": True, "FLOOR": 1e-2, "INTERP": False}
            known["TAIL"] = "tanh" if cell == itemsize == 4 else "identity"
            known["BLOCK_S"] = triton.next_power_of_2(config["SPLITS"])
            types = {f"{name}_ptr": f"*{FLOATS[itemsize]}" for name in POINTERS[kernel].split()}
            if known["HALF"]:
                types |= {"dg_ptr": "*bf16"}
            types |= INTEGERS | ({"y_ptr": f"*{FLOATS[cell]}"} if "y_ptr" in types else {})
            jobs[f"sm{chip} {kernel} N{width} {FLOATS[itemsize]} cell {FLOATS[cell]} memory{memory}"] = {
                "kernel": f"tritondeq.kernels.{kernel}",
                "chip": chip,
                "types": types,
                "constants": {name: known[name] for name in TAKES[kernel]},
                "num_warps": config["num_warps"],
            }
    return jobs


JOBS = step_jobs()


@pytest.fixture(scope="module")
def found():
    return dict(zip(JOBS, offline.run(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_machine_code(found, name):
    """No spills, and room for a second program on a multiprocessor, to hide the latency of memory behind."""
    seen, job = found[name], JOBS[name]
    assert "error" not in seen, seen["error"]
    assert seen["total"].get("LDL", 0) + seen["total"].get("STL", 0) <= SPILLS.get(name, 0)
    if job["types"]["z_ptr"] == "*fp32":
        assert seen["registers"] * job["num_warps"] * 32 <= 65536 // 2
    assert seen["shared"] <= 4096
