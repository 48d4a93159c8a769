"""Whole solves and training steps beside the rivals, and their time against the number of steps."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import tritondeq as tdeq

from . import machine, measure, rivals, shapes
from .measure import Record

MAX_STEPS = 100
COUNTED = 2e-5  # tolerance where steps are counted: two bf16 terms of a weight reach it, and the problem does not
DEPTHS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Case:
    """A solve of a cell of `width` features for `rows` rows.

    Attributes:
        kind: "solve", the forward under no_grad; "train", forward, backward and weight gradients; "depth", a solve that
            is one point of the curve of time against steps.
        rows: Rows, tokens or pixels.
        width: Features.
        tol: Relative residual that all contestants have to reach.
        low: bf16: our operands, and the rivals' cell, input and state.
        compiled: Also time the explicit net by torch.compile, which takes a quarter of a minute; on CUDA only.
        every: Time every rival that torch.compile can compile.
        steps: The number of steps that all contestants take, or None to stop by `tol`; of an affine cell.
        cell: A name in shapes.CELLS.
    """

    kind: str
    rows: int
    width: int
    tol: float = 1e-4
    low: bool = False
    compiled: bool = False
    every: bool = False
    steps: int | None = None
    cell: str = "affine"

    def __str__(self) -> str:
        steps = f" {self.steps} steps" if self.steps else ""
        return f"{self.shape} {'train' if self.train else 'forward'}{steps}"

    @property
    def train(self) -> bool:
        """Whether the backward pass is timed too."""
        return self.kind == "train"

    @property
    def shape(self) -> shapes.Shape:
        """The cell and its size."""
        return shapes.Shape(self.cell, self.width, self.rows, self.low)


def cases(suite: str, cuda: bool) -> list[Case]:
    """Returns what a suite ("tiny", "quick" or "full") measures, what matters most first."""
    if suite == "tiny":
        made = [Case("solve", 8, 16), Case("train", 8, 16), Case("solve", 8, 16, cell="mlp")]
        return made + [Case("depth", 8, 16, steps=steps) for steps in (2, 4)]
    sizes = [(1, 64), (64, 128), (256, 256)]
    if suite == "full":
        sizes = [(rows, width) for width in (64, 128, 256) for rows in (1, 64, 1024)]
        sizes += [(8192, width) for width in (64, 128, 256)] if cuda else []
    whole = cuda and suite == "full"
    heavy = {(1, 128), (64, 256), (8192, 128), (8192, 256)} if whole else set()
    trained = {(64, 256), (8192, 256)} & heavy
    made = []
    if whole:
        made += [Case("solve", 1 << 20, width, 1e-2, low=True, compiled=True) for width in (128, 256)]
    made += [Case("solve", *size, compiled=size in heavy, every=whole and size == (8192, 128)) for size in sizes]
    made += [Case("solve", 8192, 256, 1e-2, low=True)] if whole else []
    made += [Case("solve", rows, width, steps=20) for width in (256, 1024) for rows in ((1, 64) if cuda else (1,))]
    made += [Case("train", *size, compiled=size in trained, every=whole and size == (8192, 256)) for size in sizes]
    rows = 4096 if cuda else 256
    made += [Case("solve", rows, 128, 1e-2, low=cuda, compiled=whole, cell=cell) for cell in ("mlp", "gated")]
    if whole:
        made += [Case("solve", 4096, width, compiled=width == 1024) for width in (1024, 512, 2048)]
        made += [Case("solve", 65536, 1024, compiled=True), Case("solve", 4096, 1024, 1e-2, low=True, compiled=True)]
    return made + [Case("depth", *((1024, 128) if cuda else (64, 128)), steps=steps) for steps in DEPTHS]


def asked(these: list[shapes.Shape], compiled: bool) -> list[Case]:
    """Returns a solve and a training step of each shape."""
    return [
        Case(kind, s.rows, s.features, 1e-2 if s.low else 1e-4, s.low, compiled, compiled, cell=s.cell)
        for s in these
        for kind in ("solve", "train")
    ]


class Setup:
    """A case on a device: our layer, the cell and input of the rivals, and the contestants as calls.

    Attributes:
        route, why: What solved our layer (the name of a `Route`), and why.
        steps: Evaluations that our slowest sample took.
        mean: Evaluations that a sample took on average.
        blocks: Of the explicit nets: as many as `steps`, or as plain iteration takes where our solver is another.
        flops: Of all evaluations of the cell that our samples needed; forward only.
        nbytes: Least traffic of a forward solve: x or its injection once, z once, weights once.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        torch.manual_seed(0)
        self.tol, self.most = (COUNTED, case.steps) if case.steps else (case.tol, MAX_STEPS)
        shape, rowwise = case.shape, case.cell in shapes.ROWWISE
        cell = shape.make(device)
        self.x = torch.randn(shape.dims, device=device)
        if case.steps:
            slow(cell, self.x)
        self.cell = shapes.Shape(case.cell, case.width, case.rows).make(device)  # the rivals'
        self.cell.load_state_dict(cell.state_dict())
        if case.low:
            self.cell.bfloat16()
        self.there = self.x.bfloat16() if case.low else self.x  # their input
        self.x = self.x if rowwise else self.there
        self.layer = tdeq.DEQ(cell, tol=self.tol, max_steps=self.most)
        self.anderson = tdeq.DEQ(cell, solver=tdeq.Anderson(memory=4), tol=self.tol, max_steps=self.most)
        with torch.no_grad():
            self.values = [self.layer(self.x)]
            last = self.layer.last
            if case.steps:  # a solve may return what it evaluated last, or what came of it
                self.values = [rivals.Tied(cell, steps)(self.x) for steps in (case.steps - 1, case.steps)]
            with FlopCounterMode(display=False) as counter:
                self.cell(torch.zeros_like(self.there), self.cell.inject(self.there))
            with FlopCounterMode(display=False) as inject:
                self.cell.inject(self.there)
        flops = counter.get_total_flops() - inject.get_total_flops()
        self.steps, self.residual = int(last.steps.max()), float(last.residual.max())
        self.route, self.why = last.route.name, last.why
        self.mean = float(last.steps.double().mean())
        self.blocks = self.steps if isinstance(self.layer.solver, tdeq.Picard) else self._plain_steps(cell)
        self.flops = flops * self.mean
        self.nbytes = 4.0 * (2 * self.x.numel() + flops / (2 * shape.positions))

    @torch.no_grad()
    def _plain_steps(self, cell: nn.Module) -> int:
        layer = tdeq.DEQ(cell, solver=tdeq.Picard(), tol=self.tol, max_steps=self.most)
        layer(self.x)
        return int(layer.last.steps.max())

    def solve(self, solver: Callable, cell: nn.Module) -> Callable[[], tuple[Tensor, int]]:
        """Returns a call that solves for the cell's fixed point by a function of `rivals`."""

        def call():
            with torch.no_grad(), weights_once(self.cell):
                injection = self.cell.inject(self.there)
                z0 = torch.zeros_like(self.there)
                return solver(lambda z: cell(z, injection), z0, self.tol, self.most)

        return call

    def contestants(self, compiled: bool) -> dict[str, Callable[[], Any]]:
        """Returns calls by name; rivals of a forward return (z, evaluations), all others (z, None)."""
        return self._training(compiled) if self.case.train else self._forward(compiled)

    def nets(self, compiled: bool) -> dict[str, nn.Module]:
        """Returns the explicit nets, with `blocks` blocks."""
        dtype = self.there.dtype

        def block():
            return shapes.Shape(self.case.cell, self.case.width, self.case.rows).make(self.device).to(dtype)

        skip = self.case.cell in ("affine", "monotone")
        nets = {
            "tied loop": rivals.Tied(self.cell, self.blocks),
            "untied stack": rivals.Stack(block, self.blocks, skip),
        }
        if compiled:
            chosen = nets if self.case.every else ["untied stack" if self.case.train else "tied loop"]
            nets |= {f"compiled {name}": rivals.compiled(nets[name], graphs=True) for name in chosen}
        return nets

    def _forward(self, compiled: bool) -> dict[str, Callable[[], Any]]:
        def ours(layer):
            with torch.no_grad():
                return layer(self.x), None

        calls = {"tritondeq": lambda: ours(self.layer)}
        if self.case.steps is None and not self.case.low:
            calls["tritondeq Anderson"] = lambda: ours(self.anderson)
        for name, solver in rivals.solvers().items():
            if not (self.case.low or self.case.steps) or name in ("eager loop", "torchdeq Picard"):
                calls[name] = self.solve(solver, self.cell)
        if compiled and self.case.every:
            cell = rivals.compiled(self.cell, graphs=False)
            calls["compiled cell in a loop"] = self.solve(rivals.eager_picard, cell)

        def run(net):
            with torch.no_grad(), weights_once(self.cell):
                return net(self.there), self.blocks

        return calls | {name: lambda net=net: run(net) for name, net in self.nets(compiled).items()}

    def _training(self, compiled: bool) -> dict[str, Callable[[], Any]]:
        def step(net, x):
            net.zero_grad()
            with weights_once(self.cell):
                z = net(x)
                z.float().square().mean().backward()
            return z.detach(), None

        calls = {"tritondeq": lambda: step(self.layer, self.x)}
        if machine.installed("torchdeq"):
            theirs = rivals.TorchDEQ(self.cell, "fixed_point_iter", self.tol, self.most)
            calls["torchdeq Picard"] = lambda: step(theirs, self.there)
        return calls | {name: lambda net=net: step(net, self.there) for name, net in self.nets(compiled).items()}

    def wrong(self, name: str, outcome: tuple[Tensor, int | None]) -> str | None:
        """Returns why the contestant's result is not the same fixed point, or None.

        The cell contracts by 0.9 at most, so a residual r leaves an error of at most 10 r; bf16 states have a floor.
        A stack of untied blocks has another answer; only its shape is compared. Where steps are counted no contestant
        is at the fixed point: all have to be where that many steps lead, or one less.
        """
        z = outcome[0]
        if z.shape != self.x.shape or not bool(torch.isfinite(z).all()):
            return f"{name}: not a finite {tuple(self.x.shape)}"
        if "untied" in name:
            return None
        axis = -1 if self.case.cell in shapes.ROWWISE else tuple(range(1, z.ndim))
        norm = torch.linalg.vector_norm
        got, values = z.float(), [value.float() for value in self.values]
        error = min(float((norm(got - value, dim=axis) / norm(value, dim=axis)).max()) for value in values)
        most = 20 * max(self.tol, 2.0**-8 if self.case.low else 0.0)
        if not error <= most:
            return f"{name}: differs from ours by {error:.1e} of a sample's norm, allowed {most:.1e}"
        if self.case.steps or z.dtype != self.there.dtype:
            return None
        with torch.no_grad():
            f = self.cell(z, self.cell.inject(self.there)).float()
        r = float((norm(f - got, dim=axis) / norm(f, dim=axis)).max())
        if not r <= 1.05 * self.tol + (2.0**-6 if self.case.low else 1e-6):
            return f"{name}: residual {r:.1e} at tolerance {self.tol:.0e}"
        return None


@torch.no_grad()
def slow(cell: nn.Module, x: Tensor) -> None:
    """Makes an affine cell on these inputs nearly linear, with modes that all shrink by 0.8 to 0.9 a step.

    Residuals fall at every step, and by no more.
    """
    q = torch.linalg.qr(torch.randn(cell.weight.shape, dtype=torch.float64))[0]
    cell.weight.copy_(q * torch.linspace(0.8, 0.9, len(q), dtype=q.dtype) @ q.mT)
    x *= 0.01
    if cell.input.bias is not None:
        cell.input.bias.zero_()


def weights_once(cell: nn.Module):
    """Returns a context that computes parametrized weights once, as ours does, and not once an evaluation."""
    named = any(parametrize.is_parametrized(module) for module in cell.modules())
    return parametrize.cached() if named else contextlib.nullcontext()


def run(
    case: Case,
    device: torch.device,
    roof: dict[str, float],
    seconds: float,
    compiles: Callable[[], bool],
    lose: Callable[[str], None],
) -> Iterator[Record]:
    """Checks every contestant of a case, then times all if all are right; the record of a wrong one has `wrong`.

    Args:
        case: What is solved.
        device: Where.
        roof: The limits that machine.roofs measured.
        seconds: Of measuring, for each contestant.
        compiles: As in measure.attempt.
        lose: As in measure.attempt.
    """
    setup = Setup(case, device)
    calls = setup.contestants(case.compiled and device.type == "cuda")
    outcomes, faults = measure.attempt(calls, str(case), compiles, lose)
    faults |= {name: setup.wrong(name, outcome) for name, outcome in outcomes.items()}
    evaluations = {name: outcome[1] for name, outcome in outcomes.items()}
    outcomes.clear()
    if case.steps is None and setup.residual > case.tol:
        faults["tritondeq"] = f"tritondeq: residual {setup.residual:.1e} at tolerance {case.tol:.0e}"
    if case.steps and setup.mean != case.steps:
        faults["tritondeq"] = f"tritondeq: {setup.mean:.1f} steps, {case.steps} were asked for"
    if case.train and not any(faults.values()):
        faults |= wrong_gradients(setup, calls)
    head = {"kind": case.kind, "case": str(case), "rows": case.shape.positions, "width": case.width, "tol": setup.tol}
    head |= {"cell": case.cell, "low": case.low, "residual": setup.residual, "flops": setup.flops}
    least = machine.limit(setup.flops, setup.nbytes, roof, "bf16" if device.type == "cuda" else "fp32")
    for record in measure.compare(calls, faults, device, seconds):
        ours = record["contestant"] == "tritondeq"
        record = head | record | {"bytes": setup.nbytes}
        record["steps"] = setup.steps if ours else evaluations.get(record["contestant"])
        if ours:
            record |= {"route": setup.route, "why": setup.why, "mean_steps": setup.mean}
        if "seconds" in record and not case.train:
            record["of_limit"] = least / record["seconds"] if least else None
            record["device_seconds"] = measure.replayed(calls["tritondeq"], device) if ours else None
        yield record


def wrong_gradients(setup: Setup, calls: dict[str, Callable]) -> dict[str, str | None]:
    """Compares the gradients of the nets that share our weights with ours, at the tolerance of the solves."""

    def gradient(name, cell):
        cell.zero_grad()
        calls[name]()
        return torch.cat([p.grad.float().flatten() for p in cell.parameters() if p.grad is not None])

    ours = gradient("tritondeq", setup.layer.cell)
    faults = {}
    for name in ("torchdeq Picard", "tied loop"):
        if name in calls:
            error = float((gradient(name, setup.cell) - ours).norm() / ours.norm())
            most = 200 * max(setup.tol, 2.0**-8 if setup.case.low else 0.0)
            faults[name] = f"{name}: gradient differs from ours by {error:.1e}, allowed {most:.1e}"
            faults[name] = faults[name] if not error <= most else None
    return faults
