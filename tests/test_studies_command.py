"""The command of the studies, with a study of no work: what it continues, reports and refuses."""

import re
import sys

import pytest

from tritondeq.bench import machine
from tritondeq.bench.studies import __main__ as command
from tritondeq.bench.studies import plots, report, results
from tritondeq.bench.studies.study import SUITES, Job, Measure, Study


def fake(calls, fails=()) -> Study:
    def run(job: Job):
        calls.append((job.contestant, job.seed))
        if len(calls) in fails:
            raise KeyboardInterrupt
        ours = job.contestant == "DEQ"
        measures = {"score": 60.0 + job.seed if ours else 50.0 + job.seed, "cost": len(job.contestant), "load": 0.5}
        return measures | {"parameters": 10 if ours else 40}

    def pictures(runs):
        return {"scores": lambda figure: plots.bars(figure.subplots(), runs, "score")}

    return Study(
        name="images",
        title="A study of nothing",
        question="what is what?",
        data="none.",
        settings={suite: {"size": i} for i, suite in enumerate(SUITES)},
        contestants=("DEQ", "stack"),
        measures=(Measure("score", "score", "more", main=True), Measure("cost", "cost", "less")),
        run=run,
        pictures=pictures,
        says=lambda runs: [f"There are {len(runs)} runs."],
    )


@pytest.fixture
def go(monkeypatch, tmp_path):
    """Runs the fake study into tmp_path, on commit "abc" or another: exit status, calls of `run`."""

    def run(*arguments, fails=(), commit="abc"):
        calls = []
        monkeypatch.setattr(machine, "commit", lambda: commit)
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
    "before, after, words", [("abc", "abd", "another commit: abc"), ("abc-dirty", "abc-dirty", "not committed")]
)
def test_runs_of_another_commit_are_made_again(go, tmp_path, capsys, before, after, words):
    assert len(go(commit=before)[1]) == len(go(commit=after)[1]) == 6
    (path,) = tmp_path.glob("*.json")
    assert words in capsys.readouterr().err and len(results.load(path)["runs"]) == 6


def test_the_report_names_wins_and_losses(go, tmp_path):
    assert go()[0] == 0
    written = (tmp_path / "README.md").read_text()
    text = re.sub(" +", " ", written)
    assert "| images | score (more is better) | 51.0 | | | 61.0 win, -, - | | |" in text
    assert "* DEQ against the stack: win: score, cost." in text and "There are 6 runs." in text
    assert "| score | 61.0 ± 1.0 | 51.0 ± 1.0 |\n| cost | 3.0 | 5.0 |" in text and "commit abc" in text
    (tmp_path / "README.md").unlink()
    assert command.main(["report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == written


def test_what_is_refused(tmp_path, capsys):
    assert command.main(["report", "--out", str(tmp_path)]) == 1 and "run a study first" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main(["poetry"])
    assert "takes " in capsys.readouterr().err


def test_a_missing_package(monkeypatch, capsys, tmp_path):
    for module in ("tritondeq.bench.studies.images", "tritondeq.demo.digits"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert command.main(["images", "--out", str(tmp_path / "new")]) == 1
    missing = 'tritondeq: scikit-learn is missing: pip install "tritondeq[studies]"\n'
    assert capsys.readouterr().err == missing and not (tmp_path / "new").exists()
