"""Formulas in torch that the library and the references of kernels share: activations and norms."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-6

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sin": torch.sin,
    "identity": lambda x: x,
    "abs": torch.abs,  # the reflection 2 prox - 1 of relu, and below that of tanh: see solvers/splitting.py
    "reflected_tanh": lambda x: 2 * torch.tanh(x) - x,
}


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


SLOPES = {
    "tanh": lambda x: 1 - torch.tanh(x) ** 2,
    "relu": lambda x: (x > 0).to(x.dtype),
    "gelu": lambda x: 0.5 + 0.5 * torch.erf(x * 0.5**0.5) + x * torch.exp(-0.5 * x * x) * (0.5 / torch.pi) ** 0.5,
    "silu": _silu_slope,
    "sin": torch.cos,
    "identity": torch.ones_like,
    "abs": lambda x: torch.where(x > 0, 1.0, -1.0).to(x.dtype),
    "reflected_tanh": lambda x: 1 - 2 * torch.tanh(x) ** 2,
}
FAST = {name: f"fast_{name}" for name in ("tanh", "gelu", "silu")}  # what kernels make of the hardware's tanh
for table in (ACTIVATIONS, SLOPES):
    table |= {fast: table[exact] for exact, fast in FAST.items()}


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns x / sqrt(mean of x^2 over the last dim + RMS_EPS), times `weight` (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, x.shape[-1:], weight, RMS_EPS)


def rms_scale(x: Tensor) -> Tensor:
    """Returns 1 / sqrt(mean of x^2 over the last dim + RMS_EPS), [..., 1]."""
    return (x.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()


def rms_pull(x: Tensor, t: Tensor) -> Tensor:
    """Returns the derivative of `rms_norm` at x, transposed, applied to t."""
    scale = rms_scale(x)
    unit = x * scale
    return scale * (t - unit * (t * unit).mean(-1, keepdim=True))


def hidden(activation: str, pre: Sequence[Tensor]) -> Tensor:
    """Returns the hidden layer of an MLP from its inner products, [..., H].

    That is act(first), or act(second) * first where there is a gate (Shazeer 2020).
    """
    inner = ACTIVATIONS[activation](pre[-1])
    return inner * pre[0] if len(pre) == 2 else inner


def hidden_slopes(activation: str, pre: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the derivatives of `hidden` by each of `pre`."""
    slope = SLOPES[activation](pre[-1])
    return (slope,) if len(pre) == 1 else (ACTIVATIONS[activation](pre[1]), slope * pre[0])


def mlp_inner(form, weights, biases, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Returns the inner products of the hidden layer at rows z [B, D], each [B, H]: see rows/mlp.py."""
    x = z + u if form == "post" else rms_norm(z)
    return tuple(F.linear(x, weights[i], biases[i]) for i in range(len(weights)) if i != 1)


def mlp_outer(form, activation, weights, biases, u: Tensor, z: Tensor, pre: Sequence[Tensor]) -> Tensor:
    """Returns u + W2 h + b2 of these inner products, and z on top where `form` is "post"."""
    out = u + F.linear(hidden(activation, pre), weights[1], biases[1])
    return z + out if form == "post" else out


def mlp(form, activation, weights, biases, scale: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """Returns f of rows/mlp.py at z [..., D]."""
    out = mlp_outer(form, activation, weights, biases, u, z, mlp_inner(form, weights, biases, u, z))
    return rms_norm(out, scale) if form == "post" else scale * z + out


def gru(weights: Sequence[Tensor], inputs: Sequence[Tensor], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (r, s, c) of a gated unit at rows z [B, D]: see rows/gated.py."""
    wr, ws, wc = weights
    ur, us, uc = inputs
    r = torch.sigmoid(torch.addmm(ur, z, wr.mT))
    s = (1 + torch.sigmoid(torch.addmm(us, z, ws.mT))) / 2
    return r, s, torch.tanh(torch.addmm(uc, r * z, wc.mT))


def gru_slopes(z: Tensor, r: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Returns (1 - s, r, ks, kc, kr): see rows/gated.py."""
    return 1 - s, r, (c - z) * (2 * s - 1) * (1 - s), s * (1 - c * c), z * r * (1 - r)


def unit(g: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns (g / scale [B, N], scale [B, 1]): samples whose elements where the mask is True have norm 1, or 0."""
    scale = torch.linalg.vector_norm(g, torch.inf, dim=1, keepdim=True)
    scale.masked_fill_(scale == 0, 1.0)
    g = g / scale  # whose squares neither overflow nor underflow
    norm = torch.linalg.vector_norm(g if mask is None else torch.where(mask, g, 0.0), dim=1, keepdim=True)
    norm.masked_fill_(norm == 0, 1.0)
    return g / norm, scale * norm
