"""Dropout in cells: one mask a solve, whatever evaluates the cell, or an error."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tritondeq import DEQ, Anderson, FixedDropout, Implicit, OneStep, Unrolled


class Block(nn.Module):
    def __init__(self, dropout: nn.Module, width: int = 8):
        super().__init__()
        self.linear, self.dropout = nn.Linear(width, width), dropout
        nn.init.normal_(self.linear.weight, std=0.1)

    def forward(self, z, x):
        return torch.tanh(self.dropout(self.linear(z)) + x)


@pytest.fixture
def x():
    return torch.randn(5, 8, dtype=torch.float64)


def layer(adjoint=Implicit(), **options) -> DEQ:  # noqa: B008  frozen
    torch.manual_seed(0)
    return DEQ(Block(FixedDropout(0.4)).double(), adjoint=adjoint, tol=1e-11, max_steps=100, **options)


def seeded(deq: DEQ, *inputs: torch.Tensor, call=lambda deq, x: deq(x)) -> list[torch.Tensor]:
    """Values, with the masks that seed 7 gives, and the parameters' gradients of the sum of their sines."""
    torch.manual_seed(7)
    values = [call(deq, x) for x in inputs]
    loss = sum(z.sin().sum() for z in values)
    return [*values, *torch.autograd.grad(loss, list(deq.parameters()))]


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


def test_one_mask_a_solve(x):
    deq, seen = layer(solver=Anderson()), []
    deq.cell.dropout.register_forward_hook(lambda module, args, out: seen.append((out / args[0]).detach()))
    z = deq(x)
    assert deq.last.converged.all() and len(seen) > 5
    mask = seen[0]
    assert_close(seen, [mask] * len(seen))
    assert 0.2 < (mask == 0).double().mean() < 0.6
    assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / 0.6))
    assert torch.allclose(torch.tanh(deq.cell.linear(z) * mask + x), z, atol=1e-9)
    first = len(seen)
    other = deq(x)
    assert not torch.equal(seen[first] == 0, mask == 0) and not torch.equal(z, other)


def test_monte_carlo_dropout(x):
    """In eval(), with the dropout alone in train(): each pass holds a mask of its own, and converges."""
    deq = layer().eval()
    deq.cell.dropout.train()
    one, two = deq.solve(x), deq.solve(x)
    assert one.converged.all() and two.converged.all() and not torch.equal(one.value, two.value)
    deq.cell.dropout = nn.Dropout(0.3)
    with pytest.raises(RuntimeError, match="Dropout 'dropout'"):
        deq(x)


def test_gradient_is_that_of_the_same_masks(x):
    assert_close(seeded(layer(), x, 2 * x), seeded(layer(Unrolled(100)), x, 2 * x))


def test_recomputation_sees_the_same_mask(x):
    plain = seeded(layer(Unrolled(12)), x)
    assert_close(seeded(layer(Unrolled(12, checkpoint=True)), x), plain)
    whole = seeded(layer(Unrolled(12)), x, call=lambda deq, x: checkpoint(deq, x, use_reentrant=False))
    assert_close(whole, plain)


def test_no_mask_in_eval(x):
    deq = layer().eval()
    assert torch.equal(deq(x), deq(x))
    assert torch.equal(FixedDropout(0.9).eval()(x), x) and torch.equal(FixedDropout(0.0)(x), x)
    assert DEQ(Block(nn.Dropout(0.5)).double()).eval()(x).isfinite().all(), "and torch's draws nothing there"


def test_a_cell_that_fails_leaves_nothing_held(x):
    deq = layer()
    with pytest.raises(RuntimeError):
        deq(x[:, :3])
    ones = torch.ones(4, 5)
    assert not torch.equal(deq.cell.dropout(ones), deq.cell.dropout(ones)), "a mask is still held"
    copy.deepcopy(deq)(x)


@pytest.mark.parametrize("dims", [0, 1, 2])
def test_a_value_for_the_first_dims(dims):
    deq, seen = DEQ(Block(FixedDropout(0.5, dims)).double()), []
    deq.cell.dropout.register_forward_hook(lambda module, args, out: seen.append((out / args[0]).detach()))
    deq(torch.randn(6, 5, 8, dtype=torch.float64))
    one = seen[0][(..., *(0,) * (3 - dims))].view(*((), (6,), (6, 5))[dims], *(1,) * (3 - dims))
    for mask in seen:
        assert_close(mask, one.expand(6, 5, 8))
    assert set(one.round().flatten().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("dims, seen", [(None, 1), (0, 6000), (1, 150), (2, 3)])
def test_outside_a_solve_each_call_draws(dims, seen):
    dropout = FixedDropout(0.25) if dims is None else FixedDropout(0.25, dims)
    a, b = dropout(torch.ones(40, 50, 3)).view(-1, seen), dropout(torch.ones(40, 50, 3)).view(-1, seen)
    assert torch.equal(a, a[:, :1].expand_as(a))
    assert set(a.unique().tolist()) <= {0.0, torch.tensor(1 / 0.75).item()}
    assert dims == 0 or (abs(a.mean() - 1) < (0.05 if dims is None else 0.3) and not torch.equal(a, b))


class DropPath(nn.Identity):
    drop_prob = 0.1


class StochasticDepth(nn.Identity):
    p = 0.1


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: Block(nn.Dropout(0.1)), "Dropout 'dropout'"),
        (lambda: Block(nn.AlphaDropout(0.1)), "AlphaDropout 'dropout'"),
        (lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True), "MultiheadAttention 'self_attn'"),
        (lambda: Block(DropPath()), "DropPath 'dropout'"),
        (lambda: Block(StochasticDepth()), "StochasticDepth 'dropout'"),
    ],
)
def test_a_mask_a_step_is_refused(make, name):
    deq = DEQ(make())
    with pytest.raises(RuntimeError, match=f"{name}.*tritondeq.FixedDropout"):
        deq(torch.zeros(2, 8))


@pytest.mark.parametrize("dropout", [nn.Dropout(0.0), nn.Dropout(0.5).eval()])
def test_what_draws_nothing_is_taken(dropout, x):
    deq = DEQ(Block(dropout).double())
    assert deq(x).isfinite().all()


def test_bad_options():
    for message, *options in (
        *((f"p must be at least 0 and below 1, got {p}", p) for p in (-0.1, 1.0, 2)),
        ("dims", 0.5, -1),
    ):
        with pytest.raises(ValueError, match=message):
            FixedDropout(*options)


def test_one_place_each():
    class Twice(Block):
        def forward(self, z, x):
            return torch.tanh(self.dropout(self.linear(z)) + x) + 0 * self.dropout(z[:1])

    with pytest.raises(ValueError, match="another FixedDropout at each place"):
        DEQ(Twice(FixedDropout(0.5)))(torch.zeros(3, 8))


class Checkpointed(Block):
    """A block that recomputes its linear layer and dropout in the backward pass."""

    def forward(self, z, x):
        return torch.tanh(checkpoint(lambda z: self.dropout(self.linear(z)), z, use_reentrant=False) + x)


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep()], ids=str)
def test_a_checkpoint_within_the_cell_raises_where_it_would_draw_another_mask(adjoint, x):
    deq = DEQ(Checkpointed(FixedDropout(0.4)).double(), adjoint=adjoint)
    z = deq(x)
    with pytest.raises(RuntimeError, match="checkpoint the layer, and not parts of its cell"):
        z.sum().backward()
    deq.eval()(x).sum().backward()  # without a mask there is nothing to draw


def test_a_checkpoint_outside_of_a_solve_draws_the_mask_again(x):
    """By torch's own state of random numbers, as with nn.Dropout."""
    block = Checkpointed(FixedDropout(0.4)).double()
    plain = Block(FixedDropout(0.4)).double()
    plain.load_state_dict(block.state_dict())
    grads = []
    for net in (block, plain):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(net(x, x).square().sum(), list(net.parameters())))
    torch.testing.assert_close(*grads)
