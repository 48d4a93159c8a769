"""The public names as a typed program uses them. mypy checks this file against an installed wheel; it is not run."""

from torch import Tensor, nn
from typing_extensions import assert_type

import tritondeq as tdeq


def layers(x: Tensor) -> None:
    layer = tdeq.DEQ(
        tdeq.cells.Affine(8, contraction=0.9), solver=tdeq.Anderson(memory=3), adjoint=tdeq.Phantom(5, 0.8), tol=1e-3
    )
    assert_type(layer.solve(x), tdeq.Solution)
    assert_type(layer.last, tdeq.Solution | None)
    assert_type(layer.unrolled(4), tdeq.DEQ)
    assert_type(layer.unrolled(None), tdeq.DEQ)
    _, cache = layer.step(x)
    layer.step(x, cache)


def solutions(x: Tensor) -> None:
    solution = tdeq.fixed_point(lambda z: 0.5 * z + x, x, solver=tdeq.Picard(damping=0.5), adjoint=tdeq.Implicit())
    assert_type(solution.status, Tensor)
    assert_type(solution.steps, Tensor)
    assert_type(solution.residual, Tensor)
    assert_type(solution.converged, Tensor)
    assert_type(solution.trace, Tensor | None)
    assert_type(solution.adjoint, tdeq.Solution | None)
    assert_type(tdeq.Status(0).sentence, str)
    solution.raise_if_failed()


def solvers_and_adjoints(cell: nn.Module) -> list[tdeq.DEQ]:
    solvers = [tdeq.Picard(), tdeq.Anderson(), tdeq.Broyden(), tdeq.PeacemanRachford(), tdeq.ForwardBackward()]
    adjoints = [tdeq.Implicit(), tdeq.Neumann(4), tdeq.Phantom(5, 0.8), tdeq.OneStep(), tdeq.Unrolled(4)]
    return [tdeq.DEQ(cell, solver=s, adjoint=a) for s in solvers for a in adjoints]


def every_cell() -> list[nn.Module]:
    cells = tdeq.cells
    return [
        *(cells.Affine(8), cells.Monotone(8), cells.MLP(8), cells.Gated(8), cells.Transformer(8, heads=2)),
        *(cells.Conv(8), cells.MultiScale((8, 16)), tdeq.FixedDropout(0.1)),
    ]


class Halves(tdeq.cells.Cell):
    """A cell of a user's."""

    def inject(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return 0.5 * z + injection


def inspection(layer: tdeq.DEQ, x: Tensor, z: Tensor) -> None:
    assert_type(tdeq.jacobian_penalty(layer, z, x), Tensor)
    assert_type(tdeq.spectral_radius(layer, z, x), Tensor)
    assert_type(tdeq.Watch(layer, every=10).step(), dict[str, float] | None)
    print(tdeq.diagnose(layer, x))
    tdeq.plot.residuals(layer.solve(x), tol=1e-3)


def stacks(blocks: nn.ModuleList) -> None:
    stack = tdeq.to_equilibrium(blocks, prelude=1, coda=1)
    assert isinstance(stack, nn.Module)


def backends(layer: tdeq.DEQ, x: Tensor) -> None:
    tdeq.set_backend("auto")
    with tdeq.backend("torch"):
        layer(x)
    assert_type(tdeq.__version__, str)
