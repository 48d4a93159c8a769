"""Modules of users that the random cases take for cells."""

import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fuzz_draw import WIDE, Draw
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import tritondeq as tdeq
from tritondeq import Implicit, Unrolled


class Tanh(nn.Module):
    """tanh(W z + x): the others change a detail of it."""

    def __init__(self, draw: Draw, n: int, q: float = 0.7):
        super().__init__()
        self.linear = nn.Linear(n, n, dtype=WIDE)
        self.linear.weight.data, self.linear.bias.data = draw.contraction(n, q), draw.randn(n, scale=0.3)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Normed(Tanh):
    def __init__(self, draw, n):
        super().__init__(draw, n)
        self.norm, self.drop = nn.LayerNorm(n, dtype=WIDE), tdeq.FixedDropout(draw.choice([0, 0.3]))

    def forward(self, z, x):
        return self.norm(x + self.drop(torch.tanh(self.linear(z))) + 0.3 * z)


class Attending(nn.Module):
    def __init__(self, draw, n):
        super().__init__()
        self.attention = nn.MultiheadAttention(n, 1, batch_first=True, dtype=WIDE)
        self.norm = nn.LayerNorm(n, dtype=WIDE)

    def forward(self, z, x):
        return self.norm(x + 0.3 * self.attention(z, z, z, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, draw, n):
        super().__init__()
        self.unit = nn.GRUCell(n, n, dtype=WIDE)

    def forward(self, z, x):
        return self.unit(x, z)


class Energy(Tanh):
    """A step down the gradient of an energy that autograd takes within the cell."""

    def forward(self, z, x):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            e = F.softplus(self.linear(z)).sum() + 0.5 * z.pow(2).sum() - (z * x).sum()
            return z - 0.5 * torch.autograd.grad(e, z, create_graph=True)[0]


class Transformed(Tanh):
    """The same by torch.func."""

    def forward(self, z, x):
        def energy(z):
            return F.softplus(self.linear(z)).sum() + 0.5 * z.pow(2).sum() - (z * x).sum()

        return z - 0.5 * torch.func.grad(energy)(z)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x - x**3 / 6

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x**2 / 2)


class Custom(Tanh):
    def forward(self, z, x):
        return _Cube.apply(torch.tanh(self.linear(z) + x))


class Counting(Tanh):
    """Counts its evaluations in a buffer, which changes no value."""

    def __init__(self, draw, n):
        super().__init__(draw, n)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, z, x):
        self.count += 1
        return super().forward(z, x)


class Within(Tanh):
    """A cell with a layer inside."""

    def __init__(self, draw, n):
        super().__init__(draw, n, 0.4)
        inner = Tanh(draw, n, 0.4)
        inner = tdeq.cells.Affine(n, contraction=0.4, dtype=WIDE) if draw.chance(0.5) else inner
        if draw.chance(0.3):
            weight_norm(self.linear)
        adjoint = draw.choice([Implicit(), Implicit(), Unrolled(60)])
        self.inner = tdeq.DEQ(inner, tol=1e-15, max_steps=80, adjoint=adjoint)  # more exact than any bound

    def forward(self, z, x):
        return torch.tanh(self.linear(self.inner(z + x)))


def wrapped(wrap: Callable) -> Callable[[Draw, int], nn.Module]:
    def make(draw: Draw, n: int) -> nn.Module:
        cell = Tanh(draw, n)
        with warnings.catch_warnings(), torch.no_grad():  # a weight with a graph could not be copied
            warnings.simplefilter("ignore")  # the old weight_norm is deprecated
            wrap(cell.linear)
            for _ in range(300):  # power iterations: further ones change nothing
                cell.linear.weight  # noqa: B018
        return cell

    return make


class BatchNormed(Tanh):
    def __init__(self, draw, n):
        super().__init__(draw, n)
        self.norm = nn.BatchNorm1d(n, dtype=WIDE)
        self.norm.weight.data.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.norm(self.linear(z) + x))


class Leaving(Tanh):
    """Leaves a balance loss in an attribute."""

    def forward(self, z, x):
        self.balance = torch.tanh(self.linear(z)).pow(2).sum()
        return super().forward(z, x) * 0.8


class Keeping(Tanh):
    """Computes its weight at its first evaluation, and keeps it."""

    kept: Tensor | None = None

    def forward(self, z, x):
        if self.kept is None:
            self.kept = 0.8 * torch.sin(self.linear.weight)
        return torch.tanh(z @ self.kept.T + self.linear.bias + x)


class Yielding(Tanh):
    def forward(self, z, x):
        time.sleep(0)  # another thread's turn
        return torch.tanh(0.6 * self.linear(z) + x)


def normed(draw: Draw, n: int) -> nn.Module:
    """A cell of rate 0.6 at most, by spectral_norm, or by weight_norm with small gains."""
    cell, spectral = Tanh(draw, n, 0.6), draw.chance(0.5)
    (spectral_norm if spectral else weight_norm)(cell.linear)
    if spectral:
        cell.forward = lambda z, x: torch.tanh(0.6 * cell.linear(z) + x)
        made = cell.linear.parametrizations.weight
        u, _, v = torch.linalg.svd(made.original.detach())  # where its iteration ends, however close two values are
        made[0]._u.copy_(u[:, 0])
        made[0]._v.copy_(v[0])
    return cell
