"""What ptxas makes of GroupNorm, on chips that are not here."""

import pytest

from tritondeq.kernels import jobs as launches
from tritondeq.kernels import launch, offline


def jobs():
    cases = [(90, *case) for case in [(64, 2, "fp32"), (1024, 4, "fp32"), (1024, 4, "bf16"), (1 << 16, 15, "fp32")]]
    cases += [(chip, 1 << 12, 32, "fp32") for chip in (80, 90, 100)] + [(90, 1, 8192, "bf16"), (90, 9, 5, "bf16")]
    found = {}
    for chip, pixels, width, kind in cases:
        config = launch.parameters("norms.group_norm", pixels=pixels, width=width)
        for kernel in ("_normalise_kernel", "_measure_kernel") if config["SPLITS"] > 1 else ("_normalise_kernel",):
            for relu in ("before", "after") if kernel == "_normalise_kernel" else ("before",):
                of = {"width": width, "itemsize": 2 if kind == "bf16" else 4, "relu": relu}
                name = f"sm{chip} {kernel} P{pixels} D{width} {kind} {relu}"
                found[name] = launches.group_norm(kernel, chip, config, **of)
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
