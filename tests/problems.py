"""Fixed points with known answers: f(z, *params), a start, and the solution as a function of the params, in float64.

The derivatives of `answer` are those of the fixed point to every order, so autograd through it is the truth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    name: str
    f: Callable[..., Tensor]
    z0: Tensor
    params: tuple[Tensor, ...]
    answer: Callable[..., Tensor]
    contractive: bool = True  # plain iteration gets there

    def __str__(self) -> str:
        return self.name


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _affine(name: str, a: Tensor, contractive: bool = True) -> Problem:
    n = a.shape[0]
    b = torch.linspace(-1, 2, 3 * n, dtype=torch.float64).reshape(3, n)

    def answer(a, b):
        return torch.linalg.solve(torch.eye(n, dtype=a.dtype) - a, b.T).T

    return Problem(
        name, lambda z, a, b: z @ a.T + b, torch.zeros(3, n, dtype=torch.float64), (a, b), answer, contractive
    )


def _scalar(name: str, f, start: float, params: tuple[float, ...], answer, contractive: bool = True) -> Problem:
    return Problem(name, f, _t(start).reshape(1, 1), tuple(_t(p) for p in params), answer, contractive)


def _kepler(e: Tensor, m: Tensor) -> Tensor:
    """E = M + e sin E by Newton's method, with the last steps under autograd: exact to second order."""
    x = m
    for _ in range(60):
        x = x - (x - e * x.sin() - m) / (1 - e * x.cos())
    return x.reshape(1, 1)


def _tanh_scalar(a: Tensor, b: Tensor) -> Tensor:
    z = b.tanh()
    for _ in range(80):
        z = z - (z - (a * z + b).tanh()) / (1 - a * (1 - (a * z + b).tanh() ** 2))
    return z.reshape(1, 1)


def _rotation(angle: float, rho: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return rho * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def _lyapunov() -> Problem:
    a = torch.tensor([[0.5, 0.3], [-0.2, 0.6]], dtype=torch.float64)
    q = torch.tensor([[2.0, 0.4], [0.4, 1.0]], dtype=torch.float64)

    def answer(a, q):
        return torch.linalg.solve(torch.eye(4, dtype=a.dtype) - torch.kron(a, a), q.reshape(4)).reshape(1, 2, 2)

    return Problem(
        "lyapunov", lambda z, a, q: a @ z @ a.T + q, torch.zeros(1, 2, 2, dtype=torch.float64), (a, q), answer
    )


PROBLEMS = [
    _affine("affine-symmetric", torch.tensor([[0.5, 0.2], [0.2, -0.3]], dtype=torch.float64)),
    _affine("affine-rotation", _rotation(1.0, 0.8)),
    _affine("affine-jordan", torch.tensor([[0.6, 1.0], [0.0, 0.6]], dtype=torch.float64)),
    _affine("affine-repelling", _rotation(2.0, 1.5), contractive=False),
    _scalar("tanh", lambda z, a, b: torch.tanh(a * z + b), 0, (0.6, 0.3), _tanh_scalar),
    _scalar("babylonian", lambda z, a: (z + a / z) / 2, 1, (2.0,), lambda a: a.sqrt().reshape(1, 1)),
    _scalar("logistic", lambda z, r: r * z * (1 - z), 0.4, (2.6,), lambda r: (1 - 1 / r).reshape(1, 1)),
    _scalar("kepler", lambda z, e, m: m + e * z.sin(), 1, (0.6, 1.0), _kepler),
    _scalar(
        "relu", lambda z, w, b: torch.relu(w * z + b), 0, (0.5, 0.7), lambda w, b: torch.relu(b / (1 - w)).reshape(1, 1)
    ),
    _lyapunov(),
]

# Values and derivatives to 15 digits from other sources, which check the closed forms above as well.
NUMBERS = {
    "tanh": (0.5636768941454511, {1: 1.1551360082896045}, {1: -3.7329238706515873}),
    "kepler": (1.5997485482275295, {1: 0.9829276224269272}, {1: -0.569552581942502}),
    "babylonian": (math.sqrt(2), {0: 1 / (2 * math.sqrt(2))}, {0: -1 / (4 * 2**1.5)}),
    "logistic": (1 - 1 / 2.6, {0: 1 / 2.6**2}, {0: -2 / 2.6**3}),
}


def tanh_problem(rows: int, width: int, gain: float, dtype=torch.float32, seed: int = 0, scale: float = 1.0):
    """(f, w, u) of z = tanh(W z + u), W with spectral norm `gain` times its usual 2; `scale` rescales the state."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(width, width, generator=gen, dtype=torch.float64) * gain / math.sqrt(width)
    u = torch.randn(rows, width, generator=gen, dtype=torch.float64)
    w, u = w.to(dtype), u.to(dtype)
    return (lambda z: scale * torch.tanh(torch.addmm(u, z / scale, w.T))), w, u
