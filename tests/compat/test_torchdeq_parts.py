"""Norms, dropout and losses of tritondeq.compat.torchdeq beside those of torchdeq itself."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from alike import TIGHT, agree
from torch import nn

from tritondeq.compat import torchdeq as ours


def twins(theirs, make, norm_type, **options):
    """Returns one model normed here, and the same one normed there, with what their power iteration converges to."""
    models = []
    for library in (ours, theirs):
        torch.manual_seed(0)
        model = make()
        library.apply_norm(model, norm_type, **options)
        for _ in range(50):
            library.reset_norm(model)
            model(torch.randn(1, *SHAPES[make]))  # one power iteration a call here, one a reset there
        models.append(model)
    return models


def linear():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))


def conv():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.ConvTranspose2d(3, 2, 3))


SHAPES = {linear: (5,), conv: (2, 6, 6)}
NORMS = {
    "default": {},
    "target": {"target_norm": 0.7},
    "frozen": {"learn_scale": False, "target_norm": 0.7},
    "filter_out": {"filter_out": "0"},
    "prefix_filter_out": {"prefix_filter_out": ["2"]},
    "args": {"args": argparse.Namespace(norm_no_scale=True, norm_target_norm=0.5, sn_n_power_iters=2)},
}


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("norm_type", ["weight_norm", "spectral_norm", "none"])
@pytest.mark.parametrize("make", SHAPES)
def test_normed_models_compute_and_train_alike(theirs, make, norm_type, options):
    mine, other = twins(theirs, make, norm_type, **options)
    x = torch.randn(3, *SHAPES[make])
    for step in range(2):  # after a step of gradient descent, too
        theirs.reset_norm(other)
        out = mine(x), other(x)
        torch.testing.assert_close(*out, rtol=1e-6, atol=1e-9)
        for model, y in zip((mine, other), out, strict=True):
            y.sin().sum().backward()
            torch.optim.SGD(model.parameters(), 1e-3 if step else 0.0).step()
    assert sum(p.requires_grad for p in mine.parameters()) == sum(p.requires_grad for p in other.parameters())


def test_a_checkpoint_of_weight_norm_loads(theirs):
    mine, other = twins(theirs, linear, "weight_norm")
    for p in other.parameters():
        nn.init.normal_(p)
    mine.load_state_dict(other.state_dict())
    theirs.reset_norm(other)
    x = torch.randn(2, 5)
    torch.testing.assert_close(mine(x), other(x))


@pytest.mark.parametrize("norm_type", ["weight_norm", "spectral_norm"])
def test_remove_norm_leaves_the_weights(norm_type):
    model, x = linear(), torch.randn(2, 5)
    names = {*model.state_dict()}
    ours.apply_norm(model, norm_type)
    assert {*model.state_dict()} != names
    model.eval()
    y = model(x)
    ours.remove_norm(model)
    assert {*model.state_dict()} == names and torch.allclose(model(x), y)


def test_other_modules_are_normed_where_registered():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 4))

    model = nn.ModuleList([Kernel()])
    ours.apply_norm(model, "weight_norm")
    assert not nn.utils.parametrize.is_parametrized(model[0])
    ours.register_norm_module(Kernel, "weight_norm", "kernel", 1)
    ours.apply_norm(model, "weight_norm", learn_scale=False)
    torch.testing.assert_close(model[0].kernel.norm(dim=0), torch.ones(4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip": True}, ValueError, "norm_clip and clip are not mapped"),
        ({"args": {"norm_clip": True}}, ValueError, "norm_clip and clip are not mapped"),
        ({"norm_type": "layer_norm"}, ValueError, "norm_type must be weight_norm, spectral_norm or none"),
        ({"power": 1}, TypeError, "unknown option 'power'"),
    ],
)
def test_options_of_norms_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        ours.apply_norm(linear(), **options)


def test_modules_of_torchdeq_itself_are_refused(theirs):
    model = linear()
    theirs.apply_norm(model, "weight_norm")
    with pytest.raises(TypeError, match="0 holds dropout or a norm of torchdeq itself"):
        ours.reset_deq(model)
    with pytest.raises(TypeError, match="1 holds dropout or a norm of torchdeq itself"):
        ours.reset_deq(nn.Sequential(nn.Linear(2, 2), theirs.VariationalDropout(0.5)))


DROPOUTS = {
    "VariationalDropout": (3, 4),
    **{f"Variational{kind}{n}d": (2, 5, 6, 7, 8)[: n + 2] for kind in ("Dropout", "DropToken") for n in (1, 2, 3)},
}


@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("token_first", [True, False])
def test_masks_have_the_shape_of_theirs(theirs, name, token_first):
    options = {} if name == "VariationalDropout" else {"token_first": token_first}
    x = torch.ones(*DROPOUTS[name])
    module, other = (getattr(library, name)(0.4, **options) for library in (ours, theirs))
    other(x)
    mask = module(x)
    shared = [dim for dim in range(x.ndim) if other.mask.shape[dim] == 1]
    assert all((mask == mask.narrow(dim, 0, 1)).all() for dim in shared)
    assert {round(v, 9) for v in mask.unique().tolist()} == {0.0, round(1 / 0.6, 9)}
    for dim in set(range(x.ndim)) - set(shared):
        assert any(((y := module(x)) != y.narrow(dim, 0, 1)).any() for _ in range(5))
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("options", [{"grad": 3}, {"ift": True}, {"f_solver": "simple_fixed_point_iter", "grad": 2}])
def test_a_mask_lasts_for_the_solve_and_its_gradient(options):
    drop, linear, seen = ours.VariationalDropout1d(0.5), nn.Linear(4, 4), []

    def cell(z):  # which the function of the layer reaches by its closure
        kept = drop(torch.ones_like(z))
        seen.append(kept)
        return torch.tanh(0.3 * linear(z) * kept + 1)

    def outer(z):
        return cell(z)

    deq = ours.get_deq(f_max_iter=6, **options)
    (z,), _ = deq(lambda z: outer(z), torch.zeros(2, 3, 4))
    first = len(seen)
    z.sum().backward()
    assert first > 3 and all(torch.equal(mask, seen[0]) for mask in seen)
    deq(lambda z: outer(z), torch.zeros(2, 3, 4))
    assert not torch.equal(seen[-1], seen[0])


@pytest.mark.parametrize("options", [{"grad": 3, "tau": 0.8}, {"ift": True}], ids=str)
def test_what_mem_gc_recomputes_has_the_mask_of_the_solve(options):
    linear, drop = nn.Linear(4, 4), ours.VariationalDropout(0.5)
    ours.apply_norm(linear, "weight_norm")

    def gradients(recompute):
        torch.manual_seed(1)
        u, calls = torch.ones(3, 4, requires_grad=True), []

        def cell(z, u):
            calls.append(1)
            return torch.tanh(0.5 * drop(linear(z)) + u)

        deq = ours.get_deq(**TIGHT | options)
        (z,), _ = deq(lambda z: ours.mem_gc(cell, (z, u)) if recompute else cell(z, u), torch.zeros(3, 4))
        before = len(calls)
        grads = torch.autograd.grad(z.sin().sum(), [u, *linear.parameters()])
        assert (len(calls) > before) == recompute
        return grads

    agree(gradients(True), gradients(False), 1e-14)


def test_dropout_is_refused_where_it_has_no_form():
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1.0"):
        ours.VariationalDropout(1.0)
    with pytest.raises(ValueError, match="x must have 3 dims, got a float64 tensor of shape"):
        ours.VariationalDropout1d()(torch.zeros(2, 3))


class WholeModel(nn.Module):
    """As clients are: the function of the layer reaches the stem, which it does not call."""

    def __init__(self, library):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.cell, self.deq = nn.Linear(4, 4), library.get_deq(ift=True, **TIGHT)
        nn.init.normal_(self.cell.weight, std=0.1)

    def forward(self, x):
        u = self.stem(x)
        return self.deq(lambda z: torch.tanh(self.cell(z) + u), torch.zeros_like(u))[0][-1]


def test_modules_that_the_function_reaches_and_does_not_call_may_be_any(theirs):
    x, results = torch.randn(5, 4), []
    for library in (ours, theirs):
        torch.manual_seed(0)
        model = WholeModel(library).train()
        z = model(x)
        results.append((z, *torch.autograd.grad(z.sin().sum(), [*model.parameters()])))
    agree(*results, 1e-11)


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5}, {"weight_func": "linear", "bias": 0.1}])
def test_fp_correction_weighs_as_theirs(theirs, options):
    states, y = [torch.randn(3, 2) for _ in range(4)], torch.randn(3, 2)
    mine, other = (
        library.fp_correction(F.mse_loss, (states, y), return_loss_values=True, **options) for library in (ours, theirs)
    )
    assert mine[0] == pytest.approx(other[0].item(), rel=1e-14) and mine[1] == other[1]
    plain = ours.fp_correction(F.mse_loss, (states, y), weight_func=lambda n, k: k == n - 1)
    assert plain == F.mse_loss(states[-1], y)
    assert ours.fp_correction(F.mse_loss, (states, y), "const") == pytest.approx(sum(mine[1]), rel=1e-14)


def test_jac_reg_and_mixed_init_are_theirs(theirs):
    results = []
    for library in (ours, theirs):
        torch.manual_seed(3)
        z = library.mixed_init((4, 6)).requires_grad_()
        w = torch.ones(6, 6, requires_grad=True)
        penalty = library.jac_reg(torch.tanh(z @ w), z, vecs=2)
        results.append((z, penalty, *torch.autograd.grad(penalty, w)))
    assert torch.equal(results[0][0], results[1][0])
    agree(*results, 1e-14)
