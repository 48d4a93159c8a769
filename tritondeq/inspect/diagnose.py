"""Reports how a layer does on an input and what would help: each change is tried before it is advised."""

import copy
import math
import warnings
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adjoints import Implicit, Unrolled
from ..deq import DEQ
from ..guards import flush
from ..layout import Layout, describe, pytree
from ..solution import Solution, Status
from ..solvers import Anderson, Broyden, Picard
from .causes import Snapshot, find, state_only
from .jacobian import hessenberg, point, radius

PATIENCE = 4  # what is tried may take this many times the layer's max_steps
FASTER = 0.7  # share of the steps that an accelerated solver must stay below to be advised
SLOW = 15  # median number of steps above which an accelerated solver is tried
CROOKED = 0.9  # cosine to the exact gradient below which the exact one is advised
ELSEWHERE = 0.05  # relative distance above which two equilibria are distinct
PRODUCTS = 20
TINY = 1e-30
SEED = 0x5EED


@dataclass(frozen=True)
class Advice:
    """What would help: in words, and as attributes of the layer whose values did help on this input, if any."""

    text: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`. Its str is a report.

    Attributes:
        layer: The layer, in a line.
        solution: The layer's solve, without its value.
        adjoint: The backward solve of a random cotangent, without its value; None where the adjoint solves nothing.
        cosine: Of the gradient of an approximate adjoint and the exact one; None: it is exact, or was not compared.
        radius: Spectral radius of each sample, at the best state that any solve reached; NaN where the Jacobian is.
        floor: Largest residual where a solve goes on until nothing improves; NaN if nothing tried converges.
        apart: Largest relative distance of a sample's equilibria from two starts; NaN as above.
        differs: Largest relative difference of two evaluations of the cell at one state, with dropout masks held.
        moved: Buffers, tensors and numbers of the cell's modules that change from one evaluation to the next.
        coupled: Largest relative change of a sample's image as the states of others change; NaN where two evaluations
            at one state differ by themselves.
        advice: What would help; empty if all is well. Where the cell is not what a fixed-point problem needs, it names
            that and nothing else, and radius, cosine, floor and apart mean nothing: they are NaN and None.
    """

    layer: str
    solution: Solution
    adjoint: Solution | None
    cosine: float | None
    radius: Tensor
    floor: float
    apart: float
    differs: float
    moved: tuple[str, ...]
    coupled: float
    advice: list[Advice]

    def __str__(self) -> str:
        lines = [
            ("status", _outcome(self.solution)),
            ("steps", _spread(self.solution.steps, "g")),
            ("residual", _spread(self.solution.residual, ".1e")),
        ]
        if not self.radius.isnan().all():
            lines.append(("radius", _spread(self.radius, ".2f")))
        if self.adjoint is not None:
            lines.append(("backward", f"{_outcome(self.adjoint)}, steps {_spread(self.adjoint.steps, 'g')}"))
        if self.cosine is not None:
            lines.append(("gradient", f"cosine {self.cosine:.2f} to the exact one"))
        if not math.isnan(self.floor):
            lines += [("floor", f"{self.floor:.1e}"), ("starts", f"two of them end {self.apart:.1e} apart")]
        advice = [f"* {advice.text}" for advice in self.advice] or ["all is well"]
        return "\n".join([self.layer, *(f"  {name:<10}{text}" for name, text in lines), *advice])


def diagnose(layer: DEQ, x: Any, z0: Any = None, mask: Any = None) -> Diagnosis:
    """Solves and differentiates a layer at an input, tries what may help where that goes badly, and reports.

    First it looks whether the cell is a function of its state, and one sample apart from another; where it is not, the
    cause is all that is advised. Costs about ten solves, and syncs. The layer runs in its mode, with one set of dropout
    masks; one with `Unrolled` is examined as if it had `Implicit()`, and a compiled or captured one in its plain form.

    The layer, `last`, gradients and torch's generators stay as they were; so do buffers of the cell, and attributes of
    its modules that are tensors or numbers, whatever its evaluations change. What can't be restored: attributes of
    other kinds (lists, generators, None that becomes a tensor, `last` of a layer within the cell), what hooks store,
    and what lies outside of its modules.

    Args:
        layer: The layer.
        x: Its input, such as training sees; a few samples will do.
        z0: As in `DEQ.solve`.
        mask: As in `DEQ.solve`.

    Raises:
        TypeError: The layer is no DEQ.
        ValueError: There is no sample.
        RuntimeError: As in `DEQ.solve`.
    """
    if not isinstance(layer, DEQ):
        raise TypeError(f"layer must be a DEQ, got {describe(layer)}")
    before = Snapshot(layer.cell)
    flush(wait=True)
    with torch.random.fork_rng(range(torch.cuda.device_count())), warnings.catch_warnings():
        # Trials are made to fail: what they warn of is what the report is about. The filter holds for all threads.
        warnings.simplefilter("ignore")
        try:
            return _Trials(layer, x, z0, mask).diagnosis(before)
        finally:
            before.restore()
            flush(wait=True)


class _Trials:
    """Solves of one input by variants of one layer, and the advice that follows from them."""

    def __init__(self, layer: DEQ, x: Any, z0: Any, mask: Any):
        adjoint = Implicit() if isinstance(layer.adjoint, Unrolled) else layer.adjoint
        plain = {"throw": False, "trace": False, "graph": False, "_graphs": None, "compile_cell": False}
        self.layer = _variant(layer, adjoint=adjoint, _unrolled=None, **plain)
        self.x, self.z0, self.mask = x, z0, mask
        self.patient = {"max_steps": PATIENCE * layer.max_steps}
        self.advice: list[Advice] = []

    def advise(self, text: str, **changes: Any) -> None:
        given = ", ".join(f"{name}={_shown(value)}" for name, value in changes.items())
        self.advice.append(Advice(f"{given}: {text}" if given else text, changes))

    def solve(self, z0: Any = None, **changes: Any) -> Solution:
        torch.manual_seed(SEED)  # the same dropout masks each time
        with torch.no_grad():
            return _variant(self.layer, **changes).solve(self.x, self.z0 if z0 is None else z0, self.mask)

    def differentiate(self, **changes: Any) -> tuple[Solution, Tensor]:
        """Returns a solution, and the gradient of a random linear function of it by x and all parameters, [N]."""
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
        return solution, torch.cat([g.flatten().double() for g in grads] or [solution.residual.new_zeros(1).double()])

    def diagnosis(self, before: Snapshot) -> Diagnosis:
        layer = self.layer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solution, gradient = self.differentiate()
            flush(wait=True)
        if not solution.status.numel():
            raise ValueError(f"x must hold at least one sample, got {describe(self.x)}")
        before.restore()
        torch.manual_seed(SEED)
        causes = find(layer, solution.value, self.x, self.mask, [str(warning.message) for warning in caught])
        self.advice += map(Advice, causes.texts)
        rho = torch.full_like(solution.residual, torch.nan)
        floor = apart = math.nan
        cosine = None
        if not self.advice:
            best, changes = self.mend(solution) if _failed(solution) else (solution, {})
            rho = radius(self.hessenberg(best))
            gone = (rho.isnan() & (best.status < Status.MAX_STEPS).flatten()).sum().item()
            if gone:
                text = f"{gone} of {rho.numel()} samples have a Jacobian that is NaN at their solution"
                self.advise(
                    f"{text}: no gradient exists there (a root or norm at 0, a NaN in a branch that torch.where leaves)"
                )
            elif not _failed(best):
                cosine, floor, apart = self.examine(best, changes, rho, solution, gradient)
        target = "auto" if layer.tol is None else f"{layer.tol:g}"
        options = f"{_shown(layer.solver)}, {_shown(layer.adjoint)}, tol {target}, max_steps {layer.max_steps}"
        return Diagnosis(
            layer=f"DEQ of {_kind(layer.cell).__name__}: {options}",
            solution=replace(solution, value=None, aux=None),
            adjoint=solution.adjoint and replace(solution.adjoint, value=None),
            cosine=cosine,
            radius=rho.view(solution.status.shape).to(solution.residual.dtype),
            floor=floor,
            apart=apart,
            differs=causes.differs,
            moved=causes.moved,
            coupled=causes.coupled,
            advice=self.advice,
        )

    def examine(
        self, best: Solution, changes: dict[str, Any], rho: Tensor, solution: Solution, gradient: Tensor
    ) -> tuple[float | None, float, float]:
        """Advises on a layer that with these changes has solved everything; returns (cosine, floor, apart)."""
        layer, cosine = self.layer, None
        if changes:
            solution, gradient = self.differentiate(**changes)
        if not gradient.isfinite().all() and (solution.adjoint is None or not _failed(solution.adjoint)):
            self.advise("the gradient by x or by a parameter is not finite, though the Jacobian by the state is")
        if not layer.adjoint.exact:
            exact = self.differentiate(**changes, adjoint=Implicit(max_steps=PATIENCE * layer.max_steps))[1]
            cosine = torch.nn.functional.cosine_similarity(gradient, exact, dim=0).item()
        median = best.steps.median().item()
        if median > SLOW and not changes and isinstance(layer.solver, Picard):
            faster = self.solve(solver=Anderson())
            steps = faster.steps.median().item()
            if not _failed(faster) and steps <= FASTER * median:
                self.advise(f"a median of {steps} steps, not {median}", solver=Anderson())
        if rho.max() >= 1:
            self.advise(
                f"the spectral radius is up to {rho.max():.2f}, and undamped iteration leaves such an equilibrium: "
                "add weight * jacobian_penalty(layer, z, x).mean() to the loss"
            )
        finest = self.solve(**changes | self.patient | {"tol": TINY})
        floor, apart = finest.residual.max().item(), self.apart(finest, changes)
        stuck, tol = (best.status == Status.PLATEAU).sum().item(), float(f"{2 * floor:.0e}")
        if stuck and self.solve(**changes, tol=tol).converged.all():
            text = f"{stuck} of {best.status.numel()} samples stop improving above the tolerance"
            self.advise(f"{text}; a wider dtype helps as well", tol=tol)
        if cosine is None:
            self.mend_adjoint(solution.adjoint, changes)
        elif cosine < CROOKED:
            text = f"the gradient of {_shown(layer.adjoint)} is at cosine {cosine:.2f} to the exact one"
            self.advise(text, adjoint=Implicit())
        if apart > ELSEWHERE:
            self.advise(
                f"another start ends at another equilibrium, {apart:.1e} away: if there is to be one, train from "
                "random z0 and with random max_steps"
            )
        return cosine, floor, apart

    def mend(self, solution: Solution) -> tuple[Solution, dict[str, Any]]:
        """Advises each solver that fails nowhere; returns the first such solve, else the best, and its changes."""
        solver, samples = self.layer.solver, solution.status.numel()
        options: list[dict[str, Any]] = [{}, {"solver": Anderson()}, {"solver": Broyden()}]
        tried = [(self.solve(**c | self.patient), c) for c in options if c.get("solver") != solver]
        if isinstance(solver, Picard):
            h = self.hessenberg(min(tried, key=_badness)[0])
            eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
            rates = [radius(torch.lerp(eye, h, k / 10)).nan_to_num(2.0).max().item() for k in range(1, 10)]
            damping = (1 + rates.index(min(rates))) / 10  # converges fastest near this state, if it does at all
            if min(rates) < 1 and damping != solver.damping:
                changes: dict[str, Any] = {"solver": Picard(damping)}
                tried.insert(1, (self.solve(**changes | self.patient), changes))
        good = [(s, c) for s, c in tried if not _failed(s)]
        for other, changes in good:
            steps = other.steps.max().item()
            if steps > self.layer.max_steps:
                changes["max_steps"] = 10 * math.ceil(steps / 10)
            self.advise(f"all {samples} samples make it, in at most {steps} steps", **changes)
        if good:
            return good[0]
        for status in (Status.GROWING, Status.NONFINITE):
            if n := (solution.status == status).sum().item():
                self.advise(f"{n} of {samples} samples {status.name}: {status.sentence}")
        if not self.advice:
            self.advise(
                "no solver tried finds a fixed point for every sample: give the cell an outer norm, a decay or a "
                "contraction, or go back to where it converged and train on with jacobian_penalty"
            )
        return min([(solution, {}), *tried], key=_badness)

    def mend_adjoint(self, backward: Solution | None, changes: dict[str, Any]) -> None:
        """Advises what would help a backward solve, at the equilibria that a solve with these changes reaches."""
        if backward is None or not _failed(backward):
            return
        adjoint: Any = self.layer.adjoint
        patient = replace(adjoint, max_steps=PATIENCE * (adjoint.max_steps or self.layer.max_steps))
        for option in ({}, {"solver": Anderson(), "reuse": False}, {"solver": Broyden(), "reuse": False}):
            other = replace(patient, **option)
            backward = self.differentiate(**changes | {"adjoint": other})[0].adjoint
            if backward is not None and not _failed(backward):
                steps = backward.steps.max().item()
                return self.advise(f"the backward solve makes it, in at most {steps} steps", adjoint=other)
        self.advise("no backward solver tried makes it: adjoint=Phantom(5, 0.8) has a fixed cost")

    def apart(self, finest: Solution, changes: dict[str, Any]) -> float:
        """Returns the largest relative distance of two equilibria of a sample."""
        layout = Layout(finest.value, getattr(self.layer.cell, "batch_dims", 1))
        flat = layout.pack(finest.value)
        torch.manual_seed(SEED + 1)
        size = flat.square().mean(dim=1, keepdim=True).sqrt()
        start = torch.randn_like(flat) * torch.where(size > TINY, size, 1.0)
        other = self.solve(layout.unpack(start), **changes | self.patient | {"tol": TINY})
        found = layout.pack(other.value)
        distance = (found - flat).norm(dim=1) / torch.maximum(found.norm(dim=1), flat.norm(dim=1)).clamp(min=TINY)
        both = (torch.maximum(finest.residual, other.residual) < 1e-2).flatten()
        return distance[both].max().item() if both.any() else math.nan

    def hessenberg(self, solution: Solution) -> Tensor:
        at = point(self.layer, solution.value, (self.x,), None, self.mask)
        return hessenberg(state_only(at, self.layer), PRODUCTS)


def _variant(layer: DEQ, **changes: Any) -> DEQ:
    """Returns a layer with the same cell and other attributes."""
    twin = copy.copy(layer)
    vars(twin).update(changes)
    return twin


def _failed(solution: Solution) -> int:
    return int((solution.status >= Status.MAX_STEPS).sum())


def _badness(tried: tuple[Solution, dict[str, Any]]) -> tuple[int, float]:
    return _failed(tried[0]), tried[0].residual.nan_to_num(torch.inf).max().item()


def _shown(value: Any) -> str:
    """Returns the repr; that of a dataclass leaves out what is at its default."""
    if not is_dataclass(value):
        return repr(value)
    options = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default]
    return f"{type(value).__name__}({', '.join(f'{name}={_shown(option)}' for name, option in options)})"


def _outcome(solution: Solution) -> str:
    counts = torch.bincount(solution.status.flatten(), minlength=len(Status)).tolist()
    return ", ".join(f"{n} {status.name}" for status, n in zip(Status, counts, strict=True) if n)


def _spread(values: Tensor, form: str) -> str:
    values = values.double()
    return f"median {values.median().item():{form}}, most {values.max().item():{form}}"


def _kind(cell: nn.Module) -> type:
    """Returns the class of a cell, and not the one that torch.nn.utils.parametrize makes of it."""
    return type(cell).__bases__[0] if parametrize.is_parametrized(cell) else type(cell)
