"""Kinds of cases that are whole programs: second derivatives, side outputs, threads, ... `PROGRAMS` is the table.

All are in float64, with contractions of rate Q and tolerance TOL. The reference is z + (I - J)^-1 (f(z) - z), taken
three times at the fixed point of a loop, with (I - J)^-1 a constant: autograd through it is exact to the third order.
Each of at most three solves in a row (value, adjoint, tangent) is off by TOL / (1 - Q) at most, which six derivatives
of tanh and of the loss, each at most 2, pass on: BOUND.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from fuzz_draw import WIDE, Draw, in_thread
from fuzz_judge import Pairs
from fuzz_modules import Keeping, Leaving, Tanh, Yielding, normed
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import tritondeq as tdeq
from tritondeq import Anderson, Broyden, Implicit, Neumann, OneStep, Phantom, Picard, Unrolled

TOL, Q = 1e-12, 0.6
BOUND = 2**6 * TOL / (1 - Q) ** 3


def exact(f: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Returns the fixed point of f, three times differentiable."""
    with torch.no_grad():
        z = torch.zeros_like(like)
        for _ in range(80):
            z = f(z)
    j = torch.autograd.functional.jacobian(f, z).reshape(z.numel(), -1)
    inverse = torch.linalg.inv(torch.eye(z.numel(), dtype=WIDE) - j)
    for _ in range(3):
        z = z + (inverse @ (f(z) - z).reshape(-1)).reshape(z.shape)
    return z


def grads(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradients, None where there is none."""
    if not loss.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def filled(tensors: list[Tensor | None], leaves: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) if t is None else t for t, leaf in zip(tensors, leaves, strict=True)]


class Subject:
    """A layer, its cell of rate Q, an input and what gradients are taken by."""

    def __init__(self, draw: Draw, make: Callable | None = None, approximate: bool = False):
        self.cell = (make or Tanh)(draw, 3)
        if make is None:
            self.cell.linear.weight.data.mul_(Q / 0.7)
        self.x = draw.randn(2, 3).requires_grad_()
        self.solver = draw.choice([Picard(), Anderson(), Broyden()])
        adjoints = [Implicit(), Implicit(solver=Anderson()), Implicit(solver=Broyden())]
        if isinstance(self.solver, Picard):
            adjoints.append(Unrolled(80))
        if approximate:
            adjoints += [Neumann(2), Phantom(3, 0.8), OneStep()]
        self.layer = tdeq.DEQ(self.cell, solver=self.solver, adjoint=draw.choice(adjoints), tol=TOL, max_steps=300)
        self.leaves = [self.x, *self.cell.parameters()]
        self.weight = draw.randn(2, 3)

    def exact(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return exact(lambda z: self.cell(z, x), x)

    def pair(self, program: Callable[[Callable], list[Tensor | None]], words: str | None = None, **given: Any) -> Pairs:
        """Returns the case of a program that takes the layer, or what stands for it."""
        return Pairs(
            lambda: (program(self.layer), [self.layer.last] if self.layer.last is not None else []),
            lambda: filled(program(self.exact), self.leaves),
            BOUND,
            words,
            **given,
        )


SECOND = r"second|third|derivative|approximation"


def penalty(draw: Draw) -> Pairs:
    """A gradient penalty or a Hessian-vector product, by all leaves."""
    subject, v, square = Subject(draw, approximate=True), draw.randn(2, 3), draw.chance(0.5)
    threaded = draw.chance(0.3)

    def program(layer: Callable) -> list[Tensor | None]:
        loss = (layer(subject.x).sin() * subject.weight).sum()
        (g,) = torch.autograd.grad(loss, subject.x, create_graph=True)
        total = g.pow(2).sum() if square else (g * v).sum()
        return in_thread(lambda: grads(total, subject.leaves)) if threaded else grads(total, subject.leaves)

    return subject.pair(program, SECOND)


def third(draw: Draw) -> Pairs:
    subject = Subject(draw)

    def program(layer: Callable) -> list[Tensor | None]:
        out = (layer(subject.x).sin() * subject.weight).sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(out, subject.x, create_graph=True)
            out = (g * subject.weight).sum()
        return grads(out, subject.leaves)

    return subject.pair(program, SECOND)


def functional(draw: Draw) -> Pairs:
    """torch.autograd.functional: derivatives by the cotangent."""
    subject, v = Subject(draw), draw.randn(2, 3)
    subject.leaves = [subject.x]
    name = draw.choice(["jvp", "hvp", "vhp"])

    def program(layer: Callable) -> list[Tensor | None]:
        f = layer if name == "jvp" else lambda x: layer(x).pow(3).sum()
        return [getattr(torch.autograd.functional, name)(f, subject.x.detach(), v)[1]]

    return subject.pair(program, SECOND)


def gauss_newton(draw: Draw) -> Pairs:
    """The tangent of the parameters: the gradient, differentiated by its cotangent."""
    subject = Subject(draw)

    def program(layer: Callable) -> list[Tensor | None]:
        u = torch.zeros(2, 3, dtype=WIDE, requires_grad=True)
        pulled = torch.autograd.grad(layer(subject.x), list(subject.cell.parameters()), u, create_graph=True)
        return grads(sum(p.sum() for p in pulled), [u])

    subject.leaves = [subject.x]
    return subject.pair(program, SECOND)


def side_output(draw: Draw) -> Pairs:
    """A loss of what the cell leaves in an attribute, or of what a hook takes; alone or beside a loss of z."""
    subject, a, hooked = Subject(draw, Leaving), draw.choice([0, 1]), draw.chance(0.5)
    seen: list[Tensor] = []
    subject.cell.linear.register_forward_hook(lambda m, i, o: seen.append(o))

    def program(layer: Callable) -> list[Tensor | None]:
        z = layer(subject.x)
        if layer is not subject.layer:
            subject.cell(z, subject.x)
        extra = seen[-1].pow(3).sum() if hooked else subject.cell.balance
        return grads(a * (z * subject.weight).sum() + extra, subject.leaves)

    return subject.pair(program, r"return|outside|attribute|hook|left|leaves|side|after the solve|no graph")


def kept_weight(draw: Draw) -> Pairs:
    subject = Subject(draw, Keeping)

    def program(layer: Callable) -> list[Tensor | None]:
        if layer is not subject.layer:
            subject.cell.kept = 0.8 * torch.sin(subject.cell.linear.weight)
        return grads((layer(subject.x) * subject.weight).sum(), subject.leaves)

    return subject.pair(program, r"cach|kept|keeps|first evaluation|no_grad|graph|differ")


def stepped(draw: Draw) -> Pairs:
    """What f uses changes in place between forward and backward: the old gradient, or an error, torch's or ours."""
    subject, which = Subject(draw), draw.choice(["weight", "input"])

    def program(layer: Callable) -> list[Tensor | None]:
        h = subject.x * 1
        z = layer(h)
        if layer is subject.layer:
            with torch.no_grad():
                (subject.cell.linear.weight if which == "weight" else h).mul_(0.5)
        made = grads((z * subject.weight).sum(), subject.leaves)
        return made

    before = subject.cell.linear.weight.detach().clone()

    def right() -> list[Tensor]:
        subject.cell.linear.weight.data.copy_(before)
        return filled(program(subject.exact), subject.leaves)

    pair = subject.pair(program, r"in.?place|modif|version|changed", any_error=True)
    pair.right = right
    return pair


def changed_output(draw: Draw) -> Pairs:
    """What the layer returned is changed in place, as is any tensor."""
    subject = Subject(draw)

    def program(layer: Callable) -> list[Tensor | None]:
        return grads((layer(subject.x).mul_(2).add_(1).pow(2) * subject.weight).sum(), subject.leaves)

    return subject.pair(program, r"in.?place", any_error=True)  # the last step of Unrolled may need its output


def composed(draw: Draw) -> Pairs:
    """A layer of a layer: the same weights twice in one graph, and an input that is no leaf."""
    subject, threaded = Subject(draw), draw.chance(0.5)

    def program(layer: Callable) -> list[Tensor | None]:
        h = layer(subject.x).sin()
        z = in_thread(lambda: layer(h)) if threaded else layer(h)
        return grads((z * subject.weight).sum(), subject.leaves)

    return subject.pair(program)


def reloaded(draw: Draw) -> Pairs:
    """Other weights after calls without gradients: they are served."""
    subject = Subject(draw, normed)
    mode = draw.choice([torch.no_grad, torch.inference_mode])
    state = {name: t * draw.choice([0.5, -1.0]) for name, t in subject.cell.state_dict().items() if "0._" not in name}

    def program(layer: Callable) -> list[Tensor | None]:
        if layer is subject.layer:
            with mode():
                layer(subject.x)
            subject.cell.load_state_dict(state, strict=False)
        return grads((layer(subject.x) * subject.weight).sum(), subject.leaves)

    return subject.pair(program)


def start(draw: Draw) -> Pairs:
    """Only Unrolled gives z0 a gradient; for others it has none."""
    subject = Subject(draw)
    z0, steps = draw.randn(2, 3).requires_grad_(), 5
    unrolled = draw.chance(0.7)
    adjoint = Unrolled(steps) if unrolled else Implicit()
    layer = tdeq.DEQ(subject.cell, adjoint=adjoint, tol=TOL, max_steps=300)

    def right() -> list[Tensor]:
        z = z0 if unrolled else subject.exact()
        for _ in range(steps if unrolled else 0):
            z = subject.cell(z, subject.x)
        return filled(grads((z * subject.weight).sum(), [z0, *subject.leaves]), [z0, *subject.leaves])

    def got() -> tuple[list[Tensor | None], list[Any]]:
        return grads((layer(subject.x, z0) * subject.weight).sum(), [z0, *subject.leaves]), []

    return Pairs(got, right, BOUND)


def transforms(draw: Draw) -> Pairs:
    """torch.func over a layer."""
    subject, name = Subject(draw), draw.choice(["grad", "vmap", "jvp", "vjp"])

    def program(layer: Callable) -> list[Tensor | None]:
        if layer is not subject.layer:
            z = layer(subject.x)
            return {"vmap": [z], "jvp": [z]}.get(name) or grads((z * subject.weight).sum(), [subject.x])
        if name == "grad":
            return [torch.func.grad(lambda x: (layer(x) * subject.weight).sum())(subject.x)]
        if name == "vjp":
            return [torch.func.vjp(layer, subject.x)[1](subject.weight)[0]]
        if name == "jvp":
            return [torch.func.jvp(layer, (subject.x.detach(),), (subject.weight,))[0]]
        return [torch.vmap(lambda x: layer(x[None])[0])(subject.x)]

    def alone(layer: Callable) -> list[Tensor | None]:
        made = program(layer)
        subject.layer.last = None  # its tensors may be read within the transform only
        return made

    subject.leaves = [subject.x]
    return subject.pair(alone, r"torch\.func|functorch|transform|vmap|forward.mode")


def threads(draw: Draw) -> Pairs:
    """Several solves of one layer at once, some of them without gradients: each gets what it gets alone."""

    def make(draw: Draw, n: int) -> nn.Module:
        cell = Yielding(draw, n)
        draw.choice([spectral_norm, weight_norm, lambda m: m])(cell.linear)
        return cell.eval()

    subject = Subject(draw, make)
    subject.layer.eval()
    twin = copy.deepcopy(subject.cell)  # a race may spoil the layer for good
    xs = [draw.randn(2, 3).requires_grad_() for _ in range(4)]

    def one(x: Tensor, i: int, layer: Callable, cell: nn.Module) -> list[Tensor | None]:
        with torch.set_grad_enabled(i != 3):
            z = layer(x)
        return [z.detach(), *grads((z * subject.weight).sum(), [x, *cell.parameters()])]

    def got() -> tuple[list[Tensor | None], list[Any]]:
        made: list[Any] = [None] * 4
        gate = threading.Barrier(4)

        def run(i: int) -> None:
            gate.wait()
            try:
                made[i] = one(xs[i], i, subject.layer, subject.cell)
            except Exception as error:
                made[i] = error

        workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
        for error in made:
            if isinstance(error, Exception):
                raise error
        return sum(made, []), []

    def alone(i: int) -> Callable[[Tensor], Tensor]:
        def layer(x: Tensor) -> Tensor:
            z = exact(lambda z: twin(z, x), x)
            return z.detach() if i == 3 else z

        return layer

    def right() -> list[Tensor]:
        lists = [one(x, i, alone(i), twin) for i, x in enumerate(xs)]
        return [torch.zeros(()) if t is None else t for made in lists for t in made]

    return Pairs(got, right, BOUND)


def padding(draw: Draw) -> Pairs:
    """A Transformer's padding as mask=: what layer((x, mask)) is at real tokens, or words."""
    cell = tdeq.cells.Transformer(4, heads=2, hidden=3, wiring=draw.choice(["outer", "damped"]), dtype=WIDE)
    layer, x = tdeq.DEQ(cell, tol=TOL, max_steps=300), draw.randn(2, 3, 4)
    real = torch.tensor([[True, True, False], [True] * 3])
    words = r"\(x, ?mask\)|pair|tuple|attend|attention|padding"
    return Pairs(lambda: ([layer(x, mask=real)[real]], []), lambda: [layer((x, real))[real].detach()], BOUND, words)


PROGRAMS: dict[str, tuple[int, Callable[[Draw], Any]]] = {
    "second derivative": (4, penalty),
    "third derivative": (1, third),
    "autograd.functional": (3, functional),
    "tangent of weights": (1, gauss_newton),
    "side output": (2, side_output),
    "kept weight": (1, kept_weight),
    "changed before backward": (2, stepped),
    "output changed": (1, changed_output),
    "layer of a layer": (2, composed),
    "weights reloaded": (2, reloaded),
    "z0": (1, start),
    "torch.func of a layer": (1, transforms),
    "threads": (2, threads),
    "padding as mask=": (1, padding),
}
