"""Random choices of a case, and what many kinds choose."""

import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritondeq import Anderson, Broyden, Implicit, Neumann, OneStep, Phantom, Picard, Unrolled

WIDE = torch.float64


class Draw(random.Random):
    """The random choices of one case."""

    def __init__(self, seed: int, index: int):
        super().__init__(f"{seed}/{index}")
        self.generator = torch.Generator().manual_seed(self.getrandbits(40))

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self.generator, dtype=WIDE)

    def chance(self, p: float) -> bool:
        return self.random() < p

    def contraction(self, n: int, q: float) -> Tensor:
        """Returns a matrix of 2-norm q."""
        w = self.randn(n, n)
        return w * (q / torch.linalg.matrix_norm(w, 2))

    def stored(self, x: Tensor) -> Tensor:
        """Returns x, now and then in another memory format."""
        form = self.choice(["plain", "plain", "turned", "sliced", "last"])
        if form == "turned" and x.ndim > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if form == "sliced":
            return torch.stack([x, x + 1], dim=-1)[..., 0]
        return x.contiguous(memory_format=torch.channels_last) if form == "last" and x.ndim == 4 else x


def in_thread(work: Callable[[], Any]) -> Any:
    """Returns what `work` returns in another thread; raises what it raises there."""
    made: list[Any] = []

    def run() -> None:
        try:
            made.append((work(), None))
        except Exception as error:
            made.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = made[0]
    if error is not None:
        raise error
    return value


def options(draw: Draw, dtype: torch.dtype) -> dict[str, Any]:
    """Returns solver, adjoint, tol and max_steps of a solve in `dtype`."""
    solvers = [Picard(), Picard(0.7), Anderson(3), Anderson(), Broyden(5), Broyden()]
    solver = draw.choice(solvers)
    linear = Implicit(solver=draw.choice(solvers), tol=draw.choice([None, 1e-4]), max_steps=300)
    approximate = [Neumann(draw.randint(1, 5)), Phantom(draw.randint(1, 5), draw.choice([0.5, 0.8, 1.0])), OneStep()]
    adjoints = [Implicit(), Implicit(), linear, draw.choice(approximate), draw.choice(approximate)]
    if isinstance(solver, Broyden):
        adjoints.append(Implicit(reuse=True))
    if isinstance(solver, Picard):
        adjoints.append(Unrolled(draw.randint(1, 9), checkpoint=draw.chance(0.3)))
    tol = draw.choice([1e-3, 1e-6, 1e-9] if dtype == WIDE else [1e-3, 1e-5])
    limit = draw.choice([300, 300, 300, 300, 4])
    return {"solver": solver, "adjoint": draw.choice(adjoints), "tol": tol, "max_steps": limit}


def precision(draw: Draw) -> tuple[torch.dtype, bool]:
    return draw.choice([(WIDE, False)] * 4 + [(torch.float32, False)] * 2 + [(torch.float32, True)])
