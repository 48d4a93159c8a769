"""What `bench --first` holds a GPU to is what the emulator gives, and promises what no chip does otherwise."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tritondeq.bench import first

from . import tensor
from .inexact import UP, coarse, fusable, off

ROOT = Path(__file__).parent.parent.parent
QUICK = ("rows.affine relu adjoint", "norms")


@pytest.mark.kernels
@pytest.mark.parametrize("names", [QUICK, pytest.param((), marks=pytest.mark.slow)])
def test_the_emulator_gives_what_is_expected(names):
    """All bits, and for a few problems which of them are promised, which takes three times as long."""
    if not first.same_triton(first.expected()["triton"]):
        pytest.skip("the file is of another release of Triton")
    command = [sys.executable, "-m", "tests.ptx.expected", *names, "--check" if names else "--bits"]
    done = subprocess.run([*command, "--chips", "80" if names else "90"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "sm_" in done.stdout, done.stdout + done.stderr


def test_approximations_are_made_wrong():
    ptx = "\tsqrt.approx.ftz.f32 \t%r3, %r2;\n@%p1 div.full.f32 %r4, %r3, %r1;\n\tsqrt.rn.f64 %rd1, %rd2;\n"
    lines = [line.strip() for line in off(ptx, UP).splitlines()]
    assert lines[1] == "mul.rn.f32 %r3, %r3, 0f3F800004;" and lines[3] == "@%p1 mul.rn.f32 %r4, %r4, 0f3F800004;"
    assert len(lines) == 5 and off(ptx, None) == ptx


@pytest.mark.parametrize(
    "ptx, expected",
    [
        ("mul.f32 %r1, %r2, %r3;\nadd.f32 %r4, %r1, %r5;", True),
        ("mul.ftz.f32 %r1, %r2, %r3;\nsub.f32 %r4, %r5, %r1;", True),
        ("mul.f32 %r1, %r2, %r3;\nadd.f32 %r4, %r1, 0f3F800000;", True),
        ("mul.rn.f32 %r1, %r2, %r3;\nadd.f32 %r4, %r1, %r5;", False),
        ("mul.f32 %r1, %r2, %r3;\nadd.rn.f32 %r4, %r1, %r5;", False),
        ("mul.f32 %r1, %r2, %r3;\nadd.f32 %r4, %r11, %r5;", False),
        ("mul.lo.s32 %r1, %r2, %r3;\nadd.f32 %r4, %r1, %r5;", False),
    ],
)
def test_what_may_be_fused(ptx, expected):
    assert fusable(ptx) is expected


def test_coarse_sums_are_others_unless_they_are_exact():
    draw = np.random.default_rng(0)
    left, right = (
        draw.integers(-128, 128, (2, 16, 32)).astype(float),
        draw.integers(-128, 128, (2, 32, 8)).astype(float),
    )
    added = draw.integers(-128, 128, (2, 16, 8)).astype(np.float32)
    assert np.array_equal(coarse(left, right, added, True), left @ right + added)
    left = draw.standard_normal(left.shape)
    usual, other = tensor.accumulate(left, right, added, True), coarse(left, right, added, True)
    assert not np.array_equal(usual, other) and np.allclose(usual, other, rtol=1e-5, atol=1e-3)
