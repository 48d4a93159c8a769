"""Samples that are sets of rows: the graphs of a disjoint union are solved as each would be alone."""

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, OneStep, PeacemanRachford, Picard, Unrolled
from tritondeq.cells import Affine, Monotone

F64 = torch.float64
SIZES = (4, 1, 7, 3)


def f(z, w, x, adjacency):
    """A graph network: each node takes the mean of its neighbours' states."""
    return torch.tanh(adjacency @ (z @ w) + x)


def graph(nodes):
    """A random graph's adjacency, scaled by the number of neighbours."""
    adjacency = torch.rand(nodes, nodes, dtype=F64) < 0.6
    adjacency = (adjacency | torch.eye(nodes, dtype=torch.bool)).to(F64)
    return adjacency / adjacency.sum(1, keepdim=True)


@pytest.fixture
def graphs():
    """Graphs that need more and more steps: (adjacency, inputs) each."""
    return [(graph(n), torch.randn(n, 2, dtype=F64) * 10.0**-i) for i, n in enumerate(SIZES)]


@pytest.fixture
def w():
    return torch.tensor([[0.5, -0.3], [0.4, 0.45]], dtype=F64, requires_grad=True)


def union(graphs, shuffled=False):
    """All as one graph: (adjacency, inputs, number of each node's graph), in any order of nodes."""
    adjacency, x = torch.block_diag(*(a for a, _ in graphs)), torch.cat([x for _, x in graphs])
    index = torch.arange(len(graphs)).repeat_interleave(torch.tensor([len(x) for _, x in graphs]))
    if shuffled:
        order = torch.randperm(len(x))
        return adjacency[order][:, order], x[order], index[order]
    return adjacency, x, index


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("solver", [Picard(), Picard(damping=0.8), Anderson(), Broyden()], ids=str)
def test_each_graph_is_solved_as_alone(solver, shuffled, graphs, w):
    adjacency, x, index = union(graphs, shuffled)
    together = tdeq.fixed_point(f, torch.zeros_like(x), (w, x, adjacency), solver=solver, tol=1e-9, sample_of=index)
    assert len(together.steps.unique()) > 1 and together.converged.all() and together.steps.shape == (len(SIZES),)
    for i, (a, _) in enumerate(graphs):
        own = index == i
        a = adjacency[own][:, own]
        alone = tdeq.fixed_point(f, torch.zeros_like(x[own]), (w, x[own], a), solver=solver, tol=1e-9, batch_dims=0)
        assert together.steps[i] == alone.steps
        torch.testing.assert_close(together.value[own], alone.value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(together.residual[i], alone.residual, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_gradient_is_that_of_the_graphs(sparse, graphs, w):
    adjacency, x, index = union(graphs, shuffled=True)
    x.requires_grad_()
    given = adjacency.to_sparse() if sparse else adjacency
    options = {"tol": 1e-13, "max_steps": 200}
    value = tdeq.fixed_point(f, torch.zeros_like(x), (w, x, given), sample_of=index, **options).value
    exact = tdeq.fixed_point(f, torch.zeros_like(x), (w, x, adjacency), batch_dims=0, adjoint=Unrolled(200)).value
    torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-11)
    cotangent = torch.randn_like(value)
    got, truth = (torch.autograd.grad(z, (w, x), cotangent) for z in (value, exact))
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-11)


def test_second_derivatives(graphs, w):
    adjacency, x, index = union(graphs)

    def solved(w):
        options = {"tol": 1e-13, "max_steps": 200, "sample_of": index}
        return tdeq.fixed_point(f, torch.zeros_like(x), (w, x, adjacency), **options).value

    assert torch.autograd.gradgradcheck(solved, w, atol=1e-4)


@pytest.mark.kernels
def test_fused_steps_give_the_same(graphs, w, device):
    adjacency, x, index = (t.to(device) for t in union(graphs, shuffled=True))
    adjacency, x, w = adjacency.float(), x.float(), w.detach().float().to(device)
    found = {}
    for name in ("torch", "triton"):
        with tdeq.backend(name):
            solution = tdeq.fixed_point(f, torch.zeros_like(x), (w, x, adjacency), tol=1e-5, sample_of=index)
            found[name] = solution.value, solution.steps
    assert solution.route == tdeq.Route.FUSED
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-5, atol=1e-6)


class Conv(nn.Module):
    """A cell whose input is a graph, as a user writes it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        nn.init.orthogonal_(self.linear.weight, 0.5)

    def forward(self, z, x):
        return torch.tanh(torch.sparse.mm(x["adjacency"], self.linear(z)) + x["features"])


def test_a_layer_takes_the_numbers_of_the_graphs(graphs):
    adjacency, x, index = union(graphs)
    given = {"adjacency": adjacency.float().to_sparse(), "features": x.float()}
    layer = DEQ(Conv(), adjoint=OneStep())
    z = layer(given, torch.zeros_like(given["features"]), sample_of=index)
    assert z.shape == x.shape and layer.last.steps.shape == (len(SIZES),)
    z.sum().backward()
    assert layer.cell.linear.weight.grad.abs().sum() > 0


def test_a_cell_of_ours_stops_by_sets_of_rows():
    layer, x = DEQ(Affine(4), tol=1e-5), torch.randn(5, 4)
    value = layer(x, sample_of=torch.tensor([0, 1, 1, 0, 2]))
    assert layer.last.steps.shape == (3,)
    torch.testing.assert_close(value, layer(x), rtol=0, atol=1e-4)


def test_numbers_without_rows_and_states_of_several_tensors(w):
    def pair(state, x):
        a, c = state
        return 0.5 * torch.cos(c.sum(1)), 0.3 * torch.sin(a)[:, None] + x

    x, index = torch.randn(5, 3, dtype=F64), torch.tensor([3, 0, 0, 5, 3])
    z0 = torch.zeros(5, dtype=F64), torch.zeros(5, 3, dtype=F64)
    solution = tdeq.fixed_point(pair, z0, (x,), tol=1e-9, sample_of=index, at=(2,))
    assert solution.status.shape == (6,) and solution.converged.all()
    assert solution.steps[torch.tensor([1, 2, 4])].tolist() == [1, 1, 1]
    alone = tdeq.fixed_point(pair, z0, (x,), tol=1e-9, batch_dims=0, adjoint=Unrolled(2)).value
    for state, expected in zip(solution.states[0], alone, strict=True):
        assert torch.equal(state, expected)
    empty = tdeq.fixed_point(torch.cos, torch.zeros(0, 3), sample_of=torch.zeros(0, dtype=torch.long))
    assert empty.value.shape == (0, 3) and empty.status.shape == (0,)


def test_a_mask_of_the_rows(graphs, w):
    """An element that does not count stops no graph."""
    adjacency, x, index = union(graphs)

    def wandering(z, w, x, adjacency):
        y = f(z, w, x, adjacency)
        return torch.cat([y[:-1], y[-1:] - 2 * z[-1:]])  # the last node, which alternates and grows

    mask = torch.ones(len(x), dtype=torch.bool)
    options = {"tol": 1e-6, "sample_of": index, "max_steps": 30}
    with_all = tdeq.fixed_point(wandering, torch.zeros_like(x), (w.detach(), x, adjacency), **options)
    assert not with_all.converged[-1] and with_all.converged[:-1].all()
    mask[-1] = False
    adjacency[:, -1] = 0  # nor does another node depend on it
    counted = tdeq.fixed_point(wandering, torch.zeros_like(x), (w.detach(), x, adjacency), mask=mask, **options)
    assert counted.converged.all()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"sample_of": torch.zeros(7, dtype=torch.long)}, ValueError, "4 rows.*features by nodes has to be transposed"),
        ({"sample_of": torch.zeros(4)}, TypeError, "sample_of must be a tensor of integers"),
        ({"sample_of": [0, 0, 1, 1]}, TypeError, "sample_of must be a tensor of integers"),
        ({"sample_of": torch.tensor([0, 0, -1, 1])}, ValueError, "sample_of must not be negative"),
        ({"sample_of": torch.zeros(4, dtype=torch.long), "batch_dims": 0}, ValueError, "batch_dims must be 1, got 0"),
    ],
)
def test_bad_numbers_are_named(options, error, words):
    with pytest.raises(error, match=words):
        tdeq.fixed_point(torch.cos, torch.zeros(4, 7), **options)


def test_solvers_that_split_the_cell_solve_rows_alone():
    layer = DEQ(Monotone(4), solver=PeacemanRachford())
    with pytest.raises(ValueError, match="needs a cell with a splitting"):
        layer.solve(torch.randn(2, 4), sample_of=torch.tensor([0, 0]))
