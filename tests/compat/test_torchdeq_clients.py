"""Small clients of torchdeq, in its own shape of code: by tritondeq.compat.torchdeq they train to the same losses."""

import argparse
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from alike import TIGHT, agree
from torch import nn

from tritondeq.compat import torchdeq as ours


class Language(nn.Module):
    """A causal transformer layer at equilibrium, weight-normed, with variational dropout and a Jacobian penalty."""

    options = {"f_solver": "anderson", "b_solver": "anderson", "ift": True}

    def __init__(self, library):
        super().__init__()
        self.library, d = library, 8
        self.embed, self.head = nn.Embedding(11, d), nn.Linear(d, 11)
        self.qkv, self.out, self.up, self.down = (nn.Linear(a, b) for a, b in ((d, 3 * d), (d, d), (d, 16), (16, d)))
        self.norms = nn.ModuleList(nn.LayerNorm(d, elementwise_affine=False) for _ in range(2))
        self.drop = library.VariationalDropout1d(0.0)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.1)
        library.apply_norm(self, "weight_norm", filter_out=["embed", "head"])
        self.deq = library.get_deq(**TIGHT | self.options)

    def block(self, z, u):
        q, k, v = (self.qkv(z) + u).chunk(3, -1)
        scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
        z = self.norms[0](self.drop(self.out(scores.softmax(-1) @ v)) + 2 * u[..., :8])
        return self.norms[1](0.3 * self.down(F.gelu(self.up(z))) + z)

    def loss(self, step):
        self.library.reset_deq(self)
        gen = torch.Generator().manual_seed(step)
        tokens = torch.randint(11, (3, 6), generator=gen)
        x = self.embed(tokens[:, :-1])
        u = torch.cat([x, x, x], -1)
        states, _ = self.deq(lambda z: self.block(z, u), torch.zeros(3, 5, 8))
        z = states[-1]
        around = z.detach().requires_grad_()
        penalty = self.library.jac_reg(self.block(around, u), around)
        return F.cross_entropy(self.head(z).flatten(0, 1), tokens[:, 1:].flatten()) + 0.1 * penalty


class Vision(nn.Module):
    """Two scales as a list of states, GroupNorm, phantom gradients in slices."""

    options = {"f_solver": "broyden", "f_max_iter": 24, "f_tol": 1e-13, "n_states": 2, "grad": 3, "tau": 0.6}

    def __init__(self, library):
        super().__init__()
        self.library = library
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(8, 3)
        self.fine, self.coarse = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.down, self.up = nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(2))
        for conv in (self.fine, self.coarse, self.down, self.up):
            nn.init.normal_(conv.weight, std=0.03)
        self.deq = library.get_deq(**self.options)

    def loss(self, step):
        self.library.reset_deq(self)
        gen = torch.Generator().manual_seed(step)
        u, y = self.stem(torch.randn(3, 1, 8, 8, generator=gen)), torch.randint(3, (3,), generator=gen)

        def f(a, b):
            a_next = self.norms[0](torch.relu(self.fine(a) + u + F.interpolate(self.up(b), scale_factor=2)))
            return a_next, self.norms[1](torch.relu(self.coarse(b) + self.down(a) + F.avg_pool2d(u, 2)))

        states, _ = self.deq(f, [torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 4, 4)])
        logits = [self.head(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1)) for a, b in states]
        return self.library.fp_correction(F.cross_entropy, (logits, y))


class Graph(nn.Module):
    """An implicit graph network: rows are nodes, so that the whole state is one sample."""

    def __init__(self, library):
        super().__init__()
        gen = torch.Generator().manual_seed(5)
        edges = (torch.rand(9, 9, generator=gen) < 0.4).double()
        self.x, self.y = torch.randn(9, 6, generator=gen), torch.randint(3, (9,), generator=gen)
        edges = edges + edges.T + torch.eye(9)
        self.edges = edges / edges.sum(1, keepdim=True)
        self.inject, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        nn.init.normal_(self.mix.weight, std=0.15)
        options = TIGHT | {"ift": True, "core": "indexing"}
        self.deq = library.get_deq(**options | ({"batch_dims": 0} if library is ours else {}))

    def loss(self, step):
        u = self.edges @ self.inject(self.x)
        (z,), _ = self.deq(lambda z: torch.relu(self.mix(self.edges @ z) + u), torch.zeros(9, 8))
        return F.cross_entropy(self.head(z), self.y)


class Flow(nn.Module):
    """Updates of a hidden state and a flow by a gated cell, a few of them, supervised on the way."""

    options = {
        "f_solver": "simple_fixed_point_iter",
        "f_max_iter": 9,
        "core": "indexing",
        "n_states": 3,
        "grad": [2, 1, 2],
    }

    def __init__(self, library):
        super().__init__()
        self.library, self.deq = library, library.get_deq(**self.options)
        self.context = nn.Conv2d(2, 6, 3, padding=1)
        self.gates, self.new = nn.Conv2d(14, 12, 3, padding=1), nn.Conv2d(14, 6, 3, padding=1)
        self.delta = nn.Conv2d(6, 2, 3, padding=1)

    def loss(self, step):
        self.library.reset_deq(self)
        gen = torch.Generator().manual_seed(step)
        frames, flow = torch.randn(2, 2, 6, 6, generator=gen), torch.randn(2, 2, 6, 6, generator=gen)
        context = self.context(frames)

        def update(h, flow):
            x = torch.cat([context, flow], 1)
            keep, reset = self.gates(torch.cat([h, x], 1)).sigmoid().chunk(2, 1)
            h = (1 - keep) * h + keep * torch.tanh(self.new(torch.cat([reset * h, x], 1)))
            return h, flow + self.delta(h)

        states, _ = self.deq(update, (torch.tanh(context), torch.zeros_like(flow)))
        return self.library.fp_correction(lambda z, y: (z[1] - y).abs().mean(), ([tuple(z) for z in states], flow))


CURVES = {Language: 1e-9, Vision: 1e-9, Graph: 1e-9, Flow: 1e-12}  # the last has no tolerance: the same arithmetic


def curve(kind, library, steps=4):
    torch.manual_seed(0)
    model, losses = kind(library).train(), []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        loss = model.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("kind", CURVES)
def test_clients_train_alike(theirs, kind):
    mine, other = curve(kind, ours), curve(kind, theirs)
    assert (mine[1:] != mine[:-1]).all()
    agree([mine], [other], CURVES[kind])


def test_rows_that_depend_on_one_another_take_batch_dims_0(theirs):
    """There, each row of a chain is that of its lowest residual, 0 at the start, and the state is no fixed point."""

    def chain(z):
        return torch.cat([torch.ones(1, 2), 0.9 * z[:-1]])

    options, exact = {"f_max_iter": 30, "f_tol": 1e-6}, (0.9 ** torch.arange(6.0))[:, None].expand(6, 2)
    (z,), info = ours.get_deq(**options, batch_dims=0)(chain, exact / 2)
    torch.testing.assert_close(z, exact)
    assert info["abs_lowest"].shape == (1,)
    with pytest.warns(UserWarning, match="rows that are nodes of a graph: batch_dims=0"):
        ours.get_deq(**options)(chain, exact / 2)
    (z,), info = theirs.get_deq(**options)(chain, exact / 2)
    torch.testing.assert_close(z[2:], exact[2:] / 2)
    assert info["abs_lowest"].max() == 0


def test_the_page_runs_as_a_reader_would_run_it():
    torch.set_default_dtype(torch.float32)
    page, names = Path(__file__).parent.parent.parent / "docs/from-torchdeq.md", {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), names)
    assert len(names["states"]) == 2 and (names["info"]["abs_lowest"] <= 1e-3).all()
    assert all(p.grad.abs().sum() > 0 for p in names["model"].parameters())
    assert len(names["solution"].states) == 2


def test_the_page_has_every_option_and_name():
    text = (Path(__file__).parent.parent.parent / "docs/from-torchdeq.md").read_text()
    parser = argparse.ArgumentParser()
    ours.add_deq_args(parser)
    for name in vars(parser.parse_args([])):
        assert f"`{name}" in text or name.startswith(("norm_", "jac_")), name
