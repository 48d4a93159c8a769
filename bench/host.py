"""Host time: what a call of a small layer costs beside its evaluations, which is what small nets wait for.

A layer over tanh(Linear(64)) on 4 rows makes six evaluations, and its gradient six products; beside it are as many by
hand, and torchdeq. `python -m tritondeq.bench.host` prints the table alone, by the torch backend; with `--compiled` it
also has the layer with a compiled cell and the explicit net of six evaluations by torch.compile, which take a minute
and a C++ compiler, and the operations of a forward solve without what decides and watches over them.
"""

import sys
import timeit
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import tritondeq as tdeq
from tritondeq.kernels.rules import EPS
from tritondeq.toolbox import one_thread

from . import measure, rivals
from .machine import installed
from .measure import Record

ROWS, WIDTH, EVALUATIONS = 4, 64, 6
TOL = 1e-9  # of torchdeq, never reached
WIDE = 2048  # features of a construction

WORK = ("forward", "training step, OneStep", "training step, Implicit")


class Loop(nn.Module):
    """The explicit net of six evaluations, which by torch.compile is what a user has who wants no solver."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        """Returns the last state, [B, D]."""
        z = torch.zeros_like(x)
        for _ in range(EVALUATIONS):
            z = self.cell(z, x)
        return z


class Operations(Loop):
    """The operations of a solve alone, in a straight line: below their price no solver in Python can go."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the last state, [B, D]."""
        z, best = torch.zeros_like(x), numpy.float32(numpy.inf)
        for _ in range(EVALUATIONS):
            y = self.cell(z, x)
            r, s = (torch.linalg.vector_norm(t, 2, 1).numpy() for t in (y - z, y))
            residual = r / numpy.maximum(s, EPS)
            if not numpy.count_nonzero(residual < best):
                break
            best, z = residual, y.clone()
        return z


class Cell(nn.Module):
    """z = tanh(W z + b + x), as a user writes it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(self.linear.weight, std=0.3 / WIDTH**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Returns f(z), [B, D]."""
        return torch.tanh(self.linear(z) + x)


def layer(exact: bool, cell: nn.Module, x: Tensor) -> tdeq.DEQ:
    """Returns a layer that converges at the sixth evaluation and, where it is exact, the sixth product of `loss`."""
    found = tdeq.DEQ(cell, adjoint=tdeq.OneStep(), tol=1e-30, max_steps=EVALUATIONS, trace=True)
    found(x)
    *_, before, last = found.last.trace.amax(1).tolist()
    tol = (before * last) ** 0.5
    if not exact:
        return tdeq.DEQ(cell, adjoint=tdeq.OneStep(), tol=tol)
    residuals = []
    for products in (EVALUATIONS - 1, EVALUATIONS):
        short = tdeq.DEQ(cell, adjoint=tdeq.Implicit(tol=1e-30, max_steps=products), tol=tol)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that they do not suffice
            loss(short(x)).backward()
        residuals.append(short.last.adjoint.residual.max().item())
    return tdeq.DEQ(cell, adjoint=tdeq.Implicit(tol=(residuals[0] * residuals[1]) ** 0.5), tol=tol)


def loss(y: Tensor) -> Tensor:
    """Returns y^2 / 2, whose gradient is y."""
    return (y * y).sum() / 2


def by_hand(cell: nn.Module, x: Tensor, products: int) -> None:
    """Makes the evaluations and products of a training step, and none of what watches over them."""
    with torch.no_grad():
        z = Loop(cell)(x)
    z = z.requires_grad_()
    y = cell(z, x)
    loss(y)
    g = u = y.detach()  # the gradient of the loss
    for _ in range(products):
        u = torch.autograd.grad(y, z, u, retain_graph=True)[0] + g
    y.backward(u)


def contestants(work: str, device: torch.device, compiled: bool = False) -> dict[str, Callable[[], Any]]:
    """Returns the calls by name; "by hand" is what the others are measured by."""
    torch.manual_seed(0)
    cell, x = Cell().to(device), torch.randn(ROWS, WIDTH, device=device)
    exact = work == WORK[2]
    ours = layer(exact, cell, x)
    layers: dict[str, Any] = {"tritondeq": ours}
    if installed("torchdeq"):
        layers["torchdeq"] = torchdeq_layer(exact, cell)
    if compiled:
        layers["tritondeq, compile=True"] = tdeq.DEQ(cell, adjoint=ours.adjoint, tol=ours.tol, compile=True)
        layers["compiled loop"] = rivals.compiled(Loop(cell), graphs=False)
    if work == WORK[0]:
        alone = {"operations alone": Operations(cell)} if compiled and device.type == "cpu" else {}
        nets = {"by hand": Loop(cell)} | layers | alone
        return {name: torch.no_grad()(partial(net, x)) for name, net in nets.items()}
    calls = {name: lambda f=f: loss(f(x)).backward() for name, f in layers.items()}
    return {"by hand": partial(by_hand, cell, x, EVALUATIONS if exact else 0)} | calls


def torchdeq_layer(exact: bool, cell: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns torchdeq's layer, which makes as many evaluations and products."""
    from torchdeq import get_deq

    options = {"f_solver": "fixed_point_iter", "f_max_iter": EVALUATIONS, "f_tol": TOL}
    options |= {"ift": True, "b_solver": "fixed_point_iter", "b_max_iter": EVALUATIONS, "b_tol": TOL} if exact else {}
    deq = get_deq(**options, **({} if exact else {"grad": 1}))
    return lambda x: deq(lambda z: cell(z, x), torch.zeros_like(x))[0][-1]


def construction(width: int) -> dict[str, Callable[[], Any]]:
    """Returns calls that construct cells of this width, by name; "by hand" is nn.Linear."""
    cells = {name: getattr(tdeq.cells, name) for name in ("Affine", "Gated", "MLP", "Monotone")}
    made: dict[str, Callable[[], Any]] = {"by hand": partial(nn.Linear, width, width)}
    made |= {name: partial(cell, width) for name, cell in cells.items()}
    return made | {"Affine, bounded": partial(tdeq.cells.Affine, width, contraction=0.9)}


def counts(call: Callable[[], Any]) -> Record:
    """Returns the operations of a call, as measure.AtenOps counts them, and the calls of Python functions in it."""
    call()
    with measure.AtenOps() as ops:
        call()
    frames = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal frames
        frames += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {"ops": ops.total, "frames": frames}


def run(device: torch.device, seconds: float, width: int = WIDE, compiled: bool = False) -> Iterator[Record]:
    """Yields a record for each contestant of each work; `over_hand` is the ratio of medians to what is done by hand.

    Args:
        device: Where layers are called; cells are constructed on the CPU, three times each.
        seconds: Of measuring, for each layer.
        width: Of the cells that are constructed.
        compiled: Whether to measure the compiled loop too.
    """
    for work in WORK:
        calls = contestants(work, device, compiled)
        counted = {name: counts(call) for name, call in calls.items()}
        yield from _records(work, measure.clock(calls, device, seconds), counted)
    timed = {}
    for name, make in construction(width).items():
        times = sorted(timeit.repeat(make, number=1, repeat=3))
        timed[name] = measure.Timing(times[1], times[0], False)
    yield from _records(f"construction, {width} features", timed, {})


def _records(work: str, timed: dict[str, measure.Timing], counted: dict[str, Record]) -> Iterator[Record]:
    for name, timing in timed.items():
        record = {"kind": "host", "case": work, "rows": ROWS, "width": WIDTH, "contestant": name, "wrong": None}
        record |= counted.get(name, {"ops": None, "frames": None})
        yield record | measure.times(timing) | {"over_hand": timing.median / timed["by hand"].median}


def table(records: list[Record]) -> list[list[str]]:
    """Returns the rows of a table, the head first."""
    rows = [["what", "by", "median", "over by hand", "torch operations", "Python calls"]]
    for r in records:
        each = [str(r[name] or "") for name in ("ops", "frames")]
        rows.append([r["case"], r["contestant"], f"{r['median'] * 1e6:.0f} us", f"{r['over_hand']:.2f}", *each])
    return rows


def main() -> None:
    """Prints the table, measured on the CPU."""
    from .report import markdown

    with one_thread(), tdeq.backend("torch"):
        print(markdown(table(list(run(torch.device("cpu"), 1.0, compiled="--compiled" in sys.argv)))))


if __name__ == "__main__":
    main()
