"""The command of the studies, with a study of no work: what is kept, reported and refused."""

import sys
from dataclasses import replace

import pytest

from tritondeq.bench import measure, studies
from tritondeq.bench.studies import __main__ as command
from tritondeq.bench.studies import plots, report, results
from tritondeq.bench.studies.study import SUITES, Job, Measure, Study
from tritondeq.toolbox import one_thread


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


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
    for module in ("tritondeq.bench.studies.images", "tritondeq.demo.digits"):
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
