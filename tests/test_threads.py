"""One layer, eight threads: each gets what it gets alone, and afterwards the layer is as it was.

Where threads could disturb one another is not left to chance alone: the cells of these tests meet. In its first two
evaluations of a solve a cell waits until all eight threads are inside one, so that whatever a solve holds in the shared
modules is held eight times at once. A library that lets one solve wait for another is as right: the wait then ends by
itself. Beyond that, Python is made to switch threads often.
"""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import tritondeq as tdeq
from tritondeq import DEQ, Implicit, OneStep, Phantom, Unrolled

THREADS, WIDTH, ROUNDS = 8, 6, 3


@pytest.fixture(autouse=True)
def many_switches():
    threads, interval, dtype = torch.get_num_threads(), sys.getswitchinterval(), torch.get_default_dtype()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


class Meeting:
    """Lets the first evaluations of all threads meet; without a second thread it lets them through."""

    def __init__(self):
        self.barrier, self.seen = None, threading.local()

    def __deepcopy__(self, memo):
        return Meeting()

    def begin(self):
        self.barrier = threading.Barrier(THREADS, timeout=0.3)

    def __call__(self):
        barrier = self.barrier
        if barrier is None or barrier.broken or getattr(self.seen, "barrier", None) == (barrier, 2):
            return
        self.seen.barrier = (barrier, 2 if getattr(self.seen, "barrier", None) == (barrier, 1) else 1)
        try:
            barrier.wait()
        except threading.BrokenBarrierError:
            pass


class Block(nn.Module):
    """tanh(0.6 W z + x), after a hook that makes W and another for what is between."""

    def __init__(self, wrap=lambda m: m, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.between = wrap(nn.Linear(WIDTH, WIDTH)), between or nn.Identity()
        self.meeting = Meeting()

    def forward(self, z, x):
        self.meeting()
        return torch.tanh(0.6 * self.between(self.linear(z)) + x)


class Affine(tdeq.cells.Affine):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(WIDTH, contraction=0.8)
        self.meeting = Meeting()

    def forward(self, z, injection):
        self.meeting()
        return super().forward(z, injection)


class Transformer(tdeq.cells.Transformer):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(WIDTH, heads=2, hidden=4)
        self.meeting = Meeting()

    def forward(self, z, injection):
        self.meeting()
        return super().forward(z, injection)


CELLS = {
    "plain": Block,
    "weight_norm": lambda: Block(weight_norm),
    "spectral_norm": lambda: Block(spectral_norm),
    "affine": Affine,
    "transformer": Transformer,
}


def inputs(cell):
    """An input for each thread."""
    gen = torch.Generator().manual_seed(1)
    shape = (2, 3, WIDTH) if isinstance(cell, Transformer) else (3, WIDTH)
    return [torch.randn(shape, generator=gen) for _ in range(THREADS)]


def together(cell, works):
    """What each of `works` returns, all run at once; raises the first error."""
    made, gate = [None] * len(works), threading.Barrier(len(works))
    cell.meeting.begin()

    def run(i):
        gate.wait()
        try:
            made[i] = works[i]()
        except Exception as error:
            made[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cell.meeting.barrier = None
    for result in made:
        if isinstance(result, Exception):
            raise result
    return made


def layer_of(name, adjoint=Implicit()):  # noqa: B008  frozen
    return DEQ(CELLS[name](), adjoint=adjoint, tol=1e-11, max_steps=300).eval()


def train(layer, x, weights=None):
    """Value and gradients by the parameters and by x."""
    x = x.clone().requires_grad_()
    z = layer(x)
    leaves = [x, *layer.parameters()]
    return [z.detach(), *torch.autograd.grad(z.pow(2).sum(), leaves, allow_unused=True, materialize_grads=True)]


def infer(layer, x, mode=torch.no_grad):
    with mode():
        return [layer(x).clone()]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-8)


def alone(name, works, adjoint=Implicit()):  # noqa: B008  frozen
    """What each of `works` makes of a fresh layer, one after another."""
    return [work(layer_of(name, adjoint)) for work in works]


@pytest.mark.parametrize(
    "adjoint", [Implicit(), Phantom(3, 0.8), OneStep(), Unrolled(20)], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("name", CELLS)
def test_inference_beside_training(name, adjoint):
    xs = inputs(CELLS[name]())
    works = [
        (lambda layer, x=x: train(layer, x)) if i % 2 else (lambda layer, x=x, mode=mode: infer(layer, x, mode))
        for i, (x, mode) in enumerate(
            zip(xs, [torch.no_grad, torch.no_grad, torch.inference_mode, None] * 2, strict=True)
        )
    ]
    wanted, layer = alone(name, works, adjoint), layer_of(name, adjoint)
    for _ in range(ROUNDS):
        for got, expected in zip(together(layer.cell, [lambda w=w: w(layer) for w in works]), wanted, strict=True):
            close(got, expected)


@pytest.mark.parametrize("name", CELLS)
def test_new_weights_are_served_afterwards(name):
    xs = inputs(CELLS[name]())
    layer, other = layer_of(name), layer_of(name)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.7)
    for state in (other.state_dict(), layer_of(name).state_dict()):
        together(layer.cell, [lambda x=x: infer(layer, x) for x in xs])
        layer.load_state_dict(state)
        fresh = layer_of(name)
        fresh.load_state_dict(state)
        for x in xs[:2]:
            close(train(layer, x), train(fresh, x))
        assert list(layer.state_dict()) == list(fresh.state_dict())


@pytest.mark.parametrize("name", CELLS)
def test_weights_loaded_between_rounds(name):
    """Eight threads train at once on the weights of each round."""
    xs, layer = inputs(CELLS[name]()), layer_of(name)
    for k in range(ROUNDS):
        fresh = layer_of(name)
        with torch.no_grad():
            for p in fresh.parameters():
                p.mul_(1 - 0.2 * k)
        layer.load_state_dict(fresh.state_dict())
        wanted = [train(fresh, x) for x in xs]
        for got, expected in zip(together(layer.cell, [lambda x=x: train(layer, x) for x in xs]), wanted, strict=True):
            close(got, expected)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(3, 0.8), Unrolled(20)], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", CELLS)
def test_backward_in_other_threads(name, adjoint):
    """The main thread solves, eight others take the gradients, all at once."""
    xs, layer = [x.requires_grad_() for x in inputs(CELLS[name]())], layer_of(name, adjoint)
    wanted = [train(layer_of(name, adjoint), x.detach())[1:] for x in xs]
    losses = [layer(x).pow(2).sum() for x in xs]

    def pull(loss, x):
        leaves = [x, *layer.parameters()]
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    works = [lambda loss=loss, x=x: pull(loss, x) for loss, x in zip(losses, xs, strict=True)]
    for got, expected in zip(together(layer.cell, works), wanted, strict=True):
        close(got, expected)


@pytest.mark.parametrize("name", CELLS)
def test_gradient_by_an_input_that_another_thread_made(name):
    """A pipeline: the encoder ran in the main thread, which has made more nodes of autograd's than a worker has."""
    xs, layer = inputs(CELLS[name]()), layer_of(name)
    encoder = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(8)])

    def gradient(layer, h):
        z = layer(h)
        return list(
            torch.autograd.grad(z.pow(2).sum(), [h, *layer.parameters()], materialize_grads=True, allow_unused=True)
        )

    hs = [encoder(x) for x in xs]
    wanted = [gradient(layer_of(name), h.detach().requires_grad_()) for h in hs]
    for got, expected in zip(together(layer.cell, [lambda h=h: gradient(layer, h) for h in hs]), wanted, strict=True):
        close(got, expected)


@pytest.mark.parametrize("name", CELLS)
def test_warm_starts(name):
    """Each thread follows its drifting input, from where it was: the answer is that of a cold start."""
    xs, layer = inputs(CELLS[name]()), layer_of(name)
    cold = [[infer(layer_of(name), x * (1 + 0.1 * k))[0] for k in range(3)] for x in xs]

    def follow(x):
        seen, z = [], None
        for k in range(3):
            z = layer(x * (1 + 0.1 * k), z0=z).detach()
            seen.append(z)
        return seen

    close(together(layer.cell, [lambda x=x: follow(x) for x in xs]), cold)


class Watched(tdeq.FixedDropout):
    """Remembers, for each thread, which elements its evaluations set to zero."""

    def __init__(self, p):
        super().__init__(p)
        self.patterns = {}

    def forward(self, x):
        out = super().forward(x)
        self.patterns.setdefault(threading.get_ident(), []).append(out.detach() != 0)
        return out


def test_a_dropout_mask_is_that_of_one_solve():
    """Batches of eight sizes: each solve holds one mask, and has value and gradient of the cell with that mask."""
    layer = DEQ(Block(between=Watched(0.4)), tol=1e-11, max_steps=300).train()
    xs = [torch.randn(rows, WIDTH) for rows in range(1, THREADS + 1)]

    def work(x):
        got = train(layer, x)
        return got, layer.cell.between.patterns[threading.get_ident()]

    for x, (got, patterns) in zip(xs, together(layer.cell, [lambda x=x: work(x) for x in xs]), strict=True):
        assert all(torch.equal(mask, patterns[0]) for mask in patterns)
        cell = Block(between=nn.Identity())
        cell.load_state_dict(layer.cell.state_dict())
        cell.between.forward = lambda y, mask=patterns[0]: y * mask / 0.6
        close(got, train(DEQ(cell, adjoint=Unrolled(120)), x))
    ones = torch.ones(50)
    assert not torch.equal(layer.cell.between(ones), layer.cell.between(ones)), "a mask is still held"


def test_a_copy_of_a_layer_in_use_is_a_layer():
    """A server copies its layer while others solve."""
    layer, xs = layer_of("weight_norm"), inputs(Block())
    wanted = [infer(layer_of("weight_norm"), x) for x in xs]
    works = [lambda x=x: infer(layer, x) for x in xs[:-1]] + [lambda: infer(copy.deepcopy(layer), xs[-1])]
    for got, expected in zip(together(layer.cell, works), wanted, strict=True):
        close(got, expected)
