"""The demonstrations: a quick run of each from end to end, and that what they measure is so."""

import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.datasets import load_digits
from torch import nn

from tritondeq import __main__ as cli
from tritondeq import fixed_point, plot, toolbox
from tritondeq.demo import digits, parity

CPU = torch.device("cpu")
EXPECTED = {  # steps of each model, and the pictures
    "digits": (
        {"DEQ": None, "stack of 12 blocks": 12, "one block": 1, "weight-tied loop of 12": 12},
        {"digits_residual.png", "digits_steps.png"},
    ),
    "parity": ({"DEQ": None, "stack of 10 blocks": 10, "weight-tied loop": 40}, {"parity_exact_match.png"}),
}


@pytest.fixture(autouse=True)
def one_thread():
    with toolbox.one_thread():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("task", EXPECTED)
def test_from_end_to_end(capsys, tmp_path, task):
    models, pictures = EXPECTED[task]
    assert cli.main(["demo", task, "--quick", "--out", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    rows = [re.split(r"  +", line) for line in text.splitlines() if line.startswith(tuple(models))]
    assert [row[0] for row in rows] == list(models)
    for row in rows:
        steps = models[row[0]]
        assert all(float(cell) >= 0 for cell in row[2:])
        assert float(row[-1]) == steps or (steps is None and 1 < float(row[-1]) < 50)
        assert row[1] == rows[0][1] or row[0].startswith("stack of")
    memory = {row[0]: float(row[2]) for row in rows}
    assert memory["DEQ"] == min(value for name, value in memory.items() if name != "one block")
    assert "its numbers mean nothing" in text
    if task == "digits":
        assert all(15 < float(row[4]) <= 100 for row in rows), "no better than chance"
    assert {path.name for path in (tmp_path / "new").iterdir()} == pictures
    for path in (tmp_path / "new").iterdir():
        assert f"saved {path}" in text
        image = imread(path)[..., :3]
        ink = (image < 0.9).any(axis=2)
        assert min(image.shape[:2]) >= 500 and 0.01 < ink.mean() < 0.5, "blank, or black"
        assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any(), "something is cut off"


@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_run_leaves_no_empty_folder(tmp_path, existed):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with pytest.raises(ZeroDivisionError), toolbox.writable(out):
        raise ZeroDivisionError
    assert out.exists() == existed
    with pytest.raises(ZeroDivisionError), toolbox.writable(out):
        (out / "a.png").touch()
        raise ZeroDivisionError
    assert out.exists()


def test_memory_of_a_chain(device):
    """`sin` saves its argument, a step back needs a few tensors beside, and a view of the data is free."""
    size, depth = 1 << 16, 10
    net = nn.Linear(1, 1, bias=False).to(device)
    x = torch.rand(25 * size, 1, device=device)

    def loss():
        y = net.weight * x[: size // 4]
        for _ in range(depth):
            y = y.sin()
        return y.sum()

    taken = toolbox.training_memory(net, loss)
    assert depth * size <= taken <= (depth + 4) * size
    assert toolbox.training_memory(net, loss) == taken and net.weight.grad is None


def test_the_split_is_stratified_and_depends_on_the_seed_only():
    data, labels = digits.Data.split(0, CPU), torch.tensor(load_digits().target)
    assert data.x.shape == (1437, 1, 8, 8) and data.test_x.shape == (360, 1, 8, 8)
    assert ((data.test_y.bincount(minlength=10) - labels.bincount() * 360 / 1797).abs() < 1).all()
    assert torch.equal(data.y.bincount() + data.test_y.bincount(), labels.bincount())
    torch.rand(7), np.random.rand(7)
    assert torch.equal(data.x, digits.Data.split(0, CPU).x) and not torch.equal(data.x, digits.Data.split(6, CPU).x)


@pytest.mark.parametrize("task", [digits, parity])
def test_training_depends_on_the_seed_only(task):
    data = digits.Data(*(t[:128] for t in vars(digits.Data.split(0, CPU)).values()))

    def weights(seed: int) -> torch.Tensor:
        torch.rand(7)  # the global generator is elsewhere each time
        args = (digits.ONE, seed, data, 1) if task is digits else (parity.IMPLICIT, seed, 2, {9: 2}, CPU)
        return nn.utils.parameters_to_vector(task.measure(*args).net.parameters())

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@torch.no_grad()
def test_what_the_stack_can_see():
    """Random weights in float64, one bit flipped: the answers that change are as far as the conclusion has it."""
    net = parity.MODELS[parity.STACK]().double()
    for p in net.parameters():
        p.normal_()
    bits, _ = parity.strings(2, 64, torch.Generator().manual_seed(0), CPU)
    flipped = bits.clone()
    flipped[:, 30] ^= 1
    before, after = (net.answer(b.double())[0] for b in (bits, flipped))
    seen = (before != after).any(0).nonzero().flatten() - 30
    assert [seen.min(), seen.max()] == [-parity.REACH, parity.REACH]


@torch.no_grad()
def test_answers_of_the_tied_nets(monkeypatch):
    """The loop goes on for a block a bit; the equilibrium net stops where another block changes nothing."""
    monkeypatch.setattr(parity, "TOL", 1e-6)
    bits, _ = parity.strings(3, 9, torch.Generator().manual_seed(0), CPU)
    for name, blocks in ((parity.TIED, 9), (parity.IMPLICIT, 300)):
        net = parity.MODELS[name]()
        answer, steps = net.answer(bits)
        z, u = net.start(bits)
        for _ in range(blocks):
            z = net.blocks[0](z, u)
        assert torch.allclose(answer, net.read(z), atol=1e-4)
        assert (steps == 9).all() if name == parity.TIED else (steps < 300).all()


def test_a_string_counts_where_every_bit_is_right(monkeypatch):
    def answer(self, bits):  # misses the last bit of every other string
        logits = parity.prefix_parity(bits) - 0.5
        logits[::2, -1] *= -1
        return logits, torch.full((len(bits),), 7)

    monkeypatch.setattr(parity.Net, "answer", answer)
    assert parity.test(parity.Net(), seed=0, length=10, count=8) == (50.0, 7.0)


def test_plots(monkeypatch):
    rate = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).unsqueeze(1)
    solution = fixed_point(lambda z: rate * z + 1, torch.zeros(5, 1), tol=1e-3, max_steps=200, trace=True)
    ax = plot.residuals({"a": solution, "b": solution.trace}, tol=1e-3, ax=Figure().subplots())
    low, want, high = np.quantile(solution.trace.numpy(), [0.1, 0.5, 0.9], axis=1)
    curves = [line for line in ax.get_lines() if len(line.get_xdata()) == len(want)]
    assert len(curves) == 2 and all(np.allclose(curve.get_ydata(), want) for curve in curves)
    assert curves[0].get_xdata()[0] == 1 and ax.get_yscale() == "log" and ax.get_xlabel() and ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    edge = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.min() == pytest.approx(low.min()) and edge.max() == pytest.approx(high.max())
    ax = plot.residuals(torch.tensor([1.0, 0.1, 0.01]), ax=Figure().subplots())  # a batch shape of ()
    assert np.allclose(ax.get_lines()[0].get_ydata(), [1.0, 0.1, 0.01]) and ax.get_legend() is None
    with pytest.raises(ValueError, match="trace=True"):
        plot.residuals(fixed_point(lambda z: z / 2, torch.ones(1, 1)), ax=Figure().subplots())
    ax = plot.steps(solution, ax=Figure().subplots())
    bars = {round(bar.get_x() + bar.get_width() / 2): int(bar.get_height()) for bar in ax.patches if bar.get_height()}
    values, counts = solution.steps.unique(return_counts=True)
    assert bars == dict(zip(values.tolist(), counts.tolist(), strict=True))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "tritondeq[demo]"')):
        plot.steps(torch.tensor([1, 2]))
