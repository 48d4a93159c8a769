"""The tables of NOTES.md behind the solvers' options: `python -m tritondeq.bench.choices`.

Counts, made by the torch backend in one thread; z = act(W z + u).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import tritondeq as tdeq

from ..kernels import rules
from .steps import problem

ACTIVATIONS = (torch.tanh, torch.relu, torch.nn.functional.gelu, torch.sin)


def safeguard(factors=(2.0, 10.0, 100.0, math.inf), seeds: int = 3) -> list[list[str]]:
    """Share of samples at 1e-4 within 100 evaluations; ||W|| = gain, 16 samples a problem."""
    cases = [(tdeq.Anderson(), 0.9, 16), (tdeq.Anderson(), 3.0, 2), (tdeq.Anderson(), 6.0, 16)]
    cases += [(tdeq.Broyden(), 0.9, 16), (tdeq.Broyden(), 3.0, 16), (tdeq.Broyden(memory=40), 3.0, 16)]
    cases += [(tdeq.Broyden(), 6.0, 2)]
    rows = [["solver", "gain", "width", *(f"{factor:g}" for factor in factors)]]
    for solver, gain, width in cases:
        shares = [_share(solver, gain, width, factor, seeds) for factor in factors]
        name = f"{type(solver).__name__}({solver.memory})"
        rows.append([name, f"{gain:g}", str(width), *(f"{100 * share:.0f} %" for share in shares)])
    return rows


def _share(solver: tdeq.Anderson | tdeq.Broyden, gain: float, width: int, factor: float, seeds: int) -> float:
    kept, rules.SAFEGUARD = rules.SAFEGUARD, factor
    reached = []
    try:
        for act in ACTIVATIONS:
            for seed in range(seeds):
                w, u = _weights(seed, gain, width, 16)
                solution = tdeq.fixed_point(
                    _map(act, w, u), torch.zeros_like(u), solver=solver, tol=1e-4, max_steps=100
                )
                reached.append(solution.converged)
    finally:
        rules.SAFEGUARD = kept
    return torch.cat(reached).double().mean().item()


def _weights(seed: int, gain: float, width: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(width, width, generator=generator)
    return w * gain / torch.linalg.matrix_norm(w, 2), torch.randn(rows, width, generator=generator)


def _map(act: Callable[[Tensor], Tensor], w: Tensor, u: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: act(u + z @ w.T)


def reuse(gains=(0.5, 0.9, 1.2, 1.5), memories=(10, 40), seeds: int = 12) -> list[list[str]]:
    """Mean vector-Jacobian products until the adjoint is at 1e-3; width 64, W normal of spectral radius about gain."""
    rows = [["gain", "memory", "fresh", "reuse=True"]]
    for gain in gains:
        for memory in memories:
            means = [sum(_products(s, gain, memory, again) for s in range(seeds)) / seeds for again in (False, True)]
            rows.append([f"{gain:g}", str(memory), *(f"{mean:.1f}" for mean in means)])
    return rows


def _products(seed: int, gain: float, memory: int, again: bool) -> int:
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(64, 64, generator=generator, dtype=torch.float64) * gain / 8).requires_grad_()
    u = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    adjoint = tdeq.Implicit(max_steps=300, reuse=again)
    options = {"solver": tdeq.Broyden(memory=memory), "adjoint": adjoint, "tol": 1e-3, "max_steps": 300}
    solution = tdeq.fixed_point(_map(torch.tanh, w, u), torch.zeros_like(u), **options)
    (solution.value * torch.randn(1, 64, generator=generator, dtype=torch.float64)).sum().backward()
    return int(solution.adjoint.steps)


def half(gains=(0.5, 0.9, 1.2, 1.5), tols=(1e-3, 1e-5)) -> list[list[str]]:
    """Evaluations of Anderson(5), mean / most of 256 samples of width 128, z = tanh(W z + u)."""
    rows = [["gain", "tol", "float32", "half=True"]]
    for gain in gains:
        for tol in tols:
            f, z0 = problem(256, 128, gain, torch.device("cpu"))
            solvers = tdeq.Anderson(), tdeq.Anderson(half=True)
            steps = [tdeq.fixed_point(f, z0, solver=s, tol=tol, max_steps=300).steps for s in solvers]
            rows.append([f"{gain:g}", f"{tol:g}", *(f"{s.double().mean():.2f} / {s.max()}" for s in steps)])
    return rows


def main() -> None:
    torch.set_num_threads(1)
    for table in (safeguard, reuse, half):
        print(f"\n{table.__name__}: {table.__doc__}\n")
        head, *rows = table()
        for row in (head, ["---:"] * len(head), *rows):
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    with tdeq.backend("torch"):
        main()
