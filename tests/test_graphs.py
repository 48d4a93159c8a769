"""`DEQ(..., graph=True)` without a GPU: what would be a replay is the work itself, done again on the same memory.

That holds what is copied where, when a captured point is stale, and what is refused; not CUDA's own part.
"""

import copy
import gc
import weakref

import pytest
import torch
from replays import Recorder
from torch import nn

import tritondeq as tdeq
from tritondeq import (
    DEQ,
    Anderson,
    Broyden,
    FixedDropout,
    Implicit,
    Neumann,
    OneStep,
    Phantom,
    Picard,
    Unrolled,
    cuda_graphs,
)
from tritondeq.cells import Affine
from tritondeq.kernels import launch
from tritondeq.kernels.steps.affine import AffineSteps

WIDTH = 6
SAYS = ("graphs of 3 steps", "one graph")


@pytest.fixture(autouse=True, params=[False, True], ids=["chunks", "while"])
def recorded(monkeypatch, request):
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(Recorder, "repeats", request.param)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    Recorder.made = 0
    with tdeq.backend("triton"):
        yield


class Cell(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), FixedDropout(dropout)
        nn.init.normal_(self.linear.weight, std=0.25)

    def forward(self, z, x):
        return torch.tanh(self.dropout(self.linear(z)) + x)


def pair(dropout=0.0, **options):
    """(captured, plain) with weights of the same values."""
    cell = Cell(dropout)
    options = {"tol": 1e-5, "max_steps": 40} | options
    return DEQ(copy.deepcopy(cell), graph=True, **options), DEQ(cell, **options)


def both(layers, work):
    """What `work` makes of each layer, from the same seed, must be close."""
    results = []
    for layer in layers:
        torch.manual_seed(5)
        results.append(work(layer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return results[0]


def inputs(*scales, rows=3):
    return [(s * torch.randn(rows, WIDTH)).requires_grad_() for s in scales]


@pytest.mark.parametrize(
    "solver, adjoint",
    [
        (Picard(), Implicit()),
        (Picard(damping=0.8), Phantom(4, 0.7)),
        (Anderson(memory=3), Implicit(solver=Picard(), tol=1e-6, max_steps=50)),
        (Broyden(memory=3), Implicit()),
    ],
    ids=str,
)
def test_values_steps_and_gradients(solver, adjoint):
    """Two calls before one backward, then all again with other inputs: nothing new is captured."""
    layers = pair(solver=solver, adjoint=adjoint)

    def work(layer):
        out = []
        for x, y in (inputs(1.0, 2.0), inputs(0.3, 0.1)):
            first, second = layer.solve(x), layer.solve(y)
            loss = (first.value * second.value.exp()).sum()
            grads = torch.autograd.grad(loss, [x, y, *layer.parameters()])
            out += [first.value, second.value, first.steps, second.steps, first.residual, first.status, *grads]
        return out

    both(layers, work)
    says = SAYS[Recorder.repeats] if isinstance(solver, Picard) else SAYS[Recorder.repeats].replace("3", "4")
    assert says in layers[0].last.path and "graph" not in layers[1].last.path
    assert len(layers[0]._graphs.solves) == 1
    made = Recorder.made
    work(layers[0])
    assert Recorder.made == made


@pytest.mark.parametrize("adjoint", [Neumann(3), OneStep()], ids=str)
def test_other_adjoints(adjoint):
    both(pair(adjoint=adjoint), lambda layer: torch.autograd.grad(layer(*inputs(1.0)).sum(), list(layer.parameters())))


@pytest.mark.parametrize("solver", [Picard(), Broyden(memory=2)], ids=str)
@pytest.mark.parametrize("most", [1, 2, 3, 4, 7])
def test_most_steps_that_fill_no_chunk(most, solver):
    layers = pair(max_steps=most, tol=1e-9, solver=solver)

    def work(layer):
        solution = layer.solve(inputs(1.0)[0])
        return [solution.value, solution.steps, solution.status, solution.residual]

    _, steps, status, _ = both(layers, work)
    assert (steps == most).all() and (status == tdeq.Status.MAX_STEPS).all()


@torch.no_grad()
@pytest.mark.parametrize("recorded", [False], indirect=True)
@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=2), Broyden(memory=2)], ids=str)
def test_a_chunk_leaves_the_buffers_where_it_found_them(solver, recorded):
    """A replay writes to the places of its capture, whatever was replayed before it."""
    layer, _ = pair(solver=solver)
    layer(torch.randn(3, WIDTH))
    (captured,) = layer._graphs.solves.values()
    steps = captured.forward.steps

    def places():
        return [getattr(steps, name).data_ptr() for name in ("z", "prev", "next", "best")]

    before = places()
    captured.forward.more()
    assert places() == before
    steps.onward()
    assert places() != before


def test_a_call_is_not_kept_alive():
    """Neither its input, with the graph behind it, nor its solution, once the caller has let go."""
    layer, _ = pair()
    (x,) = inputs(1.0)
    before = x * 2
    watched = weakref.ref(before)
    z = layer(before)
    z.sum().backward(retain_graph=True)
    points = [weakref.ref(p) for p in gc.get_objects() if type(p) is cuda_graphs.CapturedPoint]
    del before, z
    gc.collect()
    assert watched() is None and points and all(p() is None for p in points)


def test_training_in_place():
    """An optimizer updates the parameters under the captured graphs."""
    layers = pair()

    def work(layer):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
        losses = []
        (x,) = inputs(1.0)
        for _ in range(6):
            loss = layer(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    losses = both(layers, work)
    assert losses[-1] < losses[0] and len(layers[0]._graphs.solves) == 1


def test_weights_that_move_are_captured_again():
    layer, _ = pair()
    (x,) = inputs(1.0)
    first = layer(x)
    layer.cell.linear.weight.data = 0.5 * layer.cell.linear.weight.data
    assert not torch.allclose(layer(x), first) and len(layer._graphs.solves) == 2


def test_retained_graphs_and_backwards_out_of_order():
    layers = pair()

    def work(layer):
        x, y = inputs(1.0, 3.0)
        a, b = layer(x).sin().sum(), layer(y).sin().sum()
        params = list(layer.parameters())
        ga = torch.autograd.grad(a, [x, *params], retain_graph=True)
        gb = torch.autograd.grad(b, [y, *params])
        layer(2 * y.detach())
        again = torch.autograd.grad(a, [x, *params])
        assert all(torch.equal(p, q) for p, q in zip(ga, again, strict=True))
        return [*ga, *gb]

    both(layers, work)


def test_dropout_masks_are_those_of_the_call():
    layers = pair(dropout=0.5)

    def work(layer):
        x, y = inputs(1.0, 1.0)
        a, b = layer(x), layer(y)
        return [a, b, *torch.autograd.grad((a * b).sum(), [x, y, *layer.parameters()])]

    both(layers, work)
    assert len(layers[0]._graphs.solves) == 1
    x = inputs(1.0)[0]
    assert not torch.allclose(layers[0](x), layers[0](x))


def test_masks_and_starts():
    layers = pair()

    def work(layer):
        out = []
        for seen in (torch.rand(3, WIDTH) > 0.3, torch.rand(3, WIDTH) > 0.6):
            (x,) = inputs(1.0)
            solution = layer.solve(x, z0=torch.randn(3, WIDTH), mask=seen)
            out += [solution.value, solution.steps, *torch.autograd.grad(solution.value.sum(), [x])]
        return out

    both(layers, work)
    assert len(layers[0]._graphs.solves) == 1


def test_autocast():
    layers = pair(tol=1e-2)

    def work(layer):
        (x,) = inputs(1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = layer(x)
        return [z, *torch.autograd.grad(z.sum(), [x, *layer.parameters()])]

    results = [w.float() for layer in layers for w in [torch.manual_seed(5) and work(layer)[0]]]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_each_shape_is_captured_and_the_oldest_forgotten():
    layer, _ = pair()
    with torch.no_grad():
        for rows in range(1, cuda_graphs.CACHE + 3):
            layer(torch.zeros(rows, WIDTH))
    assert len(layer._graphs.solves) == cuda_graphs.CACHE
    made = Recorder.made
    with torch.no_grad():
        layer(torch.zeros(cuda_graphs.CACHE + 2, WIDTH))
        assert Recorder.made == made
        layer(torch.zeros(1, WIDTH))
        assert Recorder.made > made


def test_each_memory_format_is_captured():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, z, x):
            return torch.tanh(0.5 * self.conv(z) + x)

    cell = Conv()
    layers = DEQ(cell, graph=True, tol=1e-5), DEQ(cell, tol=1e-5)
    x = torch.randn(2, 2, 3, 4)
    for form in (torch.contiguous_format, torch.channels_last):
        z0 = torch.zeros_like(x, memory_format=form)
        z = both(layers, lambda layer, z0=z0: [layer(x, z0=z0)])[0]
        assert z.is_contiguous(memory_format=form)
    assert len(layers[0]._graphs.solves) == 2


def test_a_cell_that_cannot_be_captured(monkeypatch):
    """It is said, nothing is kept, and the layer goes on."""
    layer, _ = pair()
    (x,) = inputs(1.0)

    def fails(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "__call__", fails)
        with pytest.raises(RuntimeError, match="can't be captured.*graph=False.*not permitted"):
            layer(x)
    assert not layer._graphs.solves and not layer.cell.dropout.held
    assert layer(x).isfinite().all()


def test_a_tensor_from_elsewhere_is_refused():
    layer, _ = pair()
    layer.cell.outside = [torch.ones(WIDTH, requires_grad=True) * 2]
    layer.cell.forward = lambda z, x: torch.tanh(0.3 * z * layer.cell.outside[0] + x)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(6,\).*Pass it in x"):
        layer(inputs(1.0)[0])


@torch.no_grad()
def test_what_is_not_a_tensor_is_part_of_the_key():
    class Scaled(nn.Module):
        def forward(self, z, injection):
            x, factor = injection
            return torch.tanh(sum(factor) * z + x) if isinstance(factor, bytearray) else torch.tanh(factor * z + x)

    layer, x = DEQ(Scaled(), graph=True, tol=1e-5), torch.ones(2, 3)
    for factor in (0.5, 0.1):
        z = layer((x, factor), z0=torch.zeros_like(x))
        assert torch.allclose(torch.tanh(factor * z + x), z, atol=1e-4)
    assert len(layer._graphs.solves) == 2
    with pytest.raises(TypeError, match="hashable values in x.*bytearray"):
        layer((x, bytearray(b"a")), z0=torch.zeros_like(x))


def test_second_derivatives_raise():
    layer, _ = pair()
    (x,) = inputs(1.0)
    (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="graph=False"):
        g.sum().backward()


def test_no_gradient_no_adjoint():
    layer, _ = pair()
    with torch.no_grad():
        layer(torch.zeros(2, WIDTH))
    assert Recorder.made == (1 if Recorder.repeats else 3)
    frozen, _ = pair()
    frozen.requires_grad_(False)
    assert not frozen(torch.zeros(2, WIDTH)).requires_grad


def test_copies_and_pickles_leave_the_captures_behind():
    layer, _ = pair()
    (x,) = inputs(1.0)
    z = layer(x)
    again = copy.deepcopy(layer)
    assert not again._graphs.solves and torch.allclose(again(x), z)


def test_elsewhere_it_is_the_loop(monkeypatch):
    monkeypatch.undo()
    layer = DEQ(Cell(), graph=True)
    layer(inputs(1.0)[0]).sum().backward()
    assert "graphs are for CUDA" in layer.last.path


@pytest.mark.parametrize(
    "options, says",
    [
        ({"adjoint": Unrolled(3)}, "adjoint Unrolled"),
        ({"trace": True}, "trace=True"),
        ({"group": object()}, "group"),
        ({"solver": Broyden(), "adjoint": Implicit(reuse=True)}, "reuse=True"),
    ],
)
def test_what_does_not_go_together(options, says):
    with pytest.raises(ValueError, match=f"graph=True can't be combined with.*{says}"):
        DEQ(Cell(), graph=True, **options)
    with pytest.raises(TypeError, match="graph must be a bool"):
        DEQ(Cell(), graph=1)


@pytest.mark.parametrize("operands", ["fp32", "bf16"])
def test_a_cell_whose_steps_evaluate_it_themselves(monkeypatch, operands):
    """Two calls before one backward, then again with other inputs and weights."""
    monkeypatch.setattr(launch, "TILES", {terms: ((16, 128, 64, 2),) * 3 for terms in (1, 2, 3)})
    cell = Affine(257, 4, operands=operands)
    options = {"tol": 1e-4, "max_steps": 7}
    layers = DEQ(copy.deepcopy(cell), graph=True, **options), DEQ(cell, **options)

    def work(layer):
        out = []
        for scale in (1.0, 0.3):
            x, y = torch.randn(2, 4).requires_grad_(), scale * torch.randn(2, 4)
            first, second = layer.solve(x), layer.solve(y)
            grads = torch.autograd.grad((first.value * second.value).sum(), [x, *layer.parameters()])
            out += [first.value, second.value, first.steps, second.steps, first.residual, first.status, *grads]
            with torch.no_grad():
                layer.cell.weight.mul_(0.5)
        return out

    both(layers, work)
    captured, plain = layers[0].last.path, layers[1].last.path
    assert captured == f"loop: {SAYS[Recorder.repeats]}, one launch a step and its GEMM"
    assert plain == "loop, one launch a step and its GEMM, interpreted"
    assert len(layers[0]._graphs.solves) == 1
    (solve,) = layers[0]._graphs.solves.values()
    assert type(solve.forward.steps) is type(solve.adjoint.steps) is AffineSteps
