"""The studies: each at its smallest from end to end, and what they share: nets, training, verdicts, files, report."""

import json
import sys
from dataclasses import replace
from itertools import islice
from math import sqrt

import pytest
import torch
from matplotlib.image import imread
from torch import nn

import tritondeq as tdeq
from tritondeq.bench import measure, studies
from tritondeq.bench.studies import __main__ as command
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import explain, images, plots, report, results, train, verdict
from tritondeq.bench.studies.study import SUITES, Job, Measure, Study
from tritondeq.demo.common import one_thread, parameters

CPU = torch.device("cpu")
NOT_OF_THE_TEST_EXTRA = ("statsmodels", "gymnasium")
NOT_REPEATABLE = ("load", "curve")  # and what ends in seconds


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


def ready(name: str) -> Study:
    """The study, if what it needs is there."""
    study = studies.study(name)
    assert set(study.packages) <= set(NOT_OF_THE_TEST_EXTRA)
    for package in study.packages:
        pytest.importorskip(package)
    return study


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(study, folder) of a tiny round of that name, one seed; each is made once."""
    made = {}

    def run(name: str):
        study = ready(name)
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            with one_thread():
                assert (
                    command.main([name, "--suite", "tiny", "--seeds", "1", "--device", "cpu", "--out", str(out)]) == 0
                )
            made[name] = out
        return study, made[name]

    return run


@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_study_from_end_to_end(tiny, name):
    study, out = tiny(name)
    (path,) = out.glob("*.json")
    found = results.load(path)
    assert found["complete"] and found["suite"] == "tiny" and found["machine"]["torch"] == torch.__version__
    wanted = {(job.case, job.contestant, job.seed) for job in study.jobs("tiny", [0], CPU)}
    assert results.finished(found) == wanted and len(found["runs"]) == len(wanted)
    for run in found["runs"]:
        assert 0 < run["parameters"] and 0 < run["memory"] and 0 <= run["load"]
        assert {m.key for m in study.measures if m.main} <= run.keys()
    for case in study.cases:
        size = {run["contestant"]: run["parameters"] for run in plots.of(found["runs"], case=case)}
        assert size[who.BLOCK] <= size[who.STACK]
    text = (out / "README.md").read_text()
    assert study.title in text and "it shows that all works, and nothing else" in text
    assert text.count(f"|  | {' | '.join(study.contestants)} |") == len(study.cases)
    assert all(sum(m.title in line for line in text.splitlines()) for m in study.measures if m.main)


@pytest.mark.parametrize("name", studies.STUDIES)
def test_its_pictures_show_something(tiny, name):
    study, out = tiny(name)
    paths = sorted(out.glob("*.png"))
    assert paths and all(f"({path.name})" in (out / "README.md").read_text() for path in paths)
    for path in paths:
        image = imread(path)[..., :3]
        ink = (image < 0.9).any(axis=2)
        assert min(image.shape[:2]) >= 400 and 0.005 < ink.mean() < 0.5
        assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any(), "something is cut off"


@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_run_depends_on_its_job_alone(tiny, name):
    study, out = tiny(name)
    (path,) = out.glob("*.json")
    case = study.cases[-1]
    (first,) = plots.of(results.load(path)["runs"], case=case, contestant=study.contestants[0])
    torch.manual_seed(12345)
    again = json.loads(json.dumps(study.run(Job(case, study.contestants[0], 0, study.settings["tiny"], CPU))))
    same = {key: value for key, value in again.items() if key not in NOT_REPEATABLE and not key.endswith("seconds")}
    assert same == {key: first[key] for key in same}
    assert [point[::2] for point in again.get("curve", [])] == [point[::2] for point in first.get("curve", [])]


def test_settings_are_plain_values():
    for name in studies.STUDIES:
        settings = studies.study(name).settings
        assert json.loads(json.dumps(settings)) == settings and set(settings) == set(SUITES)


# What is committed


def committed():
    return [(path, results.load(path)) for path in sorted(results.FOLDER.glob("*.json"))]


def test_committed_results_are_complete_and_say_where_they_are_from():
    assert {r["study"] for _, r in committed()} <= set(studies.STUDIES)
    for path, r in committed():
        assert r["complete"] and r["suite"] in ("quick", "full") and path == results.path_of(r, results.FOLDER)
        assert r["machine"]["commit"] and "dirty" not in r["machine"]["commit"]
        assert len({run["seed"] for run in r["runs"]}) >= 3


@pytest.mark.skipif(not committed(), reason="no results are committed")
def test_the_committed_report_is_that_of_the_committed_results():
    readme = results.FOLDER.parent / "README.md"
    assert readme.read_text() == report.text(results.FOLDER, readme.parent), "python -m tritondeq.bench.studies report"
    linked = [line.split("](")[1].rstrip(")") for line in readme.read_text().splitlines() if line.startswith("![")]
    assert linked and all((readme.parent / link).exists() for link in linked)
    assert {path.name for path in results.FOLDER.glob("*.png")} == {link.rpartition("/")[2] for link in linked}


# The command, with a study of no work


def fake(calls, fails=()) -> Study:
    def run(job: Job):
        calls.append((job.contestant, job.seed))
        if len(calls) in fails:
            raise KeyboardInterrupt
        ours = job.contestant == "DEQ"
        told = {"score": 60.0 + job.seed if ours else 50.0 + job.seed, "cost": len(job.contestant), "load": 0.5}
        return told | {"parameters": 10 if ours else 40, "run_seconds": 4.0 if ours else 1.0}

    def pictures(runs):
        return {"scores": lambda figure: plots.bars(figure.subplots(), runs, "score")}

    return Study(
        name="images",
        title="A study of nothing",
        question="what is what?",
        data="none.",
        settings={suite: {"size": i} for i, suite in enumerate(SUITES)},
        contestants=("DEQ", "stack"),
        measures=(
            Measure("score", "score", "more", main=True),
            Measure("cost", "cost", "less"),
            Measure("run_seconds", "time of a run, ms", "less", scale=1e3),
            Measure("no", "no"),
        ),
        run=run,
        pictures=pictures,
        says=lambda runs: [f"There are {len(runs)} runs."],
    )


@pytest.fixture
def commit(monkeypatch):
    """Sets the commit that results are of; "abc" at first."""

    def set_to(value):
        monkeypatch.setattr(measure, "commit", lambda: value)

    set_to("abc")
    return set_to


@pytest.fixture
def go(monkeypatch, tmp_path, commit):
    """Runs the fake study into tmp_path: exit status, calls of `run`."""

    def run(*arguments, fails=()):
        calls = []
        for module in (command, report):
            monkeypatch.setattr(module, "study", lambda name: fake(calls, fails))
        return command.main(["images", "--device", "cpu", "--out", str(tmp_path), *arguments]), calls

    return run


def test_an_interrupted_study_goes_on_where_it_was(go, tmp_path, capsys):
    status, calls = go(fails=[4])
    assert status == command.INTERRUPTED and calls == [("DEQ", 0), ("stack", 0), ("DEQ", 1), ("stack", 1)]
    assert "finished runs are written" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    assert not results.load(path)["complete"] and len(results.load(path)["runs"]) == 3
    status, calls = go()
    assert status == 0 and calls == [("stack", 1), ("DEQ", 2), ("stack", 2)]
    done = results.load(path)
    assert done["complete"] and len(done["runs"]) == 6 and not list(tmp_path.glob("*.part"))
    assert go() == (0, []) and results.load(path) == done
    assert go("--seeds", "4")[1] == [("DEQ", 3), ("stack", 3)]
    assert len(go("--suite", "full")[1]) == 6 and len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize(
    "change, says", [("commit", "another commit: abc"), ("dirty", "not committed"), ("settings", "other")]
)
def test_runs_of_something_else_are_not_kept(go, commit, tmp_path, capsys, change, says):
    if change == "dirty":
        commit("abc-dirty")
    assert len(go()[1]) == 6
    (path,) = tmp_path.glob("*.json")
    if change == "commit":
        commit("abd")
    elif change == "settings":
        path.write_text(path.read_text().replace('"size": 1', '"size": 7'))
    assert len(go()[1]) == 6
    assert says in capsys.readouterr().err and len(results.load(path)["runs"]) == 6


def test_the_report_says_who_wins(go, tmp_path, capsys):
    assert go()[0] == 0
    text = (tmp_path / "README.md").read_text()
    assert "| images | score (more is better) | 51.0 |  |  | 61.0 win, -, - |  |  |" in text
    assert "* DEQ against the stack: win: score, cost; loss: time of a run." in text
    assert "| images | DEQ | 0.25 |" in text and "| time of a run, ms | 4,000.0 | 1,000.0 |" in text
    assert "| score | 61.0 ± 1.0 | 51.0 ± 1.0 |\n| cost | 3.0 | 5.0 |" in text and "There are 6 runs." in text
    assert "the DEQ has 1 wins, 0 ties, 0 losses." in text
    assert "commit abc" in text and "seeds 0, 1, 2" in text and "| no |" not in text
    (tmp_path / "README.md").unlink()
    assert command.main(["report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == text and "README.md" in capsys.readouterr().out


def test_a_busy_machine_is_told(go, tmp_path):
    go()
    (path,) = tmp_path.glob("*.json")
    assert "busy" not in report.text(tmp_path, tmp_path)
    path.write_text(path.read_text().replace('"load": 0.5', '"load": 900'))
    text = report.text(tmp_path, tmp_path)
    assert "others kept the machine busy (load 900.0 of" in text
    assert "* DEQ against the stack: win: score, cost." in text


def test_the_longest_suite_is_reported(go, tmp_path):
    go("--suite", "full")
    go("--suite", "quick")
    text = report.text(tmp_path, tmp_path)
    assert "Suite full," in text and "Suite quick" not in text


@pytest.mark.parametrize(
    "text, says", [("{", "not a JSON file"), ("[]", "lacks schema"), ('{"schema": 1}', "lacks study")]
)
def test_a_file_that_is_no_results_file(tmp_path, capsys, text, says):
    (tmp_path / "r.json").write_text(text)
    assert command.main(["report", "--out", str(tmp_path)]) == 1
    assert says in capsys.readouterr().err


def test_results_of_another_schema(go, tmp_path, capsys):
    go()
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    assert command.main(["report", "--out", str(tmp_path)]) == 1 and "schema 2" in capsys.readouterr().err


def test_nothing_to_report(tmp_path, capsys):
    assert command.main(["report", "--out", str(tmp_path)]) == 1 and "run a study first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["poetry"], [], ["images", "--suite", "huge"], ["images", "--seeds", "0"], ["--rows"]]
)
def test_bad_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(wrong)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_missing_package(monkeypatch, capsys, tmp_path):
    for module in ("tritondeq.bench.studies.images", "tritondeq.demo.results"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert command.main(["images", "--out", str(tmp_path / "new")]) == 1
    said = 'tritondeq: scikit-learn is missing: pip install "tritondeq[studies]"\n'
    assert capsys.readouterr().err == said and not (tmp_path / "new").exists()


def test_a_missing_package_of_a_study(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(command, "study", lambda name: replace(fake(calls), packages=("no_such_package",)))
    assert command.main(["images", "--out", str(tmp_path / "new")]) == 1
    said = 'tritondeq: no_such_package is missing: pip install "tritondeq[studies]"\n'
    assert capsys.readouterr().err == said and not calls and not (tmp_path / "new").exists()


def test_unknown_study():
    with pytest.raises(ValueError, match="study must be one of images.*got 'poetry'"):
        studies.study("poetry")


def test_what_a_measure_and_a_study_refuse():
    with pytest.raises(ValueError, match="better must be"):
        Measure("a", "a", "most")
    with pytest.raises(ValueError, match="main must be False for 'a'"):
        Measure("a", "a", main=True)
    with pytest.raises(ValueError, match="got none for quick"):
        replace(fake([]), settings={"tiny": {}, "full": {}})


# The verdict


def test_the_verdict_is_students_t():
    """Spread 1 of three seeds each: the standard error is sqrt(2 / 3), the quantile for 4 degrees of freedom 2.776."""
    edge = 2.776445 * sqrt(2 / 3)
    a = [9.0, 10.0, 11.0]
    for gap, word in ((0.0, "tie"), (0.999 * edge, "tie"), (1.001 * edge, "win")):
        b = [v + gap for v in a]
        assert verdict.compare(b, a, "more").word == word and verdict.compare(a, b, "less").word == word
        lost = {"tie": "tie", "win": "loss"}[word]
        assert verdict.compare(a, b, "more").word == lost and verdict.compare(b, a, "less").word == lost
    assert verdict.compare(a, a, "more").allowed == pytest.approx(edge)


def test_the_verdict_on_counts_without_spread():
    assert verdict.compare([3, 3], [4, 4], "less").word == "win"
    assert verdict.compare([4, 4], [4, 4], "less").word == "tie"


def test_one_seed_gives_no_verdict():
    assert verdict.compare([3.0], [4.0, 5.0], "less").word == ""


def test_the_chance_of_test_samples_counts():
    """90 and 92 % of 100 images, three seeds without spread: the error is sqrt((9 + 7.36) / 3)."""
    ours, theirs = [92.0] * 3, [90.0] * 3
    assert verdict.compare(ours, theirs, "more").word == "win"
    told = verdict.compare(ours, theirs, "more", samples=100)
    assert told.word == "tie" and told.allowed == pytest.approx(2.776445 * sqrt((9 + 7.36) / 3))
    assert verdict.compare(ours, theirs, "more", samples=100_000).word == "win"


def test_a_measure_that_a_contestant_lacks_is_not_judged():
    runs = [{"contestant": "DEQ", "a": 1.0}, {"contestant": "stack", "a": None}]
    assert verdict.judge(runs, Measure("a", "a", "less"), "DEQ", "stack") is None
    assert verdict.judge(runs * 2, Measure("a", "a"), "DEQ", "DEQ") is None


# Contestants and training


def make():
    return tdeq.cells.MLP(8, hidden=8)


def test_the_contestants_are_what_they_are_said_to_be():
    x = torch.randn(5, 8)
    size = parameters(make())
    nets = {name: who.body(name, make, 3, tol=1e-5) for name in who.ALL}
    assert {name: parameters(net) // size for name, net in nets.items()} == {
        **{who.DEQ: 1, who.WIDE: 1, who.LOOP: 1, who.BLOCK: 1},
        **{who.STACK: 3, who.HYBRID: 3},
    }
    block, stack, loop = (nets[name] for name in (who.BLOCK, who.STACK, who.LOOP))
    for cell in (*stack.blocks, block.blocks[0]):
        cell.load_state_dict(loop.cell.state_dict())
    cell = loop.cell
    u = cell.inject(x)
    once = cell(torch.zeros_like(x), u)
    thrice = cell(cell(once, u), u)
    assert torch.allclose(block(x), once) and torch.allclose(stack(x), thrice) and torch.allclose(loop(x), thrice)
    assert torch.allclose(block(x, z0=once), cell(once, u))
    change = (thrice - cell(once, u)).norm(dim=1) / thrice.norm(dim=1)
    assert torch.allclose(who.effort(stack), change)
    z = nets[who.DEQ](x)
    assert torch.allclose(nets[who.DEQ].cell(z, nets[who.DEQ].cell.inject(x)), z, atol=1e-4)
    hybrid = nets[who.HYBRID]
    z = hybrid.core(hybrid.prelude(x))
    assert torch.allclose(hybrid(x), hybrid.coda(x, z))
    assert (who.steps(block), who.steps(stack), who.steps(loop)) == (1, 3, 3)
    assert torch.equal(who.steps(hybrid), hybrid.core.last.steps + 2.0)
    nets[who.WIDE](x)
    assert [who.solution(nets[name]) is None for name in who.ALL] == [False, False, False, True, True, True]
    assert torch.equal(who.effort(nets[who.DEQ]), nets[who.DEQ].last.residual)


def test_a_stack_takes_any_module_as_block():
    class Halve(nn.Module):
        def forward(self, z, x):
            return (z + x) / 2

    x = torch.ones(2, 3)
    assert torch.equal(who.body(who.STACK, Halve, 2)(x), 0.75 * x)
    with pytest.raises(ValueError, match="contestant must be one of DEQ.*got 'Stack'"):
        who.body("Stack", Halve, 2)


def test_matched_is_the_nearest_width():
    assert who.matched(lambda width: width**2, 110, range(1, 50)) == 10
    assert who.matched(lambda width: width**2, 111, range(1, 50)) == 11


def test_batches_are_epochs_of_the_seed():
    order = [batch.tolist() for batch in train.batches(3, 10, 4, 5)]
    assert all(len(batch) == 4 for batch in order) and not set(order[0]) & set(order[1])
    assert order == [batch.tolist() for batch in train.batches(3, 10, 4, 5)]
    assert order != [batch.tolist() for batch in train.batches(4, 10, 4, 5)]
    assert set(sum((batch.tolist() for batch in train.batches(3, 10, 4, 40)), [])) == set(range(10))


def test_training_is_matched_and_counted():
    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.tensor([5.0]))

    nets, seen = [Point(), Point()], []
    for net in nets:
        spent = train.train(
            net,
            lambda target, net=net: (net.at - target).square().sum(),
            (seen.append(net) or torch.tensor([1.0]) for _ in range(1000)),
            updates=200,
            lr=0.2,
            weight_decay=0.0,
            check=lambda net=net: net.at.item(),
        )
    assert len(seen) == 400 and nets[0].at == nets[1].at and abs(nets[0].at.item() - 1) < 0.05
    assert [point[0] for point in spent["curve"]] == [25 * i for i in range(1, 9)]
    assert spent["curve"][-1][2] == nets[0].at.item() and spent["final_loss"] < 0.01
    assert 0 < spent["curve"][0][1] < spent["curve"][-1][1] == spent["seconds"] <= spent["wall_seconds"] + 0.1
    with pytest.raises(ValueError, match="200 batches, got 3"):
        train.train(nets[0], lambda b: nets[0].at.sum(), islice(iter("abcdef"), 3), updates=200, lr=0.1)


def test_work_is_counted_where_torch_has_formulas():
    """One row: 2 D D a product; the injection and two products an evaluation, of which the tolerance decides."""
    x, product = torch.randn(1, 8), 2 * 8 * 8
    for name, blocks in ((who.BLOCK, 1), (who.STACK, 3), (who.LOOP, 3), (who.DEQ, None)):
        net = who.body(name, make, 3, tol=1e-5)
        told = train.work(net, lambda net=net: net(x).sum(), lambda net=net: net(torch.cat([x] * 5)), 5)
        injections, evaluations = (3 if name == who.STACK else 1), blocks or net.last.steps.max().item()
        assert told["sample_flops"] == product * (injections + 2 * evaluations)
        if blocks:  # backward: by all weights, and by all states and injections
            backward = product * (injections + 2 * 2 * evaluations)
            assert told["step_flops"] == told["sample_flops"] + backward
        assert all(p.grad is None for p in net.parameters())


def test_what_became_of_a_solve():
    net = tdeq.DEQ(make(), tol=1e-4)
    net(torch.randn(6, 8))
    told = train.solved(net)
    assert told["converged"] == 100 == told["status"]["converged"] and told["most_steps"] == net.last.steps.max()
    assert told["steps"] == pytest.approx(net.last.steps.float().mean().item()) and told["residual"] < 1e-4
    stuck = tdeq.DEQ(make(), tol=1e-12, max_steps=2)
    stuck(torch.randn(6, 8))
    assert train.solved(stuck)["status"] == {"max_steps": 100.0} and train.solved(stuck)["converged"] == 0
    assert train.solved(who.body(who.STACK, make, 4)) == {"steps": 4, "most_steps": 4}


def test_equal_time():
    quick = [[[1, 1.0, 10.0], [2, 2.0, 20.0]], [[1, 1.5, 12.0], [2, 3.0, 24.0]]]
    slow = [[[1, 2.0, 30.0], [2, 4.0, 40.0]], [[1, 3.0, 34.0], [2, 6.0, 50.0]]]
    assert train.at_equal_time({"quick": quick, "slow": slow}) == (2.5, {"quick": 16.0, "slow": 32.0})


# Images and what explains them


def test_a_cluttered_image_has_the_digit_it_is_said_to_have(monkeypatch):
    monkeypatch.setattr(images, "GRAIN", 0.0)
    digits = images.Data.split(0, CPU)
    x, y = images.clutter(digits.x[:50], digits.y[:50], 12, torch.Generator().manual_seed(0))
    assert x.shape == (12, 1, images.SIDE, images.SIDE)
    windows = x[:, 0].unfold(1, 8, 1).unfold(2, 8, 1).reshape(12, -1, 64)
    for own, label in zip(windows, y, strict=True):
        apart = torch.cdist(own, digits.x[:50].flatten(1)).amin(0)
        assert apart.min() == 0 and label in digits.y[:50][apart == 0]


def test_an_attack_stays_near_and_hurts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    moved = images.attacked(net, x, y, 0.05, 4)
    losses = [nn.functional.cross_entropy(net(at), y) for at in (x, x + 0.05 * torch.randn_like(x).sign(), moved)]
    assert losses[2] > 1.05 * losses[0] and losses[2] > losses[1] and not moved.requires_grad
    assert (moved - x).abs().max() <= 0.05 + 1e-6 and moved.min() >= 0 and moved.max() <= 1


def test_pushes_and_pulls_are_those_of_the_jacobian():
    study = explain.STUDY
    for contestant in (who.DEQ, who.STACK):
        net = explain.images.build(Job(explain.images.DIGITS, contestant, 0, study.settings["tiny"], CPU))
        net = explain.tightened(net)
        x, v = torch.rand(1, 1, 8, 8).double(), torch.randn(1, 1, 8, 8).double()
        j = torch.autograd.functional.jacobian(net.features, x).reshape(-1, 64)
        _, pushed, back = explain.push(net, x, v)
        assert torch.allclose(pushed.flatten(), j @ v.flatten(), rtol=1e-7)
        assert torch.allclose(back.flatten(), j.mT @ (j @ v.flatten()), rtol=1e-7)
        logits, slopes = explain.jacobian(net, x)
        assert torch.allclose(logits, net(x)) and slopes.shape == (1, 10, 64)
        assert torch.allclose(slopes, torch.autograd.functional.jacobian(net, x).reshape(1, 10, 64), rtol=1e-7)
        size = torch.linalg.matrix_norm(j, 2) * x.norm() / net.features(x).norm()
        told = explain.sensitivity(net, x)["stretch"]
        assert 0.8 * size < told <= (1 + 1e-9) * size


def test_exactness_is_measured(tiny):
    _, out = tiny("explain")
    (path,) = out.glob("*.json")
    for run in results.load(path)["runs"]:
        assert 0 < run["exact"] < 1e-6
        assert run["as_trained"] < (0.05 if run["contestant"] in (who.DEQ, who.HYBRID) else 1e-4)


def test_the_residual_of_an_early_step_is_that_of_the_trace():
    job = Job(images.DIGITS, who.HYBRID, 0, images.STUDY.settings["tiny"], CPU)
    net, x = images.build(job), torch.rand(12, 1, 8, 8)
    logits = net(x)
    y = logits.argmax(1)
    y[explain.margins(logits).argsort()[:4]] += 1  # the margin tells all errors
    told = explain.hard(net, x, y, torch.zeros_like(x))
    assert told["margin_tells"] == 1 and told["misread"] == pytest.approx(100 / 3)
    net.body.core.max_steps, net.body.core.solver = explain.EARLY, tdeq.Anderson(memory=4)
    wrong = net(x).argmax(1) != y
    assert told["residual_tells"] == explain.auc(net.body.core.last.residual, wrong) is not None
    assert net.body.core.trace is False and told["effort_tells_noise"] == 0.5


def test_what_distance_foretells_of_a_linear_net():
    """Each image is pushed straight to its nearest border, all as far: those within reach flip, and no others."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    w = net[1].weight.data.mul_(torch.linspace(0.5, 1.5, 10)[:, None])
    x = torch.randn(40, 1, 8, 8).double()
    logits = net(x).detach()
    y = logits.argmax(1)
    distances = (logits.gather(1, y[:, None]) - logits) / (w[y][:, None] - w).norm(dim=2)
    distance, nearest = distances.nan_to_num(nan=torch.inf).min(1)
    toward = nn.functional.normalize(w[nearest] - w[y], dim=1)
    noise = (distance.median() * 1.001 * toward).view_as(x)
    told = explain.flips(net, x, y, noise, {"levels": [0.1], "noise": 1.0})
    assert told["distance_foretells"] == 1 > told["margin_foretells"] and told["linear"] < 1e-9
    assert told["slope"] == pytest.approx(torch.linalg.matrix_norm(w, 2).item())


def test_rank_correlation():
    a = torch.tensor([1.0, 2.0, 3.0])
    assert explain.rank_correlation(a, a.exp()) == pytest.approx(1) == -explain.rank_correlation(a, -a)
    assert explain.rank_correlation(a, a * 0) is None


def test_the_area_under_the_curve():
    score, wrong = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1])
    assert explain.auc(score, wrong) == 1 and explain.auc(-score, wrong) == 0 and explain.auc(score, wrong * 0) is None


@pytest.mark.parametrize("name", studies.STUDIES)
def test_what_is_said_needs_no_runs_of_other_cases(name):
    study = studies.study(name)
    (found,) = results.chosen(results.FOLDER)[name]
    for case in study.cases:
        own = [run for run in found["runs"] if run["case"] == case]
        said = list(study.says(own))
        assert said and all(sentence in list(study.says(found["runs"])) for sentence in said)
