"""What one answer of the library is worth, by dense linear algebra in float64.

With z the value returned, J = df/dz and B = df/d(leaf) at z, over the whole batch:

    value      ||f(z) - z|| <= slack max(tol, reported residual) size + rounding      for each sample CONVERGED,
               size = max(||f(z)||, SHARE ||f(z0)||) as kernels/rules.py has it
    gradient   ||grad - B'u|| <= ||B|| du + rounding,  u as the adjoint is defined, J and B at z; for Implicit
               du = (R t ||g|| + e ||u||) / (1 - e),  R = ||(I - J)^-1||,  e = R rounding,  t = slack max(tol, residual)

No constant is fitted. `rounding` is measured: 4 times the distance between the same formula in the library's precision
and in float64 (in float64, what float32 does, scaled by the ratio of their epsilons), and 4 epsilons of the largest
gradient. `slack` is 1 but for splitting solvers, whose residual is that of another map, and for samples that depend on
one another, where the library warns above guards.NEAR times what it reported. Where tol leaves z itself a
range, a gradient may also be that of f(z) in place of z: the distance of the two references is then added to the bound.

An answer that is not right is "reported" where the library admits it: an error that it raises itself and that names
the cause, a warning, a status other than CONVERGED of the solve or of the backward solve, or NaN where f has NaN.
Any other error is "unnamed error" where a refusal would do, and "broken" where an answer is due. What is left is
"silent wrong".
"""

import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tritondeq as tdeq
from tritondeq import guards
from tritondeq.kernels import rules

RIGHT, REPORTED, UNNAMED, BROKEN, WRONG = "right", "reported", "unnamed error", "broken", "silent wrong"
SPEAKS = r"tritondeq|sample|\bcell|solve|fixed point|adjoint"  # what a warning of the library is about
LIBRARY = tuple(str(Path(module.__file__).parent) for module in (tdeq, rules))  # type: ignore[arg-type]


class Verdict(NamedTuple):
    name: str
    detail: str = ""


@dataclass
class Problem:
    """One solve, and its map in any precision.

    Attributes:
        call: Solves by the library; the value carries the gradient where `grads`.
        truth: (f, leaves) in a dtype, made after the call: the map, and what its gradients are taken by.
        leaves: The library's tensors in the order of those of `truth`.
        z0, adjoint, solver, tol, dims, mask: What was asked of the library; `dims` are its batch_dims.
        words: What an error or a warning has to match to name the cause; None: nothing may be refused.
        coupled: Whether samples depend on one another.
        pull: Takes a loss, times `scale`, backward.
        nan_is_due: Whether a plain loop would have NaN in its gradient.
    """

    call: Callable[[], Any]
    truth: Callable[[torch.dtype], tuple[Callable, list[Tensor]]]
    leaves: list[Tensor]
    z0: Any
    adjoint: Any = tdeq.Implicit()  # noqa: RUF009  frozen
    solver: Any = tdeq.Picard()  # noqa: RUF009  frozen
    tol: float = 1e-3
    dims: int = 1
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    mask: Tensor | None = None
    words: str | None = None
    coupled: bool = False
    grads: bool = True
    pull: Callable[[Tensor], None] = torch.Tensor.backward
    scale: float = 1.0
    slack: Callable[[Any], float] = lambda value: 1.0
    nan_is_due: bool = False


@dataclass
class Pairs:
    """Tensors of the library beside what they should be.

    Attributes:
        got, right: Makes them, and the Solutions behind them; and what they should be, afterwards.
        bound: Of the error, relative to the largest of them.
        words: As for `Problem`.
        any_error: Whether torch's error will do, where a loop under autograd would raise it too.
    """

    got: Callable[[], tuple[list[Tensor | None], list[Any]]]
    right: Callable[[], list[Tensor]]
    bound: float
    words: str | None = None
    any_error: bool = False


class Dense:
    """y = f(z) with J and B as matrices, rows of which are the elements of the whole state."""

    def __init__(self, made: tuple[Callable, list[Tensor]], state: Any, dtype: torch.dtype):
        f, self.leaves = made
        parts, spec = pytree.tree_flatten(state)
        self.z = [part.detach().to(dtype).requires_grad_() for part in parts]
        with torch.enable_grad():
            self.out = torch.cat([y.reshape(-1) for y in pytree.tree_leaves(f(pytree.tree_unflatten(self.z, spec)))])
        self.y = self.out.detach().double()
        self.at = torch.cat([part.detach().reshape(-1).double() for part in self.z])

    def pull(self, u: Tensor) -> list[Tensor]:
        """Returns J'u and B'u of each leaf, flat and in float64."""
        points = (*self.z, *self.leaves)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(self.out, points, u.to(self.out.dtype), **options)
        flat = [grad.detach().reshape(-1).double() for grad in grads]
        return [torch.cat(flat[: len(self.z)]), *flat[len(self.z) :]]

    def matrices(self) -> list[Tensor]:
        """Returns J and B of each leaf."""
        rows = [self.pull(u) for u in torch.eye(len(self.y), dtype=torch.float64)]
        return [torch.stack(columns) for columns in zip(*rows, strict=True)]


def cotangent(adjoint: Any, j: Tensor, g: Tensor) -> Tensor:
    """Returns u [N] for the cotangent g of z*, as the adjoint is defined."""
    if isinstance(adjoint, tdeq.Implicit):
        return torch.linalg.solve(torch.eye(len(g), dtype=g.dtype) - j.T, g)
    if isinstance(adjoint, tdeq.OneStep):
        return g
    steps, damping = (adjoint.steps, adjoint.damping) if isinstance(adjoint, tdeq.Phantom) else (adjoint.terms, None)
    u = term = g if damping is None else damping * g
    for _ in range(steps - 1):
        term = j.T @ term if damping is None else torch.lerp(term, j.T @ term, damping)
        u = u + term
    return u


def judge(problem: Any) -> Verdict:
    """Runs the library and returns the verdict."""
    texts: list[str] = []
    try:
        verdict = (_judge_pairs if isinstance(problem, Pairs) else _judge)(problem, texts)
    except _Refused as refused:
        return _refusal(refused.__cause__, problem.words, getattr(problem, "any_error", False))
    spoken = [text for text in texts if re.search(problem.words or SPEAKS, text, re.IGNORECASE)]
    return Verdict(REPORTED, f"warning: {spoken[0]}") if verdict.name == WRONG and spoken else verdict


class _Refused(Exception):
    """An exception of the library's part of a case, as against one of the judge's."""


def _library(work: Callable[[], Any], texts: list[str]) -> Any:
    """Returns what `work` returns, and appends its warnings to `texts`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return work()
        except Exception as error:
            raise _Refused from error
        finally:
            texts += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def _refusal(error: BaseException, words: str | None, any_error: bool) -> Verdict:
    frames = traceback.extract_tb(error.__traceback__)
    ours = frames[-1].filename.startswith(LIBRARY) and (frames[-1].line or "").startswith("raise")
    text = f"{type(error).__name__}: {str(error)[:200]}"
    if words is None:
        return Verdict(BROKEN, text)
    named = re.search(words, str(error), re.IGNORECASE)
    return Verdict(REPORTED if named and (ours or any_error) else UNNAMED, text)


def _solve(p: Problem) -> tuple[Any, Any, list[Tensor | None], Tensor]:
    """Returns (solution, value, gradients, cotangent): random in elements that count of samples CONVERGED, else 0."""
    solution = p.call()
    value = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), solution.value)
    gen = torch.Generator().manual_seed(0)
    loss, cotangents = torch.zeros((), dtype=torch.float64), []
    for leaf in pytree.tree_leaves(solution.value):
        status = solution.status
        done = (status == tdeq.Status.CONVERGED) | isinstance(p.adjoint, tdeq.Unrolled)
        done = done.reshape(status.shape + (1,) * (leaf.ndim - status.ndim)) & _counts(p.mask, leaf)
        g = (torch.randn(leaf.shape, generator=gen, dtype=torch.float64) * done).to(leaf.dtype)
        cotangents.append(g.double().reshape(-1))
        loss = loss + (torch.where(done, leaf, 0.0) * g).sum() * p.scale
    grads: list[Tensor | None] = []
    if p.grads and loss.requires_grad:
        p.pull(loss)
        grads = [None if x.grad is None else x.grad.detach().double().reshape(-1) / p.scale for x in p.leaves]
    return solution, value, grads, torch.cat(cotangents)


def _counts(mask: Tensor | None, leaf: Tensor) -> Tensor:
    mask = (
        torch.ones((), dtype=torch.bool) if mask is None else mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
    )
    return mask.expand(leaf.shape)


def _narrow(p: Problem, work: Callable[[Any, torch.dtype], Any]) -> tuple[Any, float, float]:
    """Returns (what `work` makes of the map in the library's precision, factor of its errors, epsilon)."""
    dtype = torch.float32 if p.dtype == torch.float64 else p.dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=p.autocast):
        made = work(p.truth(dtype), dtype)
    eps = torch.finfo(torch.bfloat16 if p.autocast else p.dtype).eps
    return made, eps / torch.finfo(dtype).eps if p.dtype == torch.float64 else 1.0, eps


def _judge(p: Problem, texts: list[str]) -> Verdict:
    solution, value, grads, g = _library(lambda: _solve(p), texts)
    leaves = pytree.tree_leaves(value)
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(leaves, pytree.tree_leaves(p.z0), strict=True)):
        return Verdict(WRONG, "shape or dtype of the value")
    if g.numel() == 0:
        empty = all(grad is None or not grad.any() for grad in grads)
        return Verdict(RIGHT) if empty else Verdict(WRONG, "gradient of an empty batch")
    if isinstance(p.adjoint, tdeq.Unrolled):
        return _judge_unrolled(p, value, grads, g)
    converged = (solution.status == tdeq.Status.CONVERGED).reshape(-1)
    tol = torch.maximum(solution.residual.double().reshape(-1), torch.tensor(p.tol, dtype=torch.float64))
    tol = tol * p.slack(value) * (guards.NEAR if p.coupled else 1.0)
    admitted = "" if converged.all() else f"status {[tdeq.Status(s).name for s in solution.status.unique().tolist()]}"
    if not converged.any() or (p.coupled and admitted):
        return Verdict(REPORTED, admitted)

    dense = Dense(p.truth(torch.float64), value, torch.float64)
    narrow, factor, eps = _narrow(p, lambda made, dtype: Dense(made, value, dtype))
    owner = torch.cat([torch.arange(len(tol)).repeat_interleave(leaf.numel() // len(tol)) for leaf in leaves])
    counts = torch.cat([_counts(p.mask, leaf).reshape(-1) for leaf in leaves])

    def norms(v: Tensor) -> Tensor:
        v = torch.where(counts, v, 0.0)
        return torch.zeros(len(tol), dtype=torch.float64).index_add(0, owner, v * v).sqrt()

    f, _ = p.truth(torch.float64)
    with torch.no_grad():
        first = f(pytree.tree_map_only(Tensor, lambda t: t.detach().double(), p.z0))
    first = torch.cat([part.reshape(-1) for part in pytree.tree_leaves(first)])
    size = torch.maximum(norms(dense.y), rules.SHARE * norms(first))
    rounding = 4 * factor * norms(narrow.y - dense.y) + 4 * eps * (size + norms(dense.at))
    residual = norms(dense.y - dense.at)
    off = converged & ~(residual <= tol * (size + rules.EPS) + rounding)
    if off.any():
        i = int(off.nonzero()[0])
        return Verdict(WRONG, f"residual of sample {i}: {residual[i] / size[i]:.1e}, bound {tol[i]:.1e} plus rounding")
    if not p.grads:
        return Verdict(REPORTED, admitted) if admitted else Verdict(RIGHT)
    if not grads and p.leaves:
        return Verdict(WRONG, "the value has no graph")

    backward = solution.adjoint
    tol_u = p.tol if getattr(p.adjoint, "tol", None) is None else p.adjoint.tol
    failed = backward is not None and not backward.converged.all()
    if backward is not None:
        tol_u = max(tol_u, backward.residual.max().item())
    tol_u *= p.slack(value)
    keep = converged[owner]
    right, bounds = _gradients(p, dense, narrow, keep, g, tol_u, (factor, eps))
    errors = [_distance(*pair) for pair in zip(grads, right, strict=True)]
    if not all(e <= b for e, b in zip(errors, bounds, strict=True)):
        moved = Dense(p.truth(torch.float64), _like(value, dense.y), torch.float64)
        there, _ = _gradients(p, moved, narrow, keep, g, tol_u, (factor, eps))
        bounds = [b + (a - c).norm().item() for a, c, b in zip(right, there, bounds, strict=True)]
    for i, (e, b) in enumerate(zip(errors, bounds, strict=True)):
        if not e <= b:
            if failed or (e != e and p.nan_is_due):
                return Verdict(REPORTED, "status of the adjoint" if failed else "NaN where it is due")
            return Verdict(WRONG, f"gradient of leaf {i}: off by {e:.1e} of {right[i].norm():.1e}, bound {b:.1e}")
    admitted = admitted or ("status of the adjoint" if failed else "")
    return Verdict(REPORTED, admitted) if admitted else Verdict(RIGHT)


def _distance(got: Tensor | None, right: Tensor) -> float:
    return (right if got is None else got - right).norm().item()


def _like(state: Any, flat: Tensor) -> Any:
    parts, spec = pytree.tree_flatten(state)
    pieces = flat.split([part.numel() for part in parts])
    return pytree.tree_unflatten([a.reshape(b.shape) for a, b in zip(pieces, parts, strict=True)], spec)


def _gradients(p: Problem, dense: Dense, narrow: Dense, keep: Tensor, g: Tensor, tol: float, precision: tuple) -> tuple:
    """Returns the gradient of each leaf by the adjoint's definition, and a bound of the library's error in it."""
    factor, eps = precision
    j, *b = (m[keep].nan_to_num(0.0) for m in dense.matrices())  # 0 times NaN is 0 here
    j, g = j[:, keep], g[keep]
    u = torch.zeros_like(keep, dtype=torch.float64)
    u[keep] = cotangent(p.adjoint, j, g)
    (_, *right), (pulled, *rounded) = ([m.T @ u[keep] for m in (j, *b)], [v.nan_to_num(0.0) for v in narrow.pull(u)])
    share = (4 * factor * (pulled[keep] - j.T @ u[keep]).norm() / u.norm()).item() + 4 * eps if u.any() else 0.0
    if isinstance(p.adjoint, tdeq.Implicit):
        resolvent = torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(len(j), dtype=j.dtype) - j), 2).item()
        e = resolvent * share
        asked = tol * (g.norm() / u.norm()).item() if u.any() else 0.0
        relative = (resolvent * asked + e) / (1 - e) if e < 1 else float("inf")
    else:
        terms = getattr(p.adjoint, "terms", getattr(p.adjoint, "steps", 1))
        relative = terms * share * max(1.0, torch.linalg.matrix_norm(j, 2).item()) ** terms
    if relative == float("inf"):  # what was asked bounds nothing here
        return right, [relative] * len(right)
    du = relative * u.norm().item()
    least = 4 * eps * max((r.norm().item() for r in right), default=0.0) + rules.EPS
    bounds = []
    for m, exact, near in zip(b, right, rounded, strict=True):
        norm = torch.linalg.matrix_norm(m, 2).item() if m.numel() else 0.0
        bounds.append(norm * (du + 4 * eps * u.norm().item()) + 4 * factor * _distance(near, exact) + least)
    return right, bounds


def _judge_unrolled(p: Problem, value: Any, grads: list[Tensor | None], g: Tensor) -> Verdict:
    """The same steps in float64; `rounding` is that of all of them."""

    def run(made: tuple[Callable, list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
        f, leaves = made
        z = pytree.tree_map_only(Tensor, lambda t: t.detach().to(dtype), p.z0)
        for _ in range(p.adjoint.steps):
            z = pytree.tree_map(lambda a, b: torch.lerp(a, b.to(a.dtype), p.solver.damping), z, f(z))
        out = torch.cat([part.reshape(-1) for part in pytree.tree_leaves(z)])
        if not p.grads:
            return [out.detach().double()]
        options = {"allow_unused": True, "materialize_grads": True}
        made = torch.autograd.grad(out, leaves, g.to(out.dtype), **options) if leaves else ()
        return [out.detach().double(), *(grad.double().reshape(-1) for grad in made)]

    right = run(p.truth(torch.float64), torch.float64)
    rounded, factor, eps = _narrow(p, run)
    got = [torch.cat([part.reshape(-1).double() for part in pytree.tree_leaves(value)]), *grads]
    if len(got) < len(right):
        return Verdict(WRONG, "the value has no graph")
    nan = any(t is not None and t.isnan().any() for t in got)
    if not all(r.isfinite().all() for r in right) or (nan and p.nan_is_due):
        return Verdict(REPORTED, "NaN where it is due")
    size = max(r.norm().item() for r in right)
    for i, (a, exact, near) in enumerate(zip(got, right, rounded, strict=True)):
        error, bound = _distance(a, exact), 4 * factor * _distance(near, exact) + 4 * eps * p.adjoint.steps * size
        if not error <= bound:
            return Verdict(WRONG, f"unrolled, {'leaf' if i else 'value'} {i}: off by {error:.1e}, bound {bound:.1e}")
    return Verdict(RIGHT)


def _judge_pairs(p: Pairs, texts: list[str]) -> Verdict:
    got, solutions = _library(p.got, texts)
    right = p.right()
    admitted = [s for s in solutions if not s.converged.all() or not (s.adjoint is None or s.adjoint.converged.all())]
    size = max(r.norm().item() for r in right)
    for i, (a, b) in enumerate(zip(got, right, strict=True)):
        error = _distance(a, b)
        if not error <= p.bound * size:
            if admitted:
                return Verdict(REPORTED, "status")
            return Verdict(WRONG, f"tensor {i}: off by {error:.1e} of {b.norm():.1e}, bound {p.bound * size:.1e}")
    return Verdict(RIGHT)
