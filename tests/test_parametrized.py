"""Cells whose weights are parametrized: each is computed once a solve, and differentiated as if it were not."""

import copy

import pytest
import torch
from replays import Recorder
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Implicit, Neumann, Picard, Unrolled, cuda_graphs
from tritondeq.kernels.tails import Tail

WIDTH = 5


class Cell(nn.Module):
    """A plain module; its weight is normed by what `norm` makes of a linear layer."""

    def __init__(self, norm=parametrizations.weight_norm):
        super().__init__()
        self.linear = norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


def counted(cell):
    """`cell`, and a list that grows whenever its weight is computed."""
    calls = []
    cell.linear.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(None))
    return cell, calls


def gradients(layer, x):
    return torch.autograd.grad(layer(x).sum(), tuple(layer.parameters()))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("adjoint", [Implicit(), Neumann(3), Unrolled(6), Unrolled(6, checkpoint=True)], ids=repr)
def test_once_a_solve(adjoint, grad, norm):
    cell, calls = counted(Cell(norm))
    layer, x = DEQ(cell, adjoint=adjoint), torch.randn(3, WIDTH)
    with torch.set_grad_enabled(grad):
        for k in (1, 2):
            z = layer(x)
            if grad:
                z.square().sum().backward()
            assert len(calls) == k and layer.last.steps.min() > 1
    assert "forward" not in vars(cell.linear.parametrizations.weight)


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled(40), Unrolled(40, checkpoint=True)], ids=repr)
def test_finite_differences(adjoint):
    layer = DEQ(Cell().double(), adjoint=adjoint, tol=1e-12, max_steps=200)
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["cell.linear.bias", *(f"cell.linear.parametrizations.weight.original{i}" for i in (0, 1))]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *(p.detach().clone().requires_grad_() for p in layer.parameters())))


def test_two_calls_before_one_backward():
    """The gradient of each call is that of the weight at the time of the call."""
    layer = DEQ(Cell().double(), tol=1e-12, max_steps=200)
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    (expected,) = torch.autograd.grad(layer(x).sum(), layer.cell.linear.bias)
    z = layer(x)
    layer(2 * x)
    (got,) = torch.autograd.grad(z.sum(), layer.cell.linear.bias)
    assert torch.equal(expected, got)


def test_a_deq_within_a_deq():
    class Outer(nn.ModuleDict):
        def forward(self, z, x):
            return torch.tanh(0.2 * self["inner"](z) + 0.2 * self["linear"](z) + x)

    cell, calls = counted(Cell())
    layer = DEQ(Outer({"inner": DEQ(cell), "linear": cell.linear}))
    layer(torch.randn(2, WIDTH)).sum().backward()
    assert len(calls) == 1 and layer.last.converged.all() and layer.last.steps.min() > 1
    assert "forward" not in vars(cell.linear.parametrizations.weight)


def test_after_an_error_the_cell_computes_again():
    cell, calls = counted(Cell())
    with pytest.raises(RuntimeError):
        DEQ(cell)(torch.randn(2, WIDTH + 1))
    cell.linear(torch.zeros(1, WIDTH))
    assert len(calls) == 2


@pytest.mark.kernels
def test_a_tail_sees_the_same_weight():
    class Tailed(Cell, tdeq.cells.Cell):
        def tail(self, injection):
            return lambda z, x: (0.5 * self.linear(z) + x,), Tail("tanh")

    cell, calls = counted(Tailed())
    layer, x = DEQ(cell, tol=1e-5), torch.randn(3, WIDTH)
    with torch.no_grad(), tdeq.backend("triton"):
        z = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(z, cell(z, x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_once_and_right():
    made = []
    torch.compiler.reset()
    plain = DEQ(Cell(), tol=1e-5)
    compile = {"backend": lambda module, inputs: made.append(module) or module.forward}
    layer = DEQ(copy.deepcopy(plain.cell), tol=1e-5, compile=compile)
    for scale in (1.0, 0.5, 2.0):
        x = scale * torch.randn(3, WIDTH)
        torch.testing.assert_close(gradients(layer, x), gradients(plain, x), rtol=1e-4, atol=1e-5)
    assert len(made) == 2  # without grad, and with


@pytest.mark.kernels
@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", [Picard(), pytest.param(Anderson(memory=2), marks=pytest.mark.slow)], ids=repr)
def test_a_captured_solve_sees_weights_change(monkeypatch, solver, grad):
    """As in test_cuda_graphs.py: the work itself in place of a replay, on the same memory."""
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    cell, calls = counted(Cell())
    layer, plain = DEQ(cell, solver=solver, tol=1e-5, graph=True), DEQ(cell, solver=solver, tol=1e-5)
    x = torch.randn(3, WIDTH)
    with tdeq.backend("triton"), torch.set_grad_enabled(grad):
        for _ in range(3):
            with torch.no_grad():
                cell.linear.parametrizations.weight.original0.mul_(0.8)
            calls.clear()
            z = layer(x)
            assert len(calls) == 1
            torch.testing.assert_close(z, plain(x), rtol=1e-4, atol=1e-5)
            if grad:
                torch.testing.assert_close(gradients(layer, x), gradients(plain, x), rtol=1e-4, atol=1e-5)
    assert len(layer._graphs.solves) == 1 and layer.last.route is tdeq.Route.GRAPH


def test_cached_by_the_caller():
    cell, calls = counted(Cell())
    layer, x = DEQ(cell), torch.randn(3, WIDTH)
    with parametrize.cached():
        (layer(x) + layer(2 * x)).sum().backward()
    assert len(calls) == 1 and cell.linear.parametrizations.weight.original0.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.parametrize("make", [tdeq.cells.Affine, tdeq.cells.MLP], ids=lambda make: make.__name__)
def test_the_old_norms_compute_the_weight_of_every_solve(make, norm):
    """They compute a weight when its module is called, and a cell reads its weights before: that of the last solve."""
    cell, x = make(WIDTH).double(), torch.randn(3, WIDTH, dtype=torch.float64)
    part, name = (cell, "weight") if make is tdeq.cells.Affine else (cell.up, "weight")
    norm(part, name)
    layer = DEQ(cell.eval(), solver=Anderson(), tol=1e-11, max_steps=300)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        original = getattr(part, f"{name}_v" if norm is torch.nn.utils.weight_norm else f"{name}_orig")
        before, direction = original.detach().clone(), torch.randn_like(original)
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                original.copy_(before + step * direction)
                sides.append(layer(x).square().sum())
        with torch.no_grad():
            original.copy_(before)
        slope = (original.grad * direction).sum()
        torch.testing.assert_close(slope, (sides[0] - sides[1]) / 2e-5, rtol=1e-5, atol=1e-7)
        optimizer.step()
