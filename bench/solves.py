"""Whole solves and training steps of cells that treat rows one by one, beside the rivals (G1 to G5, G11)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tritondeq as tdeq

from . import measure, rivals

MAX_STEPS = 100
CELLS = {"Affine": tdeq.cells.Affine, "MLP": tdeq.cells.MLP, "Gated": tdeq.cells.Gated}
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A solve of a cell of `width` features for `rows` rows.

    Attributes:
        goal: Its name among the targets.
        tol: Relative residual for everybody.
        low: bf16: our operands, and the rivals' cell, input and state.
        train: Time forward, backward and weight gradients; else the forward under no_grad.
        compiled: Also time torch.compile, which takes half a minute a case; on CUDA only.
        steps: Take exactly as many steps, or stop by `tol` if None.
        cell: A name in CELLS.
    """

    goal: str
    rows: int
    width: int
    tol: float = 1e-4
    low: bool = False
    train: bool = False
    compiled: bool = False
    steps: int | None = None
    cell: str = "Affine"

    def __str__(self) -> str:
        name = "" if self.cell == "Affine" else f" {self.cell}"
        what = "train" if self.train else "forward"
        return f"{self.goal}{name} {self.rows}x{self.width} {'bf16' if self.low else 'fp32'} {what}"


def cases(suite: str, cuda: bool) -> list[Case]:
    """What a suite ("tiny", "quick" or "full") measures, the most telling first."""
    if suite == "tiny":
        return [Case("G1", 8, 16), Case("G2", 8, 16, train=True), Case("G11", 8, 16, cell="MLP")]
    shapes = [(1, 64), (64, 128), (256, 256)]
    if suite == "full":
        shapes = [(1, 64), (64, 64), (1024, 64), (1, 128), (64, 128), (1024, 128), (1, 256), (64, 256), (1024, 256)]
        shapes += [(8192, width) for width in (64, 128, 256)] if cuda else []
    heavy = {(1, 128), (1024, 128), (8192, 128), (8192, 256)} if suite == "full" else set()
    found = []
    if cuda and suite == "full":
        found += [Case("G3", 1 << 20, width, 1e-2, low=True, compiled=True) for width in (128, 256)]
    found += [Case("G1", *shape, compiled=shape in heavy) for shape in shapes]
    found += [Case("G2", *shape, train=True, compiled=shape in heavy - {(1, 128)}) for shape in shapes]
    found += [Case("G5", rows, width, steps=20) for width in (256, 1024) for rows in ((1, 64) if cuda else (1,))]
    rows = 4096 if cuda else 256
    found += [Case("G11", rows, 128, 1e-2, low=cuda, compiled=suite == "full", cell=cell) for cell in ("MLP", "Gated")]
    if cuda and suite == "full":
        found += [Case("G4", 4096, width, compiled=width == 1024) for width in (512, 1024, 2048)]
        found += [Case("G4", 65536, 1024)]
    return found


class Setup:
    """A case on a device: our layer, the cell and input of the rivals, and the contestants as calls.

    Attributes:
        steps: Evaluations that our slowest row took.
        flops: Of all rows' evaluations of the cell, as our rows needed them; forward only.
        nbytes: Least traffic of a forward solve: x or its injection once, z once, weights once.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        torch.manual_seed(0)
        tol = 1e-12 if case.steps else case.tol
        most = case.steps or MAX_STEPS
        make = CELLS[case.cell]
        cell = make(case.width, operands="bf16" if case.low else "fp32", device=device)
        self.x = torch.randn(case.rows, case.width, device=device)
        self.layer = tdeq.DEQ(cell, tol=tol, max_steps=most)
        self.anderson = tdeq.DEQ(cell, solver=tdeq.Anderson(memory=4), tol=tol, max_steps=most)
        self.cell = make(case.width, device=device)
        self.cell.load_state_dict(cell.state_dict())
        if case.low:
            self.cell.bfloat16()
        self.there = self.x.bfloat16() if case.low else self.x  # the rivals' input
        self.tol, self.most = tol, most
        with torch.no_grad():
            self.value = self.layer(self.x)
        last = self.layer.last
        self.steps, self.residual, self.path = int(last.steps.max()), float(last.residual.max()), last.path
        weights = sum(p.numel() for name, p in cell.named_parameters() if p.ndim == 2 and not name.startswith("input"))
        self.flops = 2.0 * weights * float(last.steps.double().sum())
        self.nbytes = 4.0 * (2 * case.rows * case.width + weights)

    def solve(self, solver: Callable, cell: torch.nn.Module) -> Callable[[], tuple[Tensor, int]]:
        def call():
            with torch.no_grad():
                injection = self.cell.inject(self.there)
                z0 = torch.zeros_like(self.there)
                return solver(lambda z: cell(z, injection), z0, self.tol, self.most)

        return call

    def contestants(self, compiled: bool) -> dict[str, Callable[[], Any]]:
        """Calls by name; forward ones return (z, evaluations), training ones (z, None), ours (z, None)."""
        return self._training(compiled) if self.case.train else self._forward(compiled)

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
        fixed = {"tied loop": rivals.fixed_steps(self.cell, self.steps, False)}
        if compiled:
            calls["compiled cell in a loop"] = self.solve(rivals.eager_picard, rivals.compiled_cell(self.cell))
            fixed["compiled steps"] = rivals.fixed_steps(self.cell, self.steps, True)

        def run(net):
            with torch.no_grad():
                return net(self.there, torch.zeros_like(self.there)), self.steps

        return calls | {name: lambda net=net: run(net) for name, net in fixed.items()}

    def _training(self, compiled: bool) -> dict[str, Callable[[], Any]]:
        def step(net, x):
            net.zero_grad()
            z = net(x)
            z.square().mean().backward()
            return z.detach(), None

        tied = Tied(self.cell, self.steps)
        stack = rivals.Stack(self.case.width, self.steps, self.device, self.there.dtype)
        calls = {"tritondeq": lambda: step(self.layer, self.x)}
        if rivals.has_torchdeq():
            theirs = rivals.TorchDEQ(self.cell, "fixed_point_iter", self.tol, self.most)
            calls["torchdeq Picard"] = lambda: step(theirs, self.there)
        calls["tied loop"] = lambda: step(tied, self.there)
        calls["untied stack"] = lambda: step(stack, self.there)
        if compiled:
            faster = torch.compile(stack, mode="max-autotune", dynamic=False)
            calls["compiled untied stack"] = lambda: step(faster, self.there)
        return calls

    def wrong(self, name: str, outcome: tuple[Tensor, int | None]) -> str | None:
        """Why the contestant's result is not the same fixed point, or None.

        The cell contracts by 0.9 at most, so a residual r leaves an error of at most 10 r; bf16 states have a floor of
        their own. A stack with weights of its own has another answer; only its size is compared.
        """
        z = outcome[0]
        if z.shape != self.value.shape or not bool(torch.isfinite(z).all()):
            return f"{name}: not a finite {tuple(self.value.shape)}"
        if "untied" in name or self.case.steps:
            return None
        norms = torch.linalg.vector_norm(self.value, dim=1)
        error = float((torch.linalg.vector_norm(z.float() - self.value, dim=1) / norms).max())
        most = 20 * max(self.tol, 2.0**-8 if self.case.low else 0.0)
        if error > most:
            return f"{name}: differs from ours by {error:.1e} of a row's norm, allowed {most:.1e}"
        with torch.no_grad():
            f = self.cell(z, self.cell.inject(self.there)) if z.dtype == self.there.dtype else None
        if f is not None:
            r = float((torch.linalg.vector_norm(f - z, dim=1) / torch.linalg.vector_norm(f, dim=1)).max())
            if r > 1.05 * self.tol + (2.0**-6 if self.case.low else 1e-6):
                return f"{name}: residual {r:.1e} at tolerance {self.tol:.0e}"
        return None


class Tied(torch.nn.Module):
    """The weight-tied explicit net under autograd."""

    def __init__(self, cell: torch.nn.Module, steps: int):
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, x: Tensor) -> Tensor:
        return rivals.fixed_steps(self.cell, self.steps, False)(x, torch.zeros_like(x))


def run(
    case: Case, device: torch.device, roof: dict[str, float], seconds: float, compile_too: bool
) -> Iterator[Record]:
    """Checks every contestant of a case, then times those that are right; a wrong one's record has `wrong` instead."""
    setup = Setup(case, device)
    calls = setup.contestants(case.compiled and compile_too and device.type == "cuda")
    outcomes = {name: call() for name, call in calls.items()}
    faults = {name: setup.wrong(name, outcome) for name, outcome in outcomes.items()}
    if case.steps is None and setup.residual > case.tol:
        faults["tritondeq"] = f"tritondeq: residual {setup.residual:.1e} at tolerance {case.tol:.0e}"
    if case.train:
        faults |= wrong_gradients(setup, calls)
    green = not any(faults.values())
    timed = measure.clock(calls, device, seconds) if green else {}
    least = measure.limit(setup.flops, setup.nbytes, roof, "bf16" if device.type == "cuda" else "fp32")
    for name in calls:
        evaluations = outcomes[name][1]
        record = {"goal": case.goal, "case": str(case), "rows": case.rows, "width": case.width, "contestant": name}
        record |= {"train": case.train, "low": case.low, "path": setup.path if name == "tritondeq" else None}
        record |= {"steps": setup.steps if name == "tritondeq" else evaluations, "tol": setup.tol}
        record |= {"residual": setup.residual, "flops": setup.flops, "bytes": setup.nbytes, "wrong": faults.get(name)}
        if name in timed:
            record |= {"seconds": timed[name].seconds, "median": timed[name].median, "least": timed[name].least}
            record["over_ours"] = timed[name].seconds / timed["tritondeq"].seconds
            record["of_limit"] = least / timed[name].seconds if least and not case.train else None
        yield record


def wrong_gradients(setup: Setup, calls: dict[str, Callable]) -> dict[str, str | None]:
    """Compares dL/dW of those that share our weights with ours; the tolerance of both is that of the solves."""

    def gradient(name, cell):
        cell.zero_grad()
        calls[name]()
        return cell.weight.grad.float()

    ours = gradient("tritondeq", setup.layer.cell)
    faults = {}
    for name in ("torchdeq Picard", "tied loop"):
        if name in calls:
            error = float((gradient(name, setup.cell) - ours).norm() / ours.norm())
            most = 200 * setup.tol
            faults[name] = f"{name}: gradient differs from ours by {error:.1e}, allowed {most:.1e}"
            faults[name] = faults[name] if not error <= most else None
    return faults
