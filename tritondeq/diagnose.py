"""How a layer does on an input, and what would help: a change is tried before it is advised."""

import copy
import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .adjoints import Implicit, Unrolled
from .deq import DEQ
from .jacobian import hessenberg, point, radius
from .layout import Layout, describe, pytree
from .solution import Solution, Status
from .solvers import Anderson, Broyden, Picard

PATIENCE = 4  # what is tried may take this many times the layer's max_steps
FASTER = 0.7  # of the steps now, to be worth a line
SLOW = 15  # median steps from which on an accelerated solver is tried
CROOKED = 0.9  # cosine to the exact gradient below which an approximate one is spoken of
ELSEWHERE = 0.05  # relative distance of equilibria that are two
PRODUCTS = 20
TINY = 1e-30
SEED = 0x5EED


@dataclass(frozen=True)
class Advice:
    """What would help.

    Attributes:
        says: In words.
        changes: Attributes of the layer and their values, which did help on this input; empty if there are none to set.
    """

    says: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. Its str is a report.

    Attributes:
        layer: The layer, in a line.
        solution: The layer's own solve, without its value.
        adjoint: The backward solve of a random cotangent, without its value; None where the adjoint solves nothing.
        cosine: Of the angle between the gradient of an approximate adjoint and the exact one; None: it is exact.
        radius: Spectral radius of each sample, at the best state that any solve found.
        floor: Largest residual of a sample where a solve goes on until nothing improves: what tol has to be above. NaN
            if nothing that was tried converges.
        apart: Largest relative distance of a sample's equilibria from two starts; NaN as above.
        advice: What would help; empty if all is well.
    """

    layer: str
    solution: Solution
    adjoint: Solution | None
    cosine: float | None
    radius: Tensor
    floor: float
    apart: float
    advice: list[Advice]

    def __str__(self) -> str:
        lines = [
            ("status", _outcome(self.solution)),
            ("steps", _spread(self.solution.steps, "g")),
            ("residual", _spread(self.solution.residual, ".1e")),
            ("radius", _spread(self.radius, ".2f")),
        ]
        if self.adjoint is not None:
            lines.append(("backward", f"{_outcome(self.adjoint)}, steps {_spread(self.adjoint.steps, 'g')}"))
        if self.cosine is not None:
            lines.append(("gradient", f"cosine {self.cosine:.2f} to the exact one"))
        if self.floor == self.floor:
            lines += [("floor", f"{self.floor:.1e}"), ("starts", f"two of them end {self.apart:.1e} apart")]
        advice = [f"* {advice.says}" for advice in self.advice] or ["all is well"]
        return "\n".join([self.layer, *(f"  {name:<10}{said}" for name, said in lines), *advice])


def diagnose(layer: DEQ, x: Any, z0: Any = None, mask: Any = None) -> Diagnosis:
    """Solves and differentiates a layer at an input, tries what may help where that goes badly, and reports.

    Costs about ten solves, and syncs. The layer, `last`, gradients and torch's generators stay as they were. The layer
    runs in its mode, with one set of dropout masks; one with `Unrolled` is looked at as if it had `Implicit()`, and a
    compiled or captured one in its plain form.

    Args:
        layer: The layer.
        x, z0, mask: As `DEQ.solve` takes them: such as training sees, a few samples will do.

    Raises:
        TypeError: the layer is no DEQ.
        ValueError: there is no sample.
    """
    if not isinstance(layer, DEQ):
        raise TypeError(f"layer must be a DEQ, got {describe(layer)}")
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        return _Trials(layer, x, z0, mask).diagnosis()


class _Trials:
    """Solves of one input by variants of one layer, and what they say."""

    def __init__(self, layer: DEQ, x: Any, z0: Any, mask: Any):
        adjoint = Implicit() if isinstance(layer.adjoint, Unrolled) else layer.adjoint
        plain = {"trace": False, "graph": False, "_graphs": None, "compile_cell": False, "_unrolled": None}
        self.layer = _variant(layer, adjoint=adjoint, **plain)
        self.x, self.z0, self.mask = x, z0, mask
        self.patient = {"max_steps": PATIENCE * layer.max_steps}
        self.advice: list[Advice] = []

    def say(self, says: str, **changes: Any) -> None:
        self.advice.append(Advice(says, changes))

    def solve(self, z0: Any = None, **changes: Any) -> Solution:
        torch.manual_seed(SEED)  # the same dropout masks each time
        with torch.no_grad():
            return _variant(self.layer, **changes).solve(self.x, self.z0 if z0 is None else z0, self.mask)

    def differentiate(self, **changes: Any) -> tuple[Solution, Tensor]:
        """(solution, gradient of a random linear function of it by x and all parameters, as a vector)."""
        torch.manual_seed(SEED)
        with torch.enable_grad():
            x = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), self.x)
            solution = _variant(self.layer, **changes).solve(x, self.z0, self.mask)
            values = [v for v in pytree.tree_leaves(solution.value) if v.requires_grad]
            inputs = [*pytree.tree_leaves(x), *self.layer.parameters()] if values else []
            inputs = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
            torch.manual_seed(SEED + 1)
            cotangents = [torch.randn_like(v) for v in values]
            grads = torch.autograd.grad(values, inputs, cotangents, materialize_grads=True) if values else ()
        return solution, torch.cat([g.flatten().double() for g in grads] or [torch.zeros(1)])

    def diagnosis(self) -> Diagnosis:
        own, gradient = self.differentiate()
        if not own.status.numel():
            raise ValueError(f"x must hold at least one sample, got {describe(self.x)}")
        best, changes = self.mend(own) if _failed(own) else (own, {})
        rho = radius(self.hessenberg(best))
        floor = apart = float("nan")
        cosine = None if self.layer.adjoint.exact else self.cosine(gradient, changes)
        if not _failed(best):
            self.quicken(best, changes)
            if rho.max() >= 1:
                self.say(
                    f"the spectral radius is up to {rho.max():.2f}, and undamped iteration leaves such an equilibrium: "
                    "add weight * jacobian_penalty(layer, z, x).mean() to the loss"
                )
            finest = self.solve(**changes | self.patient | {"tol": TINY})
            floor, apart = finest.residual.max().item(), self.apart(finest, changes)
            self.loosen(best, floor, changes)
            self.mend_adjoint(own, cosine, changes)
            if apart > ELSEWHERE:
                self.say(
                    f"another start ends at another equilibrium, {apart:.1e} away: if there is to be one, train from "
                    "random z0 and with random max_steps"
                )
        adjoint = own.adjoint and replace(own.adjoint, value=None)
        own = replace(own, value=None)
        rho = rho.view(own.status.shape).to(own.residual.dtype)
        return Diagnosis(_line(self.layer), own, adjoint, cosine, rho, floor, apart, self.advice)

    def mend(self, own: Solution) -> tuple[Solution, dict[str, Any]]:
        """The first solve by other means that fails nowhere, or else the best, and what it changed; says which do."""
        others = [{}, {"solver": Anderson()}, {"solver": Broyden()}]
        tried = [(self.solve(**c | self.patient), c) for c in others if c.get("solver") != self.layer.solver]
        damping = self.damping(min(tried, key=_badness)[0])
        if damping is not None:
            changes = {"solver": Picard(damping)}
            tried.insert(1, (self.solve(**changes | self.patient), changes))
        samples, good = own.status.numel(), [(s, c) for s, c in tried if not _failed(s)]
        for solution, changes in good:
            most = solution.steps.max().item()
            if most > self.layer.max_steps:
                changes["max_steps"] = 10 * math.ceil(most / 10)
            self.say(f"{_named(changes)}: all {samples} samples make it, in at most {most} steps", **changes)
        if good:
            return good[0]
        for status in (Status.GROWING, Status.NONFINITE):
            n = (own.status == status).sum().item()
            if n:
                self.say(f"{n} of {samples} samples {status.name}: {status.sentence}")
        if not self.advice:
            self.say(
                "no solver tried finds a fixed point for every sample: give the cell an outer norm, a decay or a "
                "contraction, or go back to where it converged and train on with jacobian_penalty"
            )
        return min([(own, {}), *tried], key=_badness)

    def damping(self, found: Solution) -> float | None:
        """Of plain iteration: that for which it converges fastest near the state found, if it does at all."""
        if not isinstance(self.layer.solver, Picard):
            return None
        h = self.hessenberg(found)
        eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
        rates = {k / 10: radius(torch.lerp(eye, h, k / 10)).max().item() for k in range(1, 10)}
        best = min(rates, key=lambda k: rates[k] if rates[k] >= 0 else 2.0)  # NaN is no rate
        return best if rates[best] < 1 and best != self.layer.solver.damping else None

    def quicken(self, best: Solution, changes: dict[str, Any]) -> None:
        median = best.steps.median().item()
        if changes or median <= SLOW or not isinstance(self.layer.solver, Picard):
            return
        faster = self.solve(solver=Anderson())
        steps = faster.steps.median().item()
        if not _failed(faster) and steps <= FASTER * median:
            self.say(f"solver={_shown(Anderson())}: a median of {steps} steps, not {median}", solver=Anderson())

    def loosen(self, best: Solution, floor: float, changes: dict[str, Any]) -> None:
        stuck, tol = (best.status == Status.PLATEAU).sum().item(), float(f"{2 * floor:.0e}")
        if stuck and self.solve(**changes, tol=tol).converged.all():
            self.say(
                f"{stuck} of {best.status.numel()} samples stop improving above the tolerance: tol={tol:g}, or a wider "
                "dtype",
                tol=tol,
            )

    def mend_adjoint(self, own: Solution, cosine: float | None, changes: dict[str, Any]) -> None:
        """Says what would help the gradient, at equilibria that are found with these changes."""
        adjoint = self.layer.adjoint
        if cosine is not None and cosine < CROOKED:
            self.say(
                f"the gradient of {_shown(adjoint)} is at cosine {cosine:.2f} to the exact one: adjoint=Implicit()",
                adjoint=Implicit(),
            )
        now = self.differentiate(**changes)[0].adjoint if changes else own.adjoint
        if cosine is not None or now is None or not _failed(now):
            return
        options = [{"max_steps": PATIENCE * (adjoint.max_steps or self.layer.max_steps)}]
        options += [options[0] | {"solver": solver, "reuse": False} for solver in (Anderson(), Broyden())]
        for option in options:
            other = replace(adjoint, **option)
            made = self.differentiate(**changes | {"adjoint": other})[0].adjoint
            if not _failed(made):
                most = made.steps.max().item()
                self.say(
                    f"adjoint={_shown(other)}: the backward solve makes it, in at most {most} steps", adjoint=other
                )
                return
        self.say("no backward solver tried makes it: adjoint=Phantom(5, 0.8) has a fixed cost")

    def cosine(self, gradient: Tensor, changes: dict[str, Any]) -> float:
        """Of an approximate gradient to the exact one."""
        if changes:
            gradient = self.differentiate(**changes)[1]
        exact = self.differentiate(**changes, adjoint=Implicit(**self.patient))[1]
        return torch.nn.functional.cosine_similarity(gradient, exact, dim=0).item()

    def apart(self, finest: Solution, changes: dict[str, Any]) -> float:
        """Largest relative distance of two equilibria of a sample."""
        layout = Layout(finest.value, getattr(self.layer.cell, "batch_dims", 1))
        flat = layout.pack(finest.value)
        torch.manual_seed(SEED + 1)
        start = torch.randn_like(flat) * flat.square().mean(dim=1, keepdim=True).sqrt().clamp(min=TINY)
        other = self.solve(layout.unpack(start), **changes | self.patient, tol=TINY)
        distance = torch.linalg.vector_norm(layout.pack(other.value) - flat, dim=1)
        distance = distance / torch.linalg.vector_norm(flat, dim=1).clamp(min=TINY)
        found = (torch.maximum(finest.residual, other.residual) < 1e-2).flatten()
        return distance[found].max().item() if found.any() else float("nan")

    def hessenberg(self, solution: Solution) -> Tensor:
        return hessenberg(point(self.layer, solution.value, (self.x,), None, self.mask), PRODUCTS)


def _variant(layer: DEQ, **changes: Any) -> DEQ:
    """A layer with the same cell."""
    twin = copy.copy(layer)
    for name, value in changes.items():
        setattr(twin, name, value)
    return twin


def _failed(solution: Solution) -> bool:
    return bool((solution.status >= Status.MAX_STEPS).any())


def _badness(tried: tuple[Solution, dict[str, Any]]) -> tuple[int, float]:
    solution = tried[0]
    return int((solution.status >= Status.MAX_STEPS).sum()), solution.residual.nan_to_num(torch.inf).max().item()


def _named(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in changes.items()) or "more steps"


def _shown(value: Any) -> str:
    """Its repr, of a dataclass without what is as by default."""
    if not is_dataclass(value):
        return repr(value)
    given = {f.name: getattr(value, f.name) for f in fields(value)}
    told = [
        f"{f.name}={_shown(given[f.name])}" for f in fields(value) if f.default is MISSING or given[f.name] != f.default
    ]
    return f"{type(value).__name__}({', '.join(told)})"


def _line(layer: DEQ) -> str:
    tol = "auto" if layer.tol is None else f"{layer.tol:g}"
    told = f"{_shown(layer.solver)}, {_shown(layer.adjoint)}, tol {tol}, max_steps {layer.max_steps}"
    return f"DEQ of {type(layer.cell).__name__}: {told}"


def _outcome(solution: Solution) -> str:
    counts = torch.bincount(solution.status.flatten(), minlength=len(Status)).tolist()
    return ", ".join(f"{n} {status.name}" for status, n in zip(Status, counts, strict=True) if n)


def _spread(values: Tensor, form: str) -> str:
    values = values.double()
    return f"median {values.median().item():{form}}, most {values.max().item():{form}}"
