"""The model of cycles: its table is of today's kernels, and its arithmetic is what it says."""

import pytest

from tritondeq.bench import cycles
from tritondeq.kernels import launch, offline

AFFINE = cycles.Kernel("affine", 128, 1, "fast_tanh", rows=cycles.MANY)


def test_the_table_is_of_these_kernels():
    """To the quarter that compilers differ by; the kernel with wgmma, and one without."""
    table = cycles.read()
    assert list(table) == [str(kernel) for kernel in cycles.kernels()]
    wanted = [AFFINE, cycles.Kernel("gated", 128, 1, "fast_tanh")]
    for one in cycles.count(wanted):
        latency, rate = table[str(one.kernel)]
        assert one.latency == pytest.approx(latency, rel=0.25) and one.rate == pytest.approx(rate, rel=0.25)


def seen(registers, shared, **hot):
    return {"registers": registers, "shared": shared, "hot": hot}


@pytest.mark.parametrize("registers, shared, found", [(255, 8192, 2), (128, 8192, 4), (60, 8192, 4), (60, 150000, 1)])
def test_programs_on_a_multiprocessor(registers, shared, found):
    """By registers, by shared memory, and no more than are launched."""
    assert AFFINE.config["programs"] == 4 and AFFINE.config["num_warps"] == 4
    assert cycles._count(AFFINE, seen(registers, shared, FADD=100, HGMMA=8)).programs == found


def test_times():
    """64 rows of 128 features by 4 warps: 2 MFLOP a term."""
    alone = cycles._count(AFFINE, seen(255, 150000, FADD=300, MUFU=50, HGMMA=8, LDL=1, STL=2))
    assert (alone.issue, alone.special, alone.tensor, alone.spills) == (361, 400, 512, 3)
    assert alone.latency == pytest.approx((361 + 512 + 500) / 1.75e9)
    assert alone.rate == pytest.approx(132 * 64 / alone.latency)
    shared = cycles._count(AFFINE, seen(255, 8192, FADD=300, MUFU=50, HGMMA=8))
    assert shared.rate == pytest.approx(132 * 64 / (512 * 1.25 / 1.75e9))
    by_mma = cycles._count(AFFINE, seen(255, 8192, FADD=300, HMMA=64))
    assert by_mma.tensor == 1024


def test_what_is_written_can_be_read(tmp_path, monkeypatch, capsys):
    found = {"registers": 100, "shared": 9000, "hot": {"FADD": 400, "HMMA": 100, "MUFU": 10}}
    monkeypatch.setattr(offline, "run", lambda jobs: [found] * len(jobs))
    path = tmp_path / "CYCLES.md"
    path.write_text("# Head\n\nText.\n\n| kernel | old |\n| --- | ---: |\n| gone | 1 |\n")
    cycles.main(["--write", str(path)])
    assert path.read_text().startswith("# Head\n\nText.\n\n| kernel | tile |")
    table = cycles.read(path)
    assert list(table) == [str(kernel) for kernel in cycles.kernels()]
    cycles.main([])
    assert "| affine 64, 1 term, fast_tanh, few rows |" in capsys.readouterr().out
    cycles.main(["--tiles"])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 + len(cycles.tiles()) and "| 32 rows, 4 warps |" in out[4]
    one = cycles.count([AFFINE])[0]
    assert table[str(AFFINE)] == pytest.approx((one.latency, one.rate), rel=0.01)


def test_tiles_are_those_that_are_launched():
    for kernel in cycles.kernels():
        assert kernel.config and kernel.config["BLOCK_B"] == (16 if kernel.rows == cycles.FEW else 64)
    assert launch.FEATURES == 256, "the widest that the table has"
