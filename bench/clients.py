"""Small clients of torchdeq, in its own shape of code: a language model, MDEQ, an implicit graph net, DEQ-Flow.

`python -m tritondeq.bench.clients` trains each by torchdeq and by tritondeq.compat.torchdeq, from the same weights and
on the same data in float64, and prints losses, time and memory of a training step. Their code differs by the import.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritondeq.compat import torchdeq as ours
from tritondeq.toolbox import one_thread

from . import measure, memory

TIGHT = {"f_max_iter": 120, "f_tol": 1e-13, "b_max_iter": 120, "b_tol": 1e-13}  # a solve ends at its solution
STEPS = 20  # of training, whose losses are compared


class Language(nn.Module):
    """A causal transformer layer at equilibrium, weight-normed, with variational dropout and a Jacobian penalty."""

    options = {"f_solver": "anderson", "b_solver": "anderson", "ift": True}

    def __init__(self, library: Any):
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

    def block(self, z: Tensor, u: Tensor) -> Tensor:
        """Returns f(z), [B, T, D]."""
        q, k, v = (self.qkv(z) + u).chunk(3, -1)
        scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
        z = self.norms[0](self.drop(self.out(scores.softmax(-1) @ v)) + 2 * u[..., :8])
        return self.norms[1](0.3 * self.down(F.gelu(self.up(z))) + z)

    def loss(self, step: int) -> Tensor:
        """Returns the loss of a step, on data that its number draws."""
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

    def __init__(self, library: Any):
        super().__init__()
        self.library = library
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(8, 3)
        self.fine, self.coarse = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.down, self.up = nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(2))
        for conv in (self.fine, self.coarse, self.down, self.up):
            nn.init.normal_(conv.weight, std=0.03)
        self.deq = library.get_deq(**self.options)

    def loss(self, step: int) -> Tensor:
        """Returns the loss of a step, on data that its number draws."""
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

    def __init__(self, library: Any):
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

    def loss(self, step: int) -> Tensor:
        """Returns the loss of a step, on data that its number draws."""
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

    def __init__(self, library: Any):
        super().__init__()
        self.library, self.deq = library, library.get_deq(**self.options)
        self.context = nn.Conv2d(2, 6, 3, padding=1)
        self.gates, self.new = nn.Conv2d(14, 12, 3, padding=1), nn.Conv2d(14, 6, 3, padding=1)
        self.delta = nn.Conv2d(6, 2, 3, padding=1)

    def loss(self, step: int) -> Tensor:
        """Returns the loss of a step, on data that its number draws."""
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


CLIENTS = (Language, Vision, Graph, Flow)


class Training:
    """A client that is trained by one library, on one step's data after another."""

    def __init__(self, kind: Any, library: Any):
        torch.manual_seed(0)
        self.model, self.number = kind(library).train(), 0
        self.optimizer = torch.optim.Adam(self.model.parameters(), 3e-3)

    def step(self) -> float:
        """Trains for a step, and returns its loss."""
        loss = self.model.loss(self.number)
        self.number += 1
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def curve(kind: Any, library: Any, steps: int) -> Tensor:
    """Returns the losses of so many steps."""
    training = Training(kind, library)
    return torch.tensor([training.step() for _ in range(steps)])


def table(seconds: float, count: int = STEPS) -> list[list[str]]:
    """Returns the rows of a table, the head first: of `count` steps, one of which is clocked for so many seconds."""
    import torchdeq

    cpu = torch.device("cpu")
    rows = [["client", "by", f"loss of step 1 and {count}", "curves apart", "a training step", "its memory"]]
    for kind in CLIENTS:
        by = {"torchdeq": torchdeq, "tritondeq": ours}
        curves = {name: curve(kind, library, count) for name, library in by.items()}
        apart = (curves["tritondeq"] - curves["torchdeq"]).abs().max().item()
        steps = {name: Training(kind, library).step for name, library in by.items()}
        timed = measure.clock(steps, cpu, seconds)
        for name, step in steps.items():
            first, last = curves[name][[0, -1]].tolist()
            peak = memory.peak(step, cpu) / 2**10
            each = [f"{first:.4f}, {last:.4f}", f"{apart:.1e}", f"{timed[name].median * 1e3:.1f} ms", f"{peak:.0f} KiB"]
            rows.append([kind.__name__, name, *each])
    return rows


def main() -> None:
    """Prints the table."""
    from .report import markdown

    torch.set_default_dtype(torch.float64)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that float64 does not reach 1e-13 in each backward solve
        print(markdown(table(2.0)))


if __name__ == "__main__":
    main()
