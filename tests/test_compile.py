"""`DEQ(..., compile=True)`: the cell compiled, the loop left outside."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, FixedDropout, Implicit, Phantom, Picard, Unrolled

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler
TRACED = {"backend": "aot_eager"}  # the whole path of torch.compile but the code generator


class Cell(nn.Module):
    """With what users' cells have: a mask, positions, dropout."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.mix, self.norm, self.dropout = nn.Linear(width, width), nn.LayerNorm(width), FixedDropout(0.3)
        self.positions = nn.Parameter(torch.randn(5, width) * 0.1)

    def forward(self, z, injection):
        x, mask = injection
        scores = (z + self.positions) @ z.mT / 3
        attended = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ z
        return self.norm(x + self.dropout(0.3 * torch.tanh(self.mix(attended))))


@pytest.fixture
def pair():
    """(compiled, plain) with the same weights, and what they take."""
    cell = Cell()
    options = {"tol": 1e-6, "max_steps": 200}
    x, mask = torch.randn(3, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    return DEQ(cell, compile=TRACED, **options), DEQ(copy.deepcopy(cell), **options), x, mask


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "solver, adjoint", [(Anderson(), Implicit()), (Picard(), Phantom(4, 0.7)), (Picard(), Unrolled(5))], ids=repr
)
def test_values_and_gradients_are_those_of_the_cell(pair, solver, adjoint, mode):
    """Also of what stands before the layer, twice in a graph."""
    *layers, x, mask = pair
    results = []
    for deq in layers:
        deq.solver, deq.adjoint = solver, adjoint
        getattr(deq, mode)()
        torch.manual_seed(3)
        before = torch.full((8,), 0.9, requires_grad=True)
        inputs = [(before * x, mask), (before.exp() * x, mask)]
        z = sum(deq(i, z0=torch.zeros_like(x)).sin() for i in inputs)
        results.append([z, *torch.autograd.grad(z.square().sum(), [before, *deq.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_cell_is_compiled_once_for_a_solve(pair):
    """Without gradient, and at the solution with it: whatever the number of steps and calls."""
    deq, _, x, mask = pair
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    deq.compile_cell = {"backend": backend}
    for scale in (1.0, 2.0):
        deq((scale * x, mask), z0=torch.zeros_like(x)).sum().backward()
    assert len(graphs) == 2 and (deq.last.steps > 3).all()


def test_second_derivatives_raise(pair):
    deq, _, x, mask = pair
    x.requires_grad_()
    (g,) = torch.autograd.grad(deq((x, mask), z0=torch.zeros_like(x)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward|use the plain cell"):
        g.sum().backward()


def test_it_is_the_same_module(pair):
    """Names of the state, copies and pickles know nothing of the compiler."""
    deq, plain, x, mask = pair
    value = deq.eval()((x, mask), z0=torch.zeros_like(x))
    assert list(deq.state_dict()) == list(plain.state_dict())
    for again in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        torch.testing.assert_close(again((x, mask), z0=torch.zeros_like(x)), value)


def test_whole_solves_stay_whole():
    deq = DEQ(tdeq.cells.Affine(8), compile=TRACED)
    with tdeq.backend("triton"):
        deq(torch.randn(2, 8))
    assert deq.last.route is tdeq.Route.KERNEL


def test_bad_option():
    with pytest.raises(TypeError, match="compile must be a bool or a dict"):
        DEQ(Cell(), compile="max-autotune")
