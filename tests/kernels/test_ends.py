"""The two ops at the ends of a gradient: right-hand sides scaled to norm 1, and residuals compared at the solution."""

import close
import pytest
import torch

import tritondeq as tdeq
from tritondeq import DEQ, cells, fixed_point, guards
from tritondeq.bench.measure import AtenOps
from tritondeq.kernels import dispatch, launch, rules
from tritondeq.kernels.norms import residual, unit

SHAPES = [(1, 1), (1, 7), (3, 128), (129, 8), (5, 129), (2, 1025), (1, unit.MOST)]
INF, NAN = float("inf"), float("nan")


def masks(batch, width, device):
    return None, torch.rand(batch, width, device=device) > 0.3


@pytest.mark.parametrize("batch, width", SHAPES)
def test_samples_have_norm_1(batch, width, device):
    """One sample, a prime, a tile and a tile plus one, the widest; sizes from the least normal one to the largest."""
    sizes = 10.0 ** torch.linspace(-37, 37, batch, device=device)[:, None]
    for mask in masks(batch, width, device):
        g = torch.randn(batch, width, device=device).clamp_(-4, 4) * sizes
        got = unit.unit(g, mask)
        for actual, eager, true in zip(got, unit.unit_ref(g, mask), unit.unit_ref(g.double(), mask), strict=True):
            assert actual.shape == eager.shape and actual.dtype == torch.float32
            for row in range(batch):
                close.assert_as_eager(actual[row], eager[row], true[row])


def test_samples_of_zeros_stay_so_and_others_become_nan_as_a_whole(device):
    g = torch.randn(4, 33, device=device)
    g[1], g[2, 5], g[3, 7] = 0.0, NAN, INF
    made, scale = unit.unit(g)
    assert torch.allclose(made[0].norm(), torch.ones((), device=device))
    assert (made[1] == 0).all() and torch.isfinite(scale[:2]).all()
    assert made[2:].isnan().any(1).all() and not torch.isfinite(scale[2:]).any()


def test_a_sample_whose_counted_elements_are_zero_keeps_the_others(device):
    g, mask = torch.ones(2, 5, device=device), torch.ones(2, 5, dtype=torch.bool, device=device)
    g[1, :3], mask[1, 3:] = 0.0, False
    made, scale = unit.unit(g, mask)
    assert torch.equal(made[1] * scale[1], g[1]) and made[1].abs().max() == 1


@pytest.mark.parametrize("given", ["base", "start"])
@pytest.mark.parametrize("batch, width", SHAPES)
def test_far_residuals_are_those_of_the_reference(batch, width, given, device):
    """Reported residuals are on both sides of the true ones, by a tenth, and samples are of many sizes."""
    for mask in masks(batch, width, device):
        sizes = 10.0 ** torch.linspace(-12, 12, batch, device=device)[:, None]
        y = torch.randn(batch, width, device=device) * sizes
        y[: batch // 3] *= 1e-6  # so small that what they are relative to decides
        z = y + 1e-2 * torch.randn(batch, width, device=device) * sizes
        start = torch.randn(batch, width, device=device) * sizes
        base = sizes[:, 0] * 1e-2 if given == "base" else None
        true = rules.residual(y, z, base, start, mask, 1e-13)
        reported = true * torch.where(torch.arange(batch, device=device) % 2 == 0, 0.9, 1.1) / 3
        asked = (y, z, base, start, mask, reported)
        for least in (0.0, 1e-2):
            options = {"scale": 1e-13, "factor": 3.0, "least": least}
            far = residual.far(*asked, **options)
            assert far.dtype == torch.bool and torch.equal(far, residual.far_ref(*asked, **options))
            if least == 0.0 and (mask is None or width > 8):
                assert torch.equal(far, torch.arange(batch, device=device) % 2 == 0)


def test_nan_is_not_far(device):
    y, z = torch.ones(3, 5, device=device), torch.zeros(3, 5, device=device)
    y[1, 2], z[2, 3] = NAN, NAN
    far = residual.far(y, z, None, z, None, torch.zeros(3, device=device), scale=0.0, factor=1.1, least=1e-3)
    assert far.tolist() == [True, False, False]


def test_empty_batches(device):
    none = torch.empty(0, 5, device=device)
    assert [x.shape for x in unit.unit(none)] == [(0, 5), (0, 1)]
    assert residual.far(none, none, None, none, None, none[:, 0], scale=0.0, factor=1.0, least=0.0).shape == (0,)


def test_strides(device):
    wide = torch.randn(4, 60, device=device)
    g, mask = wide[:, ::2], (torch.rand(30, 4, device=device) > 0.5).mT
    for actual, same in zip(unit.unit(g, mask), unit.unit(g.contiguous(), mask.contiguous()), strict=True):
        assert torch.equal(actual, same)
    reported = torch.rand(4, 2, device=device)[:, 0]
    options = {"scale": 0.0, "factor": 1.0, "least": 1e-3}
    asked = g, wide[:, 1::2], reported, wide[:, ::2], mask
    copies = [x.contiguous() for x in asked]
    assert torch.equal(residual.far(*asked, reported, **options), residual.far(*copies, copies[2], **options))


@pytest.mark.parametrize("name, argument", [("norms.unit", "g"), ("norms.residual", "y")])
def test_what_torch_does_instead(name, argument):
    refuses = dispatch.load(name).refuses
    assert refuses(**{argument: torch.empty(2, unit.MOST)}) is None
    assert "8193 elements" in refuses(**{argument: torch.empty(2, unit.MOST + 1)})
    assert "0 elements" in refuses(**{argument: torch.empty(2, 0)})
    assert "float64" in refuses(**{argument: torch.empty(2, 3, dtype=torch.float64)})


def gradient(layer, x, factor, backend):
    layer.zero_grad()
    with tdeq.backend(backend):
        (factor * layer(x).sum()).backward()
    return torch.cat([p.grad.flatten() for p in layer.parameters()])


def test_gradients_keep_their_factor(device):
    """grad(c loss) is c grad(loss) for a c of any size, with the right-hand side scaled by the op."""
    layer, x = DEQ(cells.Affine(8), tol=1e-6).to(device), torch.randn(3, 8, device=device)
    one = gradient(layer, x, 1.0, "torch")
    for factor in (1.0, 1e-30, 1e30):
        with launch.recorded() as launched:
            scaled = gradient(layer, x, factor, "triton")
        assert torch.allclose(scaled / factor, one, rtol=1e-4, atol=1e-6)
        assert [op for op, _ in launched] == ["rows.affine", "norms.residual", "norms.unit", "rows.affine"]


@pytest.mark.parametrize("kind, name", [(cells.Affine, "weight"), (cells.MLP, "up.weight")])
def test_a_backward_solve_refuses_weights_that_were_changed_since(device, kind, name):
    """Autograd's own look at them is at products that the kernels take in its place."""
    layer, x = DEQ(kind(8)).to(device), torch.randn(3, 8, device=device)
    with tdeq.backend("triton"):
        z = layer(x)
        with torch.no_grad():
            layer.cell.get_parameter(name).mul_(0.5)
        with pytest.raises(RuntimeError, match="changed in place|modified by an inplace"):
            z.sum().backward()


def test_a_gradient_by_a_kernel_makes_no_product_with_the_state(device):
    """Of Affine: pre = W z + u for the kernel, and the gradients of W and U."""
    layer, x = DEQ(cells.Affine(8)).to(device), torch.randn(3, 8, device=device)
    with tdeq.backend("triton"):
        loss = layer(x).sum()
        with AtenOps() as seen:
            loss.backward()
    assert (seen.counts["addmm"], seen.counts["mm"]) == (1, 2)


def test_a_map_that_is_another_at_the_solution_is_found(device):
    """The third evaluation, which is that at the solution of a loose solve, adds to what the first two return."""
    calls = []

    def f(z, c):
        calls.append(1)
        return 0.1 * z + c + (len(calls) > 2) * 0.1

    c = torch.ones(2, 5, device=device, requires_grad=True)
    with tdeq.backend("triton"), launch.recorded() as launched:
        with pytest.warns(UserWarning, match="residual at the solution is above"):
            fixed_point(f, torch.zeros_like(c), args=(c,), tol=0.15)
            guards.flush(wait=True)
    assert launched[-1][0] == "norms.residual"
