"""Kinds of cases that are one solve: cells, closures, and all ways to call a layer. `KINDS` is the table."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from fuzz_draw import WIDE, Draw, in_thread, options, precision
from fuzz_judge import Problem
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import tritondeq as tdeq
from tritondeq import Anderson, Broyden, Implicit, Neumann, OneStep


# Ways to call: each takes (layer, x, z0) and returns a Solution.
def plainly(layer: tdeq.DEQ, x: Any, z0: Any) -> Any:
    return layer.solve(x, z0)


def checkpointed(reentrant: bool) -> Callable:
    def call(layer: tdeq.DEQ, x: Any, z0: Any) -> Any:
        inputs, spec = pytree.tree_flatten(x)
        value = checkpoint(lambda *t: layer(pytree.tree_unflatten(t, spec), z0), *inputs, use_reentrant=reentrant)
        return _Recomputed(layer, value)

    return call


class _Recomputed:
    """The Solution that the layer has now: checkpointing makes another one in the backward pass."""

    def __init__(self, layer: tdeq.DEQ, value: Any):
        self.value, self._layer = value, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer.last, name)


def from_encoder(layer: tdeq.DEQ, x: Any, z0: Any) -> Any:
    for _ in range(20):  # further nodes of autograd's, in this thread
        x = pytree.tree_map_only(Tensor, lambda t: t * 1 if t.is_floating_point() else t, x)
    return in_thread(lambda: layer.solve(x, z0)) if layer.training else layer.solve(x, z0)


def called_twice(layer: tdeq.DEQ, x: Any, z0: Any) -> Any:
    first = layer.solve(x, z0)
    other = layer.solve(pytree.tree_map_only(Tensor, lambda t: t * 1 if t.is_floating_point() else t, x), z0).value
    nothing = sum(0 * leaf.sum() for leaf in pytree.tree_leaves(other))
    return replace(first, value=pytree.tree_map(lambda leaf: leaf + nothing, first.value))


def functional(layer: tdeq.DEQ, x: Any, z0: Any) -> Any:
    weights = {name: p * 1 for name, p in layer.named_parameters()}
    value = torch.func.functional_call(layer, weights, (x, z0))
    return replace(layer.last, value=value)


def twice(loss: Tensor) -> None:
    half = 0.5 * loss
    half.backward(retain_graph=True)
    half.backward()


CALLS = [plainly, plainly, from_encoder, called_twice, functional, checkpointed(False), checkpointed(True)]
PULLS = [
    Tensor.backward,
    Tensor.backward,
    lambda loss: in_thread(loss.backward),
    twice,
]


def of_cell(
    draw: Draw,
    cell: nn.Module,
    x: Any,
    *,
    wide: bool = False,
    train: bool | None = None,
    inference: bool = True,
    **given: Any,
) -> Problem:
    """Returns a case of a cell in float64 and its input, called in a random way.

    It stays in float64 where `wide`, and in train() or eval() as `train` has it; without `inference` it is not tried.
    """
    dtype, autocast = precision(draw)
    if wide:
        dtype, autocast = WIDE, False

    def cast(state: Any, to: torch.dtype) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.to(to) if t.is_floating_point() else t, state)

    asked = options(draw, dtype) | {k: given.pop(k) for k in ("adjoint", "solver", "tol") if k in given}
    if autocast:
        asked["tol"] = draw.choice([1e-2, 3e-2])
    pristine = copy.deepcopy(cell)
    cell, x = cell.to(dtype), cast(x, dtype)
    for p in cell.parameters():
        p.requires_grad_(not draw.chance(0.1))
    inputs = [t.requires_grad_() for t in pytree.tree_leaves(x) if t.is_floating_point()]
    names = [name for name, p in cell.named_parameters() if p.requires_grad]
    dims = getattr(cell, "batch_dims", 1)
    ours = isinstance(cell, tdeq.cells.Cell)
    layer = tdeq.DEQ(cell, **asked)
    layer.train(draw.chance(0.5) if train is None else train)
    masks = _record_masks(cell)
    with torch.no_grad():
        start = cell.initial(x, cell.inject(x)) if ours else torch.zeros_like(x)
    warm = None
    if draw.chance(0.2):
        warm = pytree.tree_map(lambda t: draw.stored(draw.randn(*t.shape, scale=0.3).to(dtype)), start)
    way, grads = draw.choice(CALLS), draw.chance(0.9)
    silent = draw.choice([torch.no_grad, torch.inference_mode] if inference else [torch.no_grad])
    batch_norm = any(isinstance(m, nn.BatchNorm1d) for m in cell.modules()) and layer.training

    def call() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if grads:
                return way(layer, x, warm)
            with silent():
                return layer.solve(x, warm)

    def truth(to: torch.dtype) -> tuple[Callable, list[Tensor]]:
        twin = copy.deepcopy(pristine)
        twin.load_state_dict(cell.state_dict())
        twin = twin.to(to).train(batch_norm)
        plain: dict[str, nn.Module] = {name: _Masked(mask.to(to, copy=True)) for name, mask in masks.items()}
        plain |= {name: _Looped(m.cell) for name, m in twin.named_modules() if isinstance(m, tdeq.DEQ)}
        for name, other in plain.items():
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, other)
        again = cast(pytree.tree_map_only(Tensor, Tensor.detach, x), to)
        points = [t.requires_grad_() for t in pytree.tree_leaves(again) if t.is_floating_point()]
        parameters = dict(twin.named_parameters())
        injection = twin.inject(again) if ours else again
        return lambda z: twin(z, injection), [*points, *(parameters[name] for name in names)]

    parameters = dict(cell.named_parameters())
    return Problem(
        call,
        truth,
        [*inputs, *(parameters[name] for name in names)],
        start if warm is None else warm,
        asked["adjoint"],
        asked["solver"],
        asked["tol"],
        dims,
        dtype,
        autocast,
        grads=grads,
        pull=draw.choice(PULLS),
        scale=draw.choice([1.0, 1.0, 1e-6, 1e4]),
        **given,
    )


class _Masked(nn.Module):
    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class _Looped(nn.Module):
    """What a layer within a cell is, as a loop: 40 steps of a map of rate 0.4."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        z, injection = torch.zeros_like(x), self.cell.inject(x) if isinstance(self.cell, tdeq.cells.Cell) else x
        for _ in range(40):
            z = self.cell(z, injection)
        return z


def _record_masks(cell: nn.Module) -> dict[str, Tensor]:
    """Returns a dict that the first evaluation of the cell fills with the masks of its FixedDropout."""
    masks: dict[str, Tensor] = {}
    for name, module in cell.named_modules():
        if isinstance(module, tdeq.FixedDropout) and module.p:

            def keep(module: Any, inputs: Any, out: Tensor, name: str = name) -> None:
                if module.training:
                    masks.setdefault(name, (out.detach() != 0).to(WIDE) / (1 - module.p))

            module.register_forward_hook(keep)
    return masks


# The cells of the library.
def rows(draw: Draw, n: int) -> Tensor:
    shape = draw.choice([(3,), (1,), (5,), (2, 2), (1, 3), (0,), (2, 0)])
    return draw.stored(draw.randn(*shape, n))


def affine(draw: Draw) -> Problem:
    n, inputs = draw.choice([1, 2, 3, 5]), draw.choice([None, 2])
    bound = draw.choice([None, None, None, 0.8])
    activation = draw.choice(["tanh", "relu", "gelu", "sin", "identity"])
    cell = tdeq.cells.Affine(n, inputs, activation=activation, contraction=bound, bias=draw.chance(0.7), dtype=WIDE)
    if bound is None:
        cell.weight.data.mul_(draw.choice([0.3, 0.8, 1.0, 1.08, 1.3, 1.8]))
    return of_cell(draw, cell, rows(draw, inputs or n))


def monotone(draw: Draw) -> Problem:
    n, activation = draw.choice([1, 2, 3, 5]), draw.choice(["relu", "tanh"])
    cell = tdeq.cells.Monotone(n, activation=activation, margin=draw.choice([1.0, 0.5]), dtype=WIDE)
    a, b = (getattr(cell.parametrizations.weight, name) for name in ("original0", "original1"))
    a.data, b.data = a.data + draw.randn(n, n, scale=0.3), b.data + draw.randn(n, n, scale=0.5)
    alpha = draw.choice([0.5, 1.0, 2.0])
    solver = draw.choice([tdeq.PeacemanRachford(alpha), tdeq.ForwardBackward(), Anderson(), Broyden()])
    adjoint = draw.choice([Implicit(), Implicit(), Implicit(solver=Broyden(), max_steps=300), Neumann(3), OneStep()])
    problem = of_cell(draw, cell, rows(draw, n), solver=solver, adjoint=adjoint)

    def slack(value: Tensor) -> float:
        """What a residual of the split map allows f: 1 / alpha + ||I - W||, and w's size beside z's (twice, in u)."""
        w, b = cell.weight.detach().double(), cell.input.bias.detach().double()
        norm = torch.linalg.matrix_norm(torch.eye(n, dtype=WIDE) - w, 2).item()
        step = alpha if isinstance(solver, tdeq.PeacemanRachford) else cell.margin / norm**2
        u = problem.leaves[0].detach().double() @ cell.input.weight.detach().double().T + b
        z = value.double()
        w_norm = (z - step * (z @ w.T + u - z)).norm(dim=-1) / z.norm(dim=-1).clamp_min(1e-30)
        return (1 / step + norm) * max(1.0, w_norm.max().item()) * max(1.0, step * norm + 1)

    if isinstance(solver, tdeq.solvers.splitting.SplittingSolver):
        problem.slack = slack
    return problem


def mlp(draw: Draw) -> Problem:
    n, form = draw.choice([2, 3, 5]), draw.choice(["post", "pre"])
    cell = tdeq.cells.MLP(
        n, hidden=3, form=form, activation=draw.choice(["relu", "gelu", "silu", "swiglu"]), dtype=WIDE
    )
    cell.down.weight.data.mul_(draw.choice([1.0, 1.0, 3.0]))
    return of_cell(draw, cell, rows(draw, n))


def gated(draw: Draw) -> Problem:
    n = draw.choice([1, 2, 3, 5])
    return of_cell(draw, tdeq.cells.Gated(n, contraction=draw.choice([None, 0.9]), dtype=WIDE), rows(draw, n))


def conv(draw: Draw) -> Problem:
    dims, normed = draw.choice([1, 2]), draw.chance(0.4)
    cell = tdeq.cells.Conv(2, kernel_size=draw.choice([1, 3]), groups=1, dims=dims, weight_norm=normed, dtype=WIDE)
    return of_cell(draw, cell, draw.stored(draw.randn(draw.choice([1, 2]), 2, *[draw.choice([2, 3]), 2][:dims])))


def multiscale(draw: Draw) -> Problem:
    cell = tdeq.cells.MultiScale((2, 2), groups=1, weight_norm=draw.chance(0.4), dtype=WIDE)
    return of_cell(draw, cell, draw.stored(draw.randn(draw.choice([1, 2]), 2, 2, draw.choice([2, 3]))))


def transformer(draw: Draw) -> Problem:
    tokens, batch = draw.choice([1, 2, 3]), draw.choice([1, 2])
    wiring, kv = draw.choice(["outer", "damped", "head"]), draw.choice([1, 2])
    cell = tdeq.cells.Transformer(
        4, heads=2, kv_heads=kv, hidden=3, wiring=wiring, causal=draw.chance(0.5), rotary=draw.choice([None, 100.0]),
        decay=draw.chance(0.3), dropout=draw.choice([0, 0, 0.2]), activation=draw.choice(["swiglu", "gelu"]),
        dtype=WIDE,
    )  # fmt: skip
    x = draw.stored(draw.randn(batch, tokens, 4))
    real = torch.arange(tokens) < torch.tensor([[draw.randint(1, tokens)] for _ in range(batch)])
    if not draw.chance(0.4):
        return of_cell(draw, cell, x)
    return of_cell(draw, cell, (x, real), mask=real)


KINDS: dict[str, tuple[int, Callable[[Draw], Any]]] = {
    "Affine": (6, affine),
    "Monotone": (4, monotone),
    "MLP": (3, mlp),
    "Gated": (3, gated),
    "Conv": (2, conv),
    "MultiScale": (1, multiscale),
    "Transformer": (3, transformer),
}
