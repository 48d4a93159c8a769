"""A cell made of torch's nn.TransformerEncoderLayer, as it is: every solver, adjoint and way to take the steps."""

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, Neumann, OneStep, Phantom, Picard, Status, Unrolled

SOLVERS = [Picard(), Picard(damping=0.8), Anderson(memory=3), Broyden(memory=4)]
ADJOINTS = [Implicit(), Implicit(solver=Anderson(memory=2), tol=1e-2), Neumann(3), Phantom(4, 0.8), OneStep()]
PAIRS = [
    pytest.param(solver, adjoint, marks=[] if ADJOINTS.index(adjoint) == i else pytest.mark.slow)
    for i, solver in enumerate(SOLVERS)
    for adjoint in ADJOINTS
]
WIDTH, TOKENS = 8, 5


class Cell(nn.Module):
    """LayerNorm of the layer's output ends the block, so the state is bounded."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
        with torch.no_grad():
            for weight in (self.layer.linear2.weight, self.layer.self_attn.out_proj.weight):
                weight *= 0.3

    def forward(self, z, injection):
        x, padding = injection
        return self.layer(0.5 * z + x, src_key_padding_mask=padding)


def problem():
    """Sentences of 5, 3 and 4 tokens; their labels."""
    padding = torch.arange(TOKENS) >= torch.tensor([5, 3, 4]).unsqueeze(1)
    x = torch.randn(3, TOKENS, WIDTH)
    return x, padding, x[..., :1].mean(1)


def trained(deq, steps, x, padding, labels):
    head = nn.Linear(WIDTH, 1)
    optimizer = torch.optim.Adam([*deq.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        z = deq((x, padding), z0=torch.zeros_like(x), mask=~padding.unsqueeze(-1))
        assert set(deq.last.status.tolist()) <= {Status.CONVERGED, Status.PLATEAU}, deq.last
        loss = (head(z[:, 0]) - labels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("solver, adjoint", PAIRS, ids=repr)
def test_it_learns(solver, adjoint):
    x, padding, labels = problem()
    losses = trained(DEQ(Cell(), solver=solver, adjoint=adjoint, max_steps=80), 25, x, padding, labels)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.kernels
@pytest.mark.parametrize(
    "solver",
    [Picard(), *(pytest.param(one, marks=pytest.mark.slow) for one in (Anderson(memory=3), Broyden(memory=4)))],
    ids=repr,
)
def test_fused_steps_train_it_alike(solver):
    x, padding, labels = problem()
    curves = []
    for name in ("torch", "triton"):
        torch.manual_seed(0)
        with tdeq.backend(name):
            curves.append(trained(DEQ(Cell(), solver=solver, tol=1e-4, max_steps=80), 3, x, padding, labels))
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing():
    """A sentence alone, without its padding, has the same fixed point and number of steps."""
    x, padding, _ = problem()
    deq = DEQ(Cell(), tol=1e-5, max_steps=200).eval()
    together = deq.solve((x, padding), z0=torch.zeros_like(x), mask=~padding.unsqueeze(-1))
    for i, length in enumerate((5, 3, 4)):
        short = x[i : i + 1, :length]
        alone = deq.solve((short, padding[i : i + 1, :length]), z0=torch.zeros_like(short))
        assert abs(int(alone.steps[0]) - int(together.steps[i])) <= 1
        torch.testing.assert_close(together.value[i, :length], alone.value[0], rtol=1e-4, atol=1e-4)


def test_implicit_gradient_is_that_of_many_unrolled_steps():
    x, padding, _ = problem()
    cell = Cell().double()
    grads = []
    for adjoint in (Implicit(), Unrolled(150)):
        deq = DEQ(cell, adjoint=adjoint, tol=1e-12, max_steps=300)
        z = deq((x.double(), padding), z0=torch.zeros_like(x).double(), mask=~padding.unsqueeze(-1))
        grads.append(torch.autograd.grad(z[~padding].sin().sum(), list(deq.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)
