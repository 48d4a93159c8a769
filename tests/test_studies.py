"""The studies: each at its smallest from end to end, and the results that are committed."""

import json

import pytest
import torch

from tritondeq.bench import studies
from tritondeq.bench.studies import __main__ as command
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import plots, report, results
from tritondeq.bench.studies.study import Job
from tritondeq.toolbox import one_thread

CPU = torch.device("cpu")
NOT_REPEATABLE = ("load", "curve")  # and what ends in seconds


@pytest.mark.slow
@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_study_from_end_to_end(tmp_path, name):
    imread = pytest.importorskip("matplotlib.image").imread
    study = studies.study(name)
    for package in study.packages:
        pytest.importorskip(package)
    with one_thread():
        tiny = [name, "--suite", "tiny", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path)]
        assert command.main(tiny) == 0
        (path,) = tmp_path.glob("*.json")
        made = results.load(path)
        case = study.cases[-1]
        (first,) = plots.of(made["runs"], case=case, contestant=study.contestants[0])
        torch.manual_seed(12345)  # on which a run must not depend
        again = json.loads(json.dumps(study.run(Job(case, study.contestants[0], 0, study.settings["tiny"], CPU))))
    assert made["complete"] and made["suite"] == "tiny" and made["machine"]["torch"] == torch.__version__
    wanted = {(job.case, job.contestant, job.seed) for job in study.jobs("tiny", [0], CPU)}
    assert results.finished(made) == wanted and len(made["runs"]) == len(wanted)
    for run in made["runs"]:
        assert 0 < run["parameters"] and 0 < run["memory"] and 0 <= run["load"]
        assert {m.key for m in study.measures if m.main} <= run.keys()
    for case in study.cases:
        size = {run["contestant"]: run["parameters"] for run in plots.of(made["runs"], case=case)}
        assert size[who.BLOCK] <= size[who.STACK]
    same = {key: value for key, value in again.items() if key not in NOT_REPEATABLE and not key.endswith("seconds")}
    assert same == {key: first[key] for key in same}
    assert [point[::2] for point in again.get("curve", [])] == [point[::2] for point in first.get("curve", [])]
    text, pictures = (tmp_path / "README.md").read_text(), sorted(tmp_path.glob("*.png"))
    assert study.title in text and "it shows that all works, and nothing else" in text
    assert all(m.title in text for m in study.measures if m.main)
    assert pictures and all(f"({picture.name})" in text for picture in pictures)
    for picture in pictures:
        image = imread(picture)[..., :3]
        ink = (image < 0.9).any(axis=2)
        assert min(image.shape[:2]) >= 400 and 0.005 < ink.mean() < 0.5
        assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any(), "something is cut off"


def test_committed_results_are_complete_and_from_a_commit():
    committed = [(path, results.load(path)) for path in sorted(results.FOLDER.glob("*.json"))]
    assert {made["study"] for _, made in committed} == set(studies.STUDIES)
    for path, made in committed:
        assert made["complete"] and made["suite"] in ("quick", "full") and path == results.path_of(made, results.FOLDER)
        assert made["machine"]["commit"] and "dirty" not in made["machine"]["commit"]
        assert len({run["seed"] for run in made["runs"]}) >= 3


def test_the_committed_report_is_that_of_the_committed_results():
    readme = results.FOLDER.parent / "README.md"
    assert readme.read_text() == report.text(results.FOLDER, readme.parent), "python -m tritondeq.bench.studies report"
    linked = [line.split("](")[1].rstrip(")") for line in readme.read_text().splitlines() if line.startswith("![")]
    assert linked and all((readme.parent / link).exists() for link in linked)
    assert {path.name for path in results.FOLDER.glob("*.png")} == {link.rpartition("/")[2] for link in linked}
