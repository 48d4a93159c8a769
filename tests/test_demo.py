"""The demonstrations: a quick run of each from end to end, and that what their tables claim is so."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.datasets import load_digits
from torch import nn

from tritondeq import Solution, fixed_point, plot
from tritondeq.demo import common, digits, parity, pictures

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BLOCK, PARITY_BLOCK = 2 * (24 * 24 * 9 + 24) + 2 * 24, 2 * (3 * 32 * 32 + 32) + 2 * 32
ENDS, PARITY_ENDS = (1 * 24 * 9 + 24) + 2 * 24 + (24 * 16 * 10 + 10), (3 * 32 + 32) + (32 + 1)
DIGITS_PARAMETERS = {
    "DEQ": ENDS + BLOCK,
    "stack of 12 blocks": ENDS + 12 * BLOCK,
    "one block": ENDS + BLOCK,
    "weight-tied loop of 12": ENDS + BLOCK,
}
PARITY_PARAMETERS = {
    "DEQ": PARITY_ENDS + PARITY_BLOCK,
    "stack of 10 blocks": PARITY_ENDS + 10 * PARITY_BLOCK,
    "weight-tied loop": PARITY_ENDS + PARITY_BLOCK,
}


@pytest.fixture(autouse=True)
def one_thread():
    with common.one_thread():
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `demo TASK --quick` prints, and the folder that it fills; each task is run once."""
    done = {}

    def run(task: str) -> tuple[str, Path]:
        if task not in done:
            out = tmp_path_factory.mktemp("demo") / "new"
            command = [sys.executable, "-m", "tritondeq", "demo", task, "--quick", "--out", str(out)]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert process.returncode == 0 and not process.stderr, process.stderr
            done[task] = process.stdout, out
        return done[task]

    return run


def read_tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Of each table: cells by row and column."""
    tables = []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("---"):
            spans = [match.span() for match in re.finditer("-+", line)]
            cut = [[row[a:b].strip() for a, b in spans] for row in [lines[i - 1], *lines[i + 1 :]]]
            rows = cut[1 : 1 + next(n for n, row in enumerate(lines[i + 1 :]) if not re.search(r"\d$", row))]
            tables.append({row[0]: dict(zip(cut[0][1:], row[1:], strict=True)) for row in rows})
    return tables


def number(cell: str) -> float:
    return float(cell.partition(" ±")[0].replace(",", ""))


def test_digits_from_end_to_end(quick):
    text, _ = quick("digits")
    (table,) = read_tables(text)
    columns = ["test accuracy, %", "parameters", "peak memory, MiB", "training, s", "steps at start", "at end"]
    assert {model: number(row["parameters"]) for model, row in table.items()} == DIGITS_PARAMETERS
    assert all(list(row) == columns for row in table.values())
    assert all(15 < number(row["test accuracy, %"]) <= 100 for row in table.values()), "no better than chance"
    assert number(table["stack of 12 blocks"]["training, s"]) > number(table["one block"]["training, s"])
    memory = {model: number(row["peak memory, MiB"]) for model, row in table.items()}
    assert memory["one block"] < memory["DEQ"] < memory["stack of 12 blocks"] / 2
    for model, blocks in {"stack of 12 blocks": 12, "one block": 1, "weight-tied loop of 12": 12}.items():
        assert number(table[model]["steps at start"]) == number(table[model]["at end"]) == blocks
    assert 1 < number(table["DEQ"]["steps at start"]) < digits.MAX_STEPS
    assert "numbers say nothing" in text and "One explicit block is" not in text


def test_parity_from_end_to_end(quick):
    text, _ = quick("parity")
    costs, exact, bits, steps = read_tables(text)
    assert {model: number(row["parameters"]) for model, row in costs.items()} == PARITY_PARAMETERS
    assert all(number(row["peak memory, MiB"]) > 0 < number(row["training, s"]) for row in costs.values())
    lengths = ["20 bits", "40 bits"]
    assert all(list(row) == lengths for table in (exact, bits, steps) for row in table.values())
    assert list(exact) == list(bits) == list(steps) == list(parity.MODELS)
    assert all(0 <= number(exact[m][n]) <= number(bits[m][n]) <= 100 for m in exact for n in lengths)
    assert [number(steps["stack of 10 blocks"][n]) for n in lengths] == [10, 10]
    assert [number(steps["weight-tied loop"][n]) for n in lengths] == [20, 40]
    assert "numbers say nothing" in text and "fair rival" not in text


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("digits", {"digits_residual.png", "digits_steps.png", "digits_accuracy.png"}),
        ("parity", {"parity_exact_match.png", "parity_steps.png"}),
    ],
)
def test_pictures(quick, task, names):
    text, out = quick(task)
    assert {path.name for path in out.iterdir()} == names
    for path in out.iterdir():
        assert f"saved {path}" in text
        image = imread(path)[..., :3]
        assert min(image.shape[:2]) >= 500
        ink = (image < 0.9).any(axis=2)
        assert 0.01 < ink.mean() < 0.5, "blank, or black"
        assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any(), "something is cut off"
        hues = image[ink].max(axis=1) - image[ink].min(axis=1)
        assert (hues > 0.3).any(), "no curve"


def test_interrupted_save_leaves_the_old_picture(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    pictures.save(lambda figure: figure.subplots().plot([1, 2]), path)
    before = path.read_bytes()
    imread(path)

    def savefig(self, name, **options):
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(KeyboardInterrupt):
        pictures.save(lambda figure: figure.subplots(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("was_there", [True, False])
def test_failed_run_leaves_no_empty_folder(tmp_path, was_there):
    out = tmp_path / "out"
    if was_there:
        out.mkdir()
    for leave in ((), ("a.png",)):
        with pytest.raises(ZeroDivisionError):
            with common.writable(out):
                for name in leave:
                    (out / name).touch()
                raise ZeroDivisionError
        assert out.exists() == (was_there or bool(leave))


def test_table_and_spread():
    text = common.table(["", "b"], [["one", "1.0"], ["fourteen", "14.0"]])
    assert text.splitlines() == ["             b", "--------  ----", "one        1.0", "fourteen  14.0"]
    assert common.spread([2.0]) == "2.0"
    assert common.spread([1.0, 3.0], 2) == "2.00 ± 1.41"


@pytest.mark.parametrize("depth", [1, 10, 40])
def test_memory_of_a_chain(device, depth):
    """`sin` keeps its argument, a step back holds a few tensors beside those kept, and a view of the data is free."""
    size = 1 << 16
    net = nn.Linear(1, 1, bias=False).to(device)
    x = torch.rand(25 * size, 1, device=device)

    def loss():
        y = net.weight * x[: size // 4]
        for _ in range(depth):
            y = y.sin()
        return y.sum()

    taken = common.training_memory(net, loss)
    assert depth * size <= taken <= (depth + 4) * size
    assert common.training_memory(net, loss) == taken
    assert net.weight.grad is None


def digits_memory(body) -> int:
    torch.manual_seed(0)
    net = digits.Net(body)
    data = digits.Data.split(0, CPU)
    x, y = data.x[:16], data.y[:16]
    return common.training_memory(net, lambda: nn.functional.cross_entropy(net(x), y))


def test_memory_grows_with_a_stack_and_not_with_a_solve():
    one, two, six = (digits_memory(partial(digits.Stack, depth)) for depth in (1, 2, 6))
    assert six - two == pytest.approx(4 * (two - one), rel=0.02)

    def solved(steps):
        adjoint = digits.Implicit(tol=1e-12, max_steps=steps)
        return digits.DEQ(digits.Block(), tol=1e-12, max_steps=steps, adjoint=adjoint)

    few, many = digits_memory(partial(solved, 8)), digits_memory(partial(solved, 16))
    assert many == pytest.approx(few, rel=0.01) and many < six


def test_same_ends_and_first_block_for_every_model():
    """The models of a seed differ in what stands between stem and head, and start from the same weights."""

    def start(net) -> list[torch.Tensor]:
        (first, *_) = [m for m in net.modules() if isinstance(m, (digits.Block, parity.Block))]
        return [*net.stem.parameters(), *net.head.parameters(), *first.parameters()]

    def make(model):
        torch.manual_seed(3)
        return model()

    for models in ([partial(digits.Net, body) for body in digits.MODELS.values()], parity.MODELS.values()):
        first, *others = [start(make(model)) for model in models]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_split_is_stratified_and_disjoint():
    images, labels = load_digits(return_X_y=True)
    data = digits.Data.split(0, CPU)
    assert data.x.shape == (1437, 1, 8, 8) and data.test_x.shape == (360, 1, 8, 8)
    whole = torch.cat([data.x, data.test_x]).flatten(1).mul(16).round().long()
    got = torch.cat([whole, torch.cat([data.y, data.test_y]).unsqueeze(1)], dim=1)
    want = torch.cat([torch.tensor(images).long(), torch.tensor(labels).unsqueeze(1)], dim=1)
    assert sorted(got.tolist()) == sorted(want.tolist()), "each image is in one part, once, with its own label"
    shares = torch.bincount(torch.tensor(labels)) * 360 / 1797
    assert ((data.test_y.bincount(minlength=10) - shares).abs() < 1).all()


def test_split_depends_on_the_seed_only():
    torch.manual_seed(1)
    np.random.seed(1)
    first = digits.Data.split(5, CPU)
    torch.manual_seed(2)
    np.random.seed(2)
    again, other = digits.Data.split(5, CPU), digits.Data.split(6, CPU)
    assert torch.equal(first.x, again.x) and torch.equal(first.test_y, again.test_y)
    assert not torch.equal(first.x, other.x)


def train_digits(seed: int) -> torch.Tensor:
    torch.manual_seed(0)
    net = digits.Net(digits.MODELS[digits.ONE])
    whole = digits.Data.split(0, CPU)
    few = digits.Data(whole.x[:256], whole.y[:256], whole.test_x, whole.test_y)
    torch.rand(seed)  # the global generator is elsewhere each time
    digits.train(net, few, seed % 10, 1, lambda: None)
    return torch.cat([p.flatten() for p in net.parameters()])


def train_parity(seed: int) -> torch.Tensor:
    torch.manual_seed(0)
    net = parity.MODELS[parity.IMPLICIT]()
    torch.rand(seed)
    parity.train(net, seed % 10, 2, lambda: None)
    return torch.cat([p.flatten() for p in net.parameters()])


@pytest.mark.parametrize("train", [train_digits, train_parity])
def test_training_depends_on_the_seed_only(train):
    assert torch.equal(train(1), train(11))
    assert not torch.equal(train(1), train(2))


def test_accuracy_by_steps_allowed():
    """With all steps allowed it is that of the table; for the loop, so many blocks exactly."""
    torch.manual_seed(0)
    data = digits.Data.split(0, CPU)
    deq, loop = (digits.Net(digits.MODELS[name]) for name in (digits.IMPLICIT, digits.LOOP))
    guesses, steps = digits.predict(deq, data)
    assert int(steps.max()) < digits.MAX_STEPS
    by_hand = 100 * (guesses == data.test_y).float().mean().item()
    assert digits.accuracy_allowed(deq, data, digits.MAX_STEPS) == by_hand
    with torch.no_grad():
        z = u = loop.stem(data.test_x)
        for _ in range(3):
            z = loop.body.cell(z, u)
        right = loop.head(z.flatten(1)).argmax(1) == data.test_y
    assert digits.accuracy_allowed(loop, data, 3) == pytest.approx(100 * right.float().mean().item(), abs=0.6)


def result(model: str, accuracy: float) -> digits.Run:
    return digits.Run(model, 0, 1, 1, 1.0, accuracy, (1.0, 1.0), converged=99.9)


@pytest.mark.parametrize(
    ("one", "others", "says"),
    [(98.5, 98.0, "is the best, at 98.5 %"), (97.9, 98.2, "is as good: 97.9 %"), (90.0, 98.2, "is worse: 90.0 %")],
)
def test_conclusion_follows_the_numbers(one, others, says):
    runs = [result(model, one if model == digits.ONE else others) for model in digits.MODELS]
    first, *rest = digits.conclusions(runs)
    assert says in first and "99.9 %" in rest[-1]


def test_prefix_parity_against_a_loop():
    bits, labels = parity.strings(50, 33, torch.Generator().manual_seed(0), CPU)
    for string, label in zip(bits.tolist(), labels.tolist(), strict=True):
        odd = False
        for bit, parity_so_far in zip(string, label, strict=True):
            odd ^= bit == 1
            assert parity_so_far == int(odd)
    assert set(bits.unique().tolist()) == {0, 1} and 0.45 < bits.float().mean() < 0.55


def test_strings_depend_on_the_generator_only():
    first, again, other = (parity.strings(4, 40, torch.Generator().manual_seed(s), CPU)[0] for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


@torch.no_grad()
def test_what_the_stack_can_see():
    """Random weights in float64, one bit flipped: the answers that change are as far as the report says."""
    net = parity.Stack().double()
    for p in net.parameters():
        p.normal_()
    bits, _ = parity.strings(2, 64, torch.Generator().manual_seed(0), CPU)
    flipped = bits.clone()
    flipped[:, 30] ^= 1
    before, after = (net.answer(b.double())[0] for b in (bits, flipped))
    seen = (before != after).any(0).nonzero().flatten() - 30
    assert [seen.min(), seen.max()] == [-parity.REACH, parity.REACH]


@pytest.mark.parametrize(("pick", "free", "kept"), [(min, 0, 3), (max, 25, 8)])
def test_loss_of_the_equilibrium_net(pick, free, kept):
    """The answer after `free` + `kept` blocks and how much the last changes; the gradient of the last `kept`."""
    net = parity.MODELS[parity.IMPLICIT]().double()
    bits, labels = parity.strings(3, 12, torch.Generator().manual_seed(0), CPU)
    got = net.loss(bits.double(), labels, lambda low, high: pick(low, high))
    z, u = net.start(bits.double())
    for step in range(free + kept):
        before = z.detach() if 0 < step == free else z
        z = net.blocks[0](before, u)
    right = torch.where(labels > 0, net.read(z), -net.read(z)).sigmoid()
    changes = [(a - b).norm() / a.norm() for a, b in zip(z, before, strict=True)]
    want = -right.log().mean() + parity.SETTLE * sum(changes) / 3
    assert torch.allclose(got, want, rtol=1e-12)
    grads = [torch.autograd.grad(value, list(net.parameters())) for value in (got, want)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_answers_of_the_tied_nets(monkeypatch):
    """The loop goes on for a block a bit; the equilibrium net stops where another block changes nothing."""
    monkeypatch.setattr(parity, "TOL", 1e-6)
    bits, _ = parity.strings(3, 9, torch.Generator().manual_seed(0), CPU)
    loop, deq = parity.MODELS[parity.TIED](), parity.MODELS[parity.IMPLICIT]()
    answer, steps = loop.answer(bits)
    z, u = loop.start(bits)
    for _ in range(9):
        z = loop.blocks[0](z, u)
    assert torch.allclose(answer, loop.read(z), atol=1e-5) and steps.tolist() == [9, 9, 9]
    answer, steps = deq.answer(bits)
    z, u = deq.start(bits)
    for _ in range(300):
        z = deq.blocks[0](z, u)
    assert torch.allclose(answer, deq.read(z), atol=1e-4) and (steps < 300).all()


def test_score_counts_strings_and_bits():
    """A net that misses the last bit of every other string."""

    class Net(nn.Linear):
        def answer(self, bits):
            logits = parity.prefix_parity(bits) - 0.5
            logits[::2, -1] *= -1
            return logits, torch.full((len(bits),), 7)

    score = parity.score(Net(1, 1), seed=0, length=10, count=8)
    assert (score.exact, score.bits, score.steps) == (50.0, pytest.approx(95.0), 7.0)


def solved() -> Solution:
    rate = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).unsqueeze(1)
    return fixed_point(lambda z: rate * z + 1, torch.zeros(5, 1), tol=1e-3, max_steps=200, trace=True)


def test_plot_of_residuals():
    solution = solved()
    ax = plot.residuals({"a": solution, "b": solution.trace}, tol=1e-3, ax=Figure().subplots())
    want = np.median(solution.trace.numpy(), axis=1)
    curves = [line for line in ax.get_lines() if len(line.get_xdata()) == len(want)]
    assert len(curves) == 2 and all(np.allclose(curve.get_ydata(), want) for curve in curves)
    assert curves[0].get_xdata()[0] == 1 and ax.get_yscale() == "log" and ax.get_xlabel() and ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    low, high = (np.quantile(solution.trace.numpy(), q, axis=1) for q in (0.1, 0.9))
    edge = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.min() == pytest.approx(low.min()) and edge.max() == pytest.approx(high.max())


def test_plot_of_a_single_solve():
    trace = torch.tensor([1.0, 0.1, 0.01])  # a batch shape of ()
    ax = plot.residuals(trace, ax=Figure().subplots())
    assert np.allclose(ax.get_lines()[0].get_ydata(), trace) and ax.get_legend() is None


def test_plot_of_steps():
    solution = solved()
    ax = plot.steps(solution, ax=Figure().subplots())
    bars = {round(bar.get_x() + bar.get_width() / 2): int(bar.get_height()) for bar in ax.patches if bar.get_height()}
    values, counts = solution.steps.unique(return_counts=True)
    assert bars == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_plot_without_trace():
    with pytest.raises(ValueError, match="trace=True"):
        plot.residuals(fixed_point(lambda z: z / 2, torch.ones(1, 1)), ax=Figure().subplots())


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "tritondeq[demo]"')):
        plot.steps(torch.tensor([1, 2]))
