"""Whole solves and training steps beside the rivals (G1 to G5, G11), and their time against the number of steps."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import tritondeq as tdeq

from . import measure, rivals, shapes

MAX_STEPS = 100
COUNTED = 2e-5  # tolerance where steps are counted: two bf16 terms of a weight reach it, and the problem does not
DEPTHS = (4, 8, 16, 32, 64)
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A solve of a cell of `width` features for `rows` rows.

    Attributes:
        goal: Its name among the targets, "depth" for time against steps, "shape" for one that was asked for.
        tol: Relative residual for everybody.
        low: bf16: our operands, and the rivals' cell, input and state.
        train: Time forward, backward and weight gradients; else the forward under no_grad.
        compiled: Also time what a target speaks of by torch.compile, which takes a quarter of a minute; on CUDA only.
        every: And the other rivals by torch.compile.
        steps: Take exactly as many steps, or stop by `tol` if None; of an affine cell.
        cell: A name in shapes.CELLS.
    """

    goal: str
    rows: int
    width: int
    tol: float = 1e-4
    low: bool = False
    train: bool = False
    compiled: bool = False
    every: bool = False
    steps: int | None = None
    cell: str = "affine"

    def __str__(self) -> str:
        name = "" if self.cell == "affine" else shapes.CELLS[self.cell][0]
        what = "train" if self.train else "forward"
        steps = f"{self.steps} steps" if self.steps else ""
        words = ["" if self.goal == "shape" else self.goal, name, f"{self.rows}x{self.width}", shapes.DTYPES[self.low]]
        return " ".join(filter(None, [*words, what, steps]))

    @property
    def shape(self) -> shapes.Shape:
        return shapes.Shape(self.cell, self.width, self.rows, self.low)


def cases(suite: str, cuda: bool) -> list[Case]:
    """What a suite ("tiny", "quick" or "full") measures, the most telling first."""
    if suite == "tiny":
        found = [Case("G1", 8, 16), Case("G2", 8, 16, train=True), Case("G11", 8, 16, cell="mlp")]
        return found + [Case("depth", 8, 16, steps=steps) for steps in (2, 4)]
    sizes = [(1, 64), (64, 128), (256, 256)]
    if suite == "full":
        sizes = [(1, 64), (64, 64), (1024, 64), (1, 128), (64, 128), (1024, 128), (1, 256), (64, 256), (1024, 256)]
        sizes += [(8192, width) for width in (64, 128, 256)] if cuda else []
    whole = cuda and suite == "full"
    heavy = {(1, 128), (64, 256), (8192, 128), (8192, 256)} if whole else set()
    found = []
    if whole:
        found += [Case("G3", 1 << 20, width, 1e-2, low=True, compiled=True) for width in (128, 256)]
    every = {(8192, 128)} if whole else set()
    found += [Case("G1", *size, compiled=size in heavy, every=size in every) for size in sizes]
    found += [Case("G1", 8192, 256, 1e-2, low=True)] if whole else []
    found += [Case("G5", rows, width, steps=20) for width in (256, 1024) for rows in ((1, 64) if cuda else (1,))]
    trained = heavy - {(1, 128), (8192, 128)}
    found += [Case("G2", *s, train=True, compiled=s in trained, every=s == (8192, 256)) for s in sizes]
    rows = 4096 if cuda else 256
    found += [Case("G11", rows, 128, 1e-2, low=cuda, compiled=whole, cell=cell) for cell in ("mlp", "gated")]
    if whole:
        found += [Case("G4", 4096, width, compiled=width == 1024) for width in (1024, 512, 2048)]
        found += [Case("G4", 65536, 1024, compiled=True), Case("G4", 4096, 1024, 1e-2, low=True, compiled=True)]
    found += [Case("depth", *((1024, 128) if cuda else (64, 128)), steps=steps) for steps in DEPTHS]
    return found


def asked(these: list[shapes.Shape], compiled: bool) -> list[Case]:
    """A solve and a training step of each shape."""
    found = []
    for shape, train in ((shape, train) for shape in these for train in (False, True)):
        goal = goal_of(shape, train)
        tol = 1e-2 if shape.low else 1e-4
        case = Case(goal, shape.rows, shape.features, tol, shape.low, train, compiled, compiled, cell=shape.cell)
        found.append(case)
    return found


def goal_of(shape: shapes.Shape, train: bool) -> str:
    """The target that speaks of such a shape, or "shape"."""
    d, b = shape.features, shape.rows
    if shape.cell == "affine":
        if 64 <= d <= 256 and b <= 8192:
            return "G2" if train else "G1"
        if d in (128, 256) and b == 1 << 20 and not train:
            return "G3"
        if 512 <= d <= 2048 and 4096 <= b <= 65536 and not train:
            return "G4"
    return "G11" if shape.cell in ("mlp", "gated") and (b, d) == (4096, 128) and not train else "shape"


class Setup:
    """A case on a device: our layer, the cell and input of the rivals, and the contestants as calls.

    Attributes:
        steps, mean: Evaluations that our slowest sample took, and that all took on average.
        blocks: Of the explicit nets: as many as `steps`, or as plain iteration takes where our solver is another.
        flops: Of all evaluations of the cell, as our samples needed them; forward only.
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
        self.steps, self.residual, self.path = int(last.steps.max()), float(last.residual.max()), last.path
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
        def call():
            with torch.no_grad(), weights_once(self.cell):
                injection = self.cell.inject(self.there)
                z0 = torch.zeros_like(self.there)
                return solver(lambda z: cell(z, injection), z0, self.tol, self.most)

        return call

    def contestants(self, compiled: bool) -> dict[str, Callable[[], Any]]:
        """Calls by name; forward ones return (z, evaluations), training ones (z, None), ours (z, None)."""
        return self._training(compiled) if self.case.train else self._forward(compiled)

    def nets(self, compiled: bool) -> dict[str, nn.Module]:
        """The explicit ones, with `blocks` blocks."""
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
        if rivals.has_torchdeq():
            theirs = rivals.TorchDEQ(self.cell, "fixed_point_iter", self.tol, self.most)
            calls["torchdeq Picard"] = lambda: step(theirs, self.there)
        return calls | {name: lambda net=net: step(net, self.there) for name, net in self.nets(compiled).items()}

    def wrong(self, name: str, outcome: tuple[Tensor, int | None]) -> str | None:
        """Why the contestant's result is not the same fixed point, or None.

        The cell contracts by 0.9 at most, so a residual r leaves an error of at most 10 r; bf16 states have a floor of
        their own. A stack with weights of its own has another answer; only its size is compared. Where steps are
        counted nobody is at the fixed point: all have to be where that many steps lead, or one less.
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
    """Makes an affine cell on these inputs nearly linear, with modes that all gain a tenth to a fifth a step: residuals
    fall at every step, and by no more."""
    q = torch.linalg.qr(torch.randn(cell.weight.shape, dtype=torch.float64))[0]
    cell.weight.copy_(q * torch.linspace(0.8, 0.9, len(q), dtype=q.dtype) @ q.mT)
    x *= 0.01
    if cell.input.bias is not None:
        cell.input.bias.zero_()


def weights_once(cell: nn.Module):
    """Computes parametrized weights once, as ours does, and not once an evaluation."""
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
    """Checks every contestant of a case, then times all if all are right; a wrong one's record has `wrong` instead.
    `compiles` and `lose` as in measure.attempt."""
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
    green = not any(faults.values())
    timed = measure.clock(calls, device, seconds) if green else {}
    alone = measure.replayed(calls["tritondeq"], device) if green and not case.train else None
    least = measure.limit(setup.flops, setup.nbytes, roof, "bf16" if device.type == "cuda" else "fp32")
    for name in calls:
        ours = name == "tritondeq"
        record = {"goal": case.goal, "case": str(case), "contestant": name}
        record |= {"rows": case.shape.positions, "width": case.width}
        record |= {"cell": case.cell, "train": case.train, "low": case.low, "path": setup.path if ours else None}
        record |= {"steps": setup.steps if ours else evaluations.get(name), "tol": setup.tol}
        record |= {"mean_steps": setup.mean if ours else None}
        record |= {"residual": setup.residual, "flops": setup.flops, "bytes": setup.nbytes, "wrong": faults.get(name)}
        if name in timed:
            record |= {"seconds": timed[name].seconds, "median": timed[name].median, "least": timed[name].least}
            record["over_ours"] = timed[name].seconds / timed["tritondeq"].seconds
            record["of_limit"] = least / timed[name].seconds if least and not case.train else None
            record["device_seconds"] = alone if ours else None
        yield record


def wrong_gradients(setup: Setup, calls: dict[str, Callable]) -> dict[str, str | None]:
    """Compares the gradients of those that share our weights with ours; the tolerance of both is that of the solves."""

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
