"""The studies: each at its smallest from end to end, and the results that are committed."""

import json

import pytest
import torch
from matplotlib.image import imread

from tritondeq.bench import studies
from tritondeq.bench.studies import __main__ as command
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import plots, report, results
from tritondeq.bench.studies.study import SUITES, Job, Study
from tritondeq.toolbox import one_thread

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


def test_exactness_is_measured(tiny):
    _, out = tiny("explain")
    (path,) = out.glob("*.json")
    for run in results.load(path)["runs"]:
        assert 0 < run["exact"] < 1e-6
        assert run["as_trained"] < (0.05 if run["contestant"] in (who.DEQ, who.HYBRID) else 1e-4)


@pytest.mark.parametrize("name", studies.STUDIES)
def test_what_is_said_needs_no_runs_of_other_cases(name):
    study = studies.study(name)
    (found,) = results.chosen(results.FOLDER)[name]
    for case in study.cases:
        own = [run for run in found["runs"] if run["case"] == case]
        said = list(study.says(own))
        assert said and all(sentence in list(study.says(found["runs"])) for sentence in said)
