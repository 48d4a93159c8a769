"""The round on a GPU that is not there: its order, its tests, its tuning, its time, and GPUs that will not do."""

import subprocess
import time

import pytest
import torch

from tritondeq.bench import __main__ as bench
from tritondeq.bench import measure, report

CPU = torch.device("cpu")


@pytest.fixture
def stand_ins(monkeypatch):
    """A round on a device that is not there: what it does in which order, and what its parts are to be."""
    log, parts = [], {}
    monkeypatch.setattr(measure, "roofs", lambda device, quick: log.append("roofs") or {"copy": 1e9})
    monkeypatch.setattr(bench, "_tests", lambda: log.append("tests") or {"passed": True, "says": "9 passed"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def tune(minutes):
        log.append("tuning")
        return {"tuned": minutes > 0, "says": "tuned"}

    def made(results, device, suite, these, seconds, compiles):
        log.append(f"compiles: {compiles()}")
        return list(parts.items())

    monkeypatch.setattr(bench, "_tune", tune)
    monkeypatch.setattr(bench, "_parts", made)

    def go(*arguments):
        arguments = bench._parser().parse_args(list(arguments))
        results = {"left_out": [], "records": [], "tests": None, "tuning": None}
        bench._round(results, torch.device("cuda"), arguments, [])
        return results, log

    return go, parts


def good(name):
    yield {"case": name, "goal": "G1"}


def test_the_round_on_a_gpu_goes_in_order(stand_ins):
    go, parts = stand_ins
    parts |= {"one": good("one"), "two": good("two")}
    results, log = go()
    assert log == ["roofs", "tests", "tuning", "compiles: True"]
    assert [r["case"] for r in results["records"]] == ["one", "two"] and not results["left_out"]
    assert results["tests"]["passed"] and results["tuning"]["tuned"]
    assert go("--no-tests", "--no-tune")[1][4:] == ["roofs", "compiles: True"]


def test_a_part_that_fails_hangs_or_finds_no_room_does_not_end_the_round(stand_ins, monkeypatch):
    go, parts = stand_ins

    def hangs():
        yield {"case": "slow", "goal": "G1"}
        time.sleep(20)

    def runs(error):
        raise error
        yield

    monkeypatch.setattr(bench, "PART_SECONDS", 0.1)
    parts |= {"slow": hangs(), "wide": runs(torch.OutOfMemoryError("no")), "broken": runs(KeyError("x"))}
    parts["last"] = good("last")
    results, _ = go()
    assert results["left_out"] == ["slow: stopped after 0 s", "wide: out of memory; take fewer --rows or --features"]
    assert [r["case"] for r in results["records"]] == ["slow", "broken", "last"]
    assert report.faults(results) == ["broken: raised KeyError: 'x'"]


def test_no_part_goes_on_after_the_time(stand_ins, monkeypatch):
    go, parts = stand_ins
    monkeypatch.setattr(bench, "SPARE_SECONDS", 0.05)

    def hangs():
        time.sleep(20)
        yield

    parts |= {"slow": hangs(), "late": good("late")}
    results, log = go("--minutes", "0.001")
    assert results["left_out"] == ["slow: stopped after 0 s", "late: no time"]


def test_the_tests_of_the_round(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TESTS", tmp_path)
    (tmp_path / "test_a.py").write_text("def test_a(): pass\n")
    (tmp_path / "test_offline_b.py").write_text("def test_b(): assert False\n")
    assert bench._tests()["passed"] is True and "1 passed" in bench._tests()["says"]
    (tmp_path / "test_c.py").write_text("def test_c(): assert False\n")
    found = bench._tests()
    assert found["passed"] is False and "1 failed" in found["says"]
    (tmp_path / "test_c.py").write_text("import time\n\n\ndef test_c(): time.sleep(60)\n")
    monkeypatch.setattr(bench, "TESTS_SECONDS", 3)
    found = bench._tests()
    assert found["passed"] is None and "stopped after 3 s" in found["says"]


def test_tuning_is_tried_and_what_came_of_it_is_said(monkeypatch):
    found = object()
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "tritondeq.tune" else found)
    assert bench._tune(1.0) == {"tuned": False, "says": "this installation has no tritondeq.tune"}
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: found)
    assert bench._tune(0.0) == {"tuned": False, "says": "no time"}
    say = "import sys, time; print('12 shapes\\nwritten: table.json'); sys.stderr.write('no GPU\\n'); "
    interrupted = "except KeyboardInterrupt: sys.stderr.write('interrupted; finished: 3\\n'); sys.exit(130)"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(30)"
    codes = {
        say + "sys.exit(0)": (1.0, True, "written: table.json"),
        say + "sys.exit(1)": (1.0, False, "no GPU"),
        f"import sys, time\ntry: time.sleep(30)\n{interrupted}": (4 / 60, True, "interrupted; finished: 3"),
        deaf: (4 / 60, False, "did not stop after 4 s"),
    }
    monkeypatch.setattr(bench, "STOPPING_SECONDS", 2)
    start = subprocess.Popen
    for code, (minutes, tuned, says) in codes.items():

        def run(command, code=code, **options):
            assert command[1:] == ["-m", "tritondeq", "tune"]
            return start([command[0], "-S", "-c", code], **options)

        monkeypatch.setattr(bench.subprocess, "Popen", run)
        assert bench._tune(minutes) == {"tuned": tuned, "says": says}


def test_a_gpu_too_old_and_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    knobs = pytest.importorskip("triton").knobs
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert bench.unfit(cuda) == "Tesla T4 has capability 7.5, and the kernels need 8.0 (A100) or later: take --cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "file"))
    assert "set TRITON_CACHE_DIR to a folder it can write to" in bench.unfit(cuda)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "new"))
    assert bench.unfit(cuda) is None and bench.unfit(CPU) is None
    monkeypatch.setattr(bench, "installed", lambda package: package != "triton")
    assert "pip install triton, or take --cpu" in bench.unfit(cuda) and bench.unfit(CPU) is None
