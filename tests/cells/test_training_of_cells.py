"""Every cell trains: the loss falls, and each solve ends at its tolerance or at the precision's floor, in few steps.

So do the adjoint solves of row cells. One of the others, or its adjoint, may end at `max_steps` for a sample in a
hundred; where it is an adjoint, a warning speaks of it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritondeq import DEQ, Anderson, Status
from tritondeq.cells import MLP, Affine, Conv, Gated, Monotone, MultiScale, Transformer

STEPS = 300


def regression(cell):
    """A function on a rotated sphere."""
    head, mix = nn.Linear(32, 8), torch.randn(32, 8) / 32**0.5

    def batch(_, layer):
        x = torch.randn(64, 32)
        return F.mse_loss(head(layer(x)).float(), torch.tanh(2 * x @ mix))

    return DEQ(cell, max_steps=60), head, batch, 2e-3, (40, 40)


def digits(cell, read, width):
    """Handwritten digits, 8 x 8."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    head = nn.Linear(width, 10)

    def batch(i, layer):
        rows = torch.arange(32 * i, 32 * i + 32) % len(x)
        return F.cross_entropy(head(read(layer(x[rows])).float().flatten(1)), labels[rows])

    return DEQ(cell, solver=Anderson(memory=4), max_steps=100), head, batch, 1e-3, (100, 100)


def copying(**options):
    """Words, of which each token's answer is the one before it."""
    cell = Transformer(16, heads=2, hidden=32, causal=True, rotary=100.0, **options)
    outside = nn.ModuleDict({"embed": nn.Embedding(4, 16), "head": nn.Linear(16, 4)})

    def batch(_, layer):
        x = torch.randint(4, (32, 6))
        logits = outside["head"](layer(outside["embed"](x))[:, 1:])
        return F.cross_entropy(logits.float().flatten(0, 1), x[:, :-1].flatten())

    return DEQ(cell), outside, batch, 3e-3, (50, 20)


# What the loss has to fall to, as a share of the first ones.
TASKS = {
    "affine": (lambda: regression(Affine(32, contraction=0.95)), 0.5),
    "monotone": (lambda: regression(Monotone(32)), 0.5),
    "mlp, post": (lambda: regression(MLP(32)), 0.5),
    "mlp, pre": (lambda: regression(MLP(32, form="pre", activation="swiglu")), 0.5),
    "gated": (lambda: regression(Gated(32, contraction=0.9)), 0.5),
    "conv": (lambda: digits(Conv(32, 1, groups=4), lambda z: z, 32 * 64), 0.15),
    "multiscale": (lambda: digits(MultiScale((16, 16), 1, groups=4), lambda z: z[1], 16 * 16), 0.25),
    "outer": (lambda: copying(), 0.035),
    "damped": (lambda: copying(wiring="damped"), 0.035),
    "head, decay": (lambda: copying(wiring="head", decay=True), 0.035),
}
UNCONVERGED = pytest.mark.filterwarnings("ignore:a backward solve")
MARKS = {"outer": [UNCONVERGED], "damped": [UNCONVERGED], "head, decay": [UNCONVERGED]}
ROWS = ["affine", "monotone", "mlp, post", "mlp, pre", "gated"]
FAST = ("mlp, post", False)
AUTOCAST = ["gated", "conv", "damped"]  # of one kind of cell each: rows, images, tokens
RUNS = [(name, False) for name in TASKS] + [(name, True) for name in AUTOCAST]


@pytest.mark.parametrize(
    "name, autocast",
    [pytest.param(*run, marks=[] if run == FAST else [pytest.mark.slow, *MARKS.get(run[0], [])]) for run in RUNS],
)
def test_training(name, autocast):
    make, share = TASKS[name]
    layer, outside, batch, rate, (most, most_at_last) = make()
    parameters = [*layer.parameters(), *outside.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses, steps, failed = [], [], []
    for i in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = batch(i, layer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for solution in (layer.last, layer.last.adjoint) if name in ROWS else (layer.last,):
            ended = (solution.status == Status.CONVERGED) | (solution.status == Status.PLATEAU)
            failed.append((~ended).double().mean().item())
        losses.append(loss.item())
        steps.append(layer.last.steps.max().item())
    assert sum(losses[-20:]) < share * sum(losses[:5]) * 4, losses[::20]
    assert sum(failed) <= (0.0 if name in ROWS else 0.01 * len(failed))
    assert max(steps) <= most and max(steps[-50:]) <= most_at_last
