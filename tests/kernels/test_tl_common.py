import pytest
import torch
import triton
import triton.language as tl

from tritondeq.kernels import tl_common as tc
from tritondeq.kernels.dispatch import interpreting
from tritondeq.kernels.formulas import ACTIVATIONS, FAST, SLOPES
from tritondeq.kernels.reference import anderson_weights
from tritondeq.kernels.rules import SAFEGUARD
from tritondeq.kernels.tl_anderson import anderson_step, cholesky_solve

SIZE = 1 << 16
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


@triton.jit
def _apply(x_ptr, y_ptr, ACT: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr, INTERP: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tc.act_slope(x, ACT, INTERP) if SLOPE else tc.act(x, ACT, INTERP))


@triton.jit
def _round(x_ptr, y_ptr, BLOCK: tl.constexpr, INTERP: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rounded, near = tc.bf16_pair(tl.load(x_ptr + offs), INTERP)
    tl.store(y_ptr + offs, near)


@triton.jit
def _solve(a_ptr, b_ptr, x_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    a = ()
    b = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i + 1):
            a = a + (tl.load(a_ptr + rows * N * N + i * N + j),)
        b = b + (tl.load(b_ptr + rows * N + i),)
    x = cholesky_solve(a, b, N)
    for i in tl.static_range(N):
        tl.store(x_ptr + rows * N + i, x[i])


@triton.jit
def _mix(g_ptr, dx_ptr, dg_ptr, rel_ptr, step_ptr, damping, ridge, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A step with two differences [2, ROWS, COLS], the newest last; the best residual of each row is 1."""
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * COLS + tl.arange(0, COLS)[None, :]
    g = tl.load(g_ptr + offs)
    dx = (tl.load(dx_ptr + offs), tl.load(dx_ptr + ROWS * COLS + offs))
    dg = (tl.load(dg_ptr + offs), tl.load(dg_ptr + ROWS * COLS + offs))
    rel = tl.load(rel_ptr + rows)
    gram = (tl.sum(dg[0] * dg[0], 1),)
    sums = (rel, rel)
    for j in tl.static_range(2):
        sums = sums + (tl.sum(dg[j] * g, 1),)
    for j in tl.static_range(2):
        sums = sums + (tl.sum(dg[j] * dg[1], 1),)
    step, dx, dg, gram = anderson_step(g, dx, dg, gram, sums, rel, rel * 0 + 1, damping, ridge, 2)
    tl.store(step_ptr + offs, step)


@triton.jit
def _sum(x_ptr, y_ptr, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INTERP: tl.constexpr):
    rows = tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * COLS + tl.arange(0, COLS)[None, :])
    tiles = ()
    for i in tl.static_range(N):
        tiles = tiles + (x * (i + 1),)
    sums = tc.row_sums(tiles, N, INTERP)
    for i in tl.static_range(N):
        tl.store(y_ptr + i * ROWS + rows, sums[i])


def apply(x, activation, slope=False):
    y = torch.empty_like(x)
    _apply[(x.numel() // SIZE,)](x, y, ACT=activation, SLOPE=slope, BLOCK=SIZE, INTERP=interpreting())
    return y


def relative(x, exact):
    return ((x.double() - exact).abs() / exact.abs().clamp(min=1e-30)).max()


@pytest.mark.parametrize("name, most", [("tanh", 12.0), ("sin", 300.0), ("sin", 1e4), ("gelu", 8.0), ("silu", 12.0)])
def test_values_and_slopes(device, name, most):
    x = torch.linspace(-most, most, SIZE, device=device)
    torch.testing.assert_close(apply(x, name).double(), ACTIVATIONS[name](x.double()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apply(x, name, True).double(), SLOPES[name](x.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, bound, most", [("tanh", 2e-6, 1), ("fast_tanh", 2**-10.9, 1), ("sin", 2e-6, 0)])
def test_relative_accuracy_of_small_values(device, name, bound, most):
    small = torch.logspace(-20, most, SIZE // 2, device=device)
    x = torch.cat([small, -small])
    assert relative(apply(x, name), ACTIVATIONS[name](x.double())) < bound
    if name != "sin":
        assert (apply(torch.full((SIZE,), 1e4, device=device), name) == 1).all()


@pytest.mark.parametrize("exact, fast", FAST.items())
def test_what_is_made_of_fast_tanh(device, exact, fast):
    """Off by 5e-4 of |x| or 5e-4; the slope is that of the exact one."""
    x = torch.linspace(-12, 12, SIZE, device=device)
    off = (apply(x, fast).double() - ACTIVATIONS[exact](x.double())).abs()
    assert (off <= 5e-4 * (1 + x.abs())).all()
    assert torch.equal(apply(x, fast, True), apply(x, exact, True))


@pytest.mark.parametrize("name", ["relu", "identity", "abs"])
def test_piecewise_linear(device, name):
    x = torch.linspace(-2, 2, SIZE, device=device)
    assert torch.equal(apply(x, name), ACTIVATIONS[name](x))
    assert torch.equal(apply(x, name, True), SLOPES[name](x))


@nonfinite
@pytest.mark.parametrize("activation", [*FAST, *FAST.values(), "relu", "sin", "identity"])
def test_zero_is_kept_and_nan_is_not_lost(device, activation):
    x = torch.zeros(SIZE, device=device)
    assert (apply(x, activation) == 0).all()
    assert apply(x + torch.nan, activation).isnan().all()


@nonfinite
def test_rounding_is_to_nearest_even(device):
    bits = torch.randint(-(2**31), 2**31 - 1, (SIZE - 4,), dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F800000, 0x7F7FFFFF], dtype=torch.int32)
    x = torch.cat([bits, ties]).view(torch.float32)
    x = torch.where((x.abs() < 1e-37) | x.isnan(), 0.0, x).to(device)  # subnormals may be flushed
    y = torch.empty_like(x)
    _round[(1,)](x, y, BLOCK=SIZE, INTERP=interpreting())
    assert torch.equal(y, x.bfloat16().float())


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_cholesky(device, n):
    a = torch.randn(32, n, n + 2, device=device)
    a = a @ a.mT + 0.1 * torch.eye(n, device=device)
    b = torch.randn(32, n, device=device)
    x = torch.empty_like(b)
    _solve[(1,)](a, b, x, N=n, BLOCK=32)
    exact = torch.linalg.solve(a.double(), b.double()[..., None])[..., 0]
    assert ((x - exact).norm(dim=1) <= 1e-4 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("n", [2, 4, 6, 8, 10])
def test_row_sums(device, n):
    x = torch.randn(16, 64, device=device)
    y = torch.empty(n, 16, device=device)
    _sum[(1,)](x, y, N=n, ROWS=16, COLS=64, INTERP=interpreting())
    exact = x.double().sum(1) * torch.arange(1, n + 1, device=device)[:, None]
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_anderson_step(device, ridge):
    """Row 0 was thrown off and takes a plain step; row 1 not quite."""
    g, dx, dg = torch.randn(16, 16, device=device), *torch.randn(2, 2, 16, 16, device=device)
    rel = torch.ones(16, device=device)
    rel[0], rel[1] = 1.01 * SAFEGUARD, 0.99 * SAFEGUARD
    step = torch.empty_like(g)
    _mix[(1,)](g, dx, dg, rel, step, 0.7, ridge, ROWS=16, COLS=16)
    pairs = [d.double().permute(1, 2, 0) for d in (dx, dg)]
    gamma = anderson_weights(pairs[1], g.double(), ridge)
    exact = 0.7 * g.double() - ((pairs[0] + 0.7 * pairs[1]) @ gamma[..., None])[..., 0]
    torch.testing.assert_close(step[1:].double(), exact[1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(step[0], 0.7 * g[0])
