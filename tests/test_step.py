"""DEQ.step: tokens solved one after another are those solved together."""

import copy
import itertools

import pytest
import torch
from torch import nn

from tritondeq import DEQ, Anderson, FixedDropout, Picard, Status
from tritondeq.cells import Affine, Cell, Transformer
from tritondeq.cells.tokens import ROOM

D, T, B = 12, 9, 2


@pytest.fixture
def x():
    return torch.randn(B, T, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layer(dtype=torch.float64, tol=1e-12, **options):
    cell = Transformer(D, 7, **({"heads": 2, "causal": True, "rotary": 100.0} | options)).to(dtype)
    with torch.no_grad():
        for p in cell.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn_like(p)
    return DEQ(cell, tol=tol, max_steps=300)


def stepwise(deq, x, sizes, cache=None, mask=None):
    out = []
    for at, size in zip(itertools.accumulate((0, *sizes)), sizes, strict=False):
        part = x[:, at : at + size]
        z, cache = deq.step(part if mask is None else (part, mask[:, at : at + size]), cache)
        assert deq.last.converged.all() and not z.requires_grad and deq.last.adjoint is None
        out.append(z)
    return torch.cat(out, dim=1), cache


def assert_close(got, want, atol=1e-9):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("options", [{}, {"heads": 6, "kv_heads": 2}, {"rotary": None}, {"decay": True}], ids=str)
@pytest.mark.parametrize("wiring", ["outer", "damped", "head"])
def test_as_all_together(wiring, options, x):
    """Token by token, by parts, all at once, and a prompt of one."""
    deq = layer(wiring=wiring, **options)
    together = deq(x)
    for sizes in ((1,) * T, (4, 1, 3, 1), (T,), (1, 8)):
        assert_close(stepwise(deq, x, sizes)[0], together)


@pytest.mark.parametrize("options", [{}, {"heads": 6, "kv_heads": 2, "wiring": "damped"}], ids=str)
def test_prompts_of_unequal_length(options, x):
    """Padding, on the left of the prompt, in the middle of a sequence or on its right."""
    deq, real = layer(**options), torch.ones(B, T, dtype=torch.bool)
    real[0, :2], real[1, 4:6], real[1, 8:] = False, False, False
    z, _ = stepwise(deq, x, (4, 1, 3, 1), mask=real)
    assert_close(z[real], deq((x, real))[real])
    # padding that has begun late, or ended, is the same
    first = torch.ones(B, 4, dtype=torch.bool)
    first[0, :2] = False
    a, cache = deq.step((x[:, :4], first))
    b, _ = stepwise(deq, x[:, 4:], (2, 3), cache)
    seen = torch.cat([first, torch.ones(B, 5, dtype=torch.bool)], dim=1)
    assert_close(torch.cat([a, b], dim=1)[seen], deq((x, seen))[seen])
    assert_close(b[:1], deq(x[:1, 2:])[:, 2:])


def test_past_what_a_cache_has_room_for():
    deq = layer(tol=1e-11)
    x = torch.randn(1, 2 * ROOM + 5, 7).double().requires_grad_()
    z, cache = stepwise(deq, x, (ROOM - 1, 1, 1, ROOM, 2, 2))
    assert_close(z, deq(x).detach())
    assert cache.past.tokens == x.shape[1] and not cache.past.store.keys.requires_grad


def test_growth_is_amortised():
    """Steps between two doublings copy nothing: keys stay where they are."""
    deq, x = layer(tol=1e-3, dtype=torch.float32), torch.randn(1, 1, 7)
    places, cache = [], None
    for _ in range(4 * ROOM + 1):
        _, cache = deq.step(x, cache)
        places.append(cache.past.store.keys.data_ptr())
    assert len(list(itertools.groupby(places))) == 4  # at 1, 65, 129, 257 tokens


def test_a_cache_is_stepped_from_again(x):
    """Beams that share a prompt: none changes another, nor the prompt."""
    deq = layer()
    prompt, cache = deq.step(x[:, :4])
    keys = cache.past.store.keys[:, :, :4].clone()
    a, cache_a = deq.step(x[:, 4:6], cache)
    b, cache_b = deq.step(-x[:, 4:6], cache)
    last_a, _ = deq.step(x[:, 6:], cache_a)
    last_b, _ = deq.step(x[:, 6:], cache_b)
    for sign, middle, last in ((1, a, last_a), (-1, b, last_b)):
        together = deq(torch.cat([x[:, :4], sign * x[:, 4:6], x[:, 6:]], dim=1))
        assert_close(torch.cat([prompt, middle, last], dim=1), together)
    assert torch.equal(cache.past.store.keys[:, :, :4], keys) and cache.past.tokens == 4


def test_a_step_that_fails_leaves_the_cache_as_it_was(x):
    deq = layer()
    first, cache = deq.step(x[:, :4])
    with pytest.raises(ValueError, match="max_steps"):
        deq.max_steps = 0
        deq.step(x[:, 4:], cache)
    deq.max_steps = 300
    last, _ = deq.step(x[:, 4:], cache)
    assert_close(torch.cat([first, last], dim=1), deq(x))


def test_a_warm_start_takes_fewer_steps_to_the_same(x):
    deq = layer(wiring="damped", tol=1e-9)
    together, (_, cache) = deq(x), deq.step(x[:, :5])
    z, _ = deq.step(x[:, 5:], cache)
    cold = deq.last.steps
    warm, _ = deq.step(x[:, 5:], cache, z0=together[:, 5:])
    assert (deq.last.steps < cold).all() and deq.last.steps.max() <= 2
    assert_close(warm, z, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": Picard(damping=0.8)},
        {"solver": Anderson(memory=2)},
        {"graph": True},  # this and the next do not apply to steps
        {"compile": {"backend": "no such backend"}},
    ],
    ids=repr,
)
def test_options_of_the_layer(options, x):
    cell = layer().cell
    z, _ = stepwise(DEQ(cell, tol=1e-12, max_steps=300, **options), x, (3, 1, 5))
    assert_close(z, DEQ(cell, tol=1e-12, max_steps=300)(x))


def test_autocast_keeps_narrow_keys(x):
    deq, wide = layer(torch.float32, tol=None), layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, cache = stepwise(deq, x.float(), (5, 4))
        torch.testing.assert_close(z, deq(x.float()), rtol=5e-2, atol=5e-2)
        assert_close(stepwise(wide, x, (5, 4))[0], wide(x))  # leaves float64 alone
    assert cache.past.store.keys.dtype == torch.bfloat16 and z.dtype == torch.float32
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        deq.step(x.float(), cache)


def test_dropout_is_one_mask_a_step(x):
    deq = layer(dropout=0.5)
    a, b = deq.step(x)[0], deq.step(x)[0]
    assert deq.last.status.max() == Status.CONVERGED and not torch.allclose(a, b, atol=1e-3)
    deq.eval()
    assert_close(stepwise(deq, x, (4, 5))[0], deq(x))


class Running(Cell):
    """A causal cell of two methods: each token sees the sum of the states before it."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(D, D), FixedDropout(0.0)

    def inject(self, x):
        return self.extend(x, None)

    def initial(self, x, injection):
        return torch.zeros_like(x)

    def forward(self, z, injection):
        x, before = injection
        return torch.tanh(0.3 * self.dropout(self.linear(z)) + 0.1 * (before + z.cumsum(1) - z) + x)

    def extend(self, x, past):
        return x, x.new_zeros(x.shape[0], 1, D) if past is None else past

    def remember(self, z, injection):
        return injection[1] + z.sum(1, keepdim=True)


def test_a_cell_of_ones_own():
    deq = DEQ(Running().double(), tol=1e-12, max_steps=300)
    x = torch.randn(B, T, D).double()
    assert_close(stepwise(deq, x, (1, 5, 3))[0], deq(x))


@pytest.mark.parametrize(
    "cell, error, message",
    [
        (Transformer(D, heads=2), ValueError, "causal must be True"),
        (Affine(D), TypeError, "extend and remember, got Affine"),
        (nn.TransformerEncoderLayer(D, 2, dropout=0.0), TypeError, "extend and remember, got TransformerEncoderLayer"),
    ],
    ids=lambda c: type(c).__name__,
)
def test_cells_that_have_no_steps(cell, error, message):
    with pytest.raises(error, match=message):
        DEQ(cell).step(torch.zeros(B, T, D))


def test_caches_that_do_not_fit(x):
    deq = layer()
    _, cache = deq.step(x)
    for error, message, other, *inputs in (
        (ValueError, "another layer", layer(), x, cache),
        (ValueError, "another layer", copy.deepcopy(deq), x, cache),
        (ValueError, "batch size 2, and x has batch size 1", deq, x[:1], cache),
        (ValueError, "dtype torch.float64, and x has dtype torch.float32", deq, x.float(), cache),
        (ValueError, "device cpu, and x has device meta", deq, x.to("meta"), cache),
        (TypeError, "cache must be what step returned.*float64 tensor", deq, x, x),
        (TypeError, "x must hold a tensor", deq, None, cache),
    ):
        with pytest.raises(error, match=message):
            other.step(*inputs)


@torch.no_grad()
def test_keys_are_those_of_the_state_returned():
    """The best one, where a later one was worse."""
    deq = DEQ(Transformer(D, 7, heads=2, causal=True).double(), tol=1e-9, max_steps=6, trace=True)
    for linear, gain in ((deq.cell.qkv, 3), (deq.cell.up, 3), (deq.cell.output, 40), (deq.cell.down, 40)):
        linear.weight *= gain
    x = torch.randn(1, T, 7).double()
    z, cache = deq.step(x)
    assert deq.last.trace[:, 0].argmin() < 5
    y = z + deq.cell.inject(x).u
    keys = deq.cell.qkv(deq.cell.attention_norm(y))[..., D : 2 * D].unflatten(-1, (2, 6)).transpose(1, 2)
    torch.testing.assert_close(cache.past.store.keys[:, :, :T], keys)
