"""The round on a GPU that is not there: its order, its tests, its tuning, its time, and GPUs that will not do."""

import time

import pytest
import torch

from tritondeq.bench import __main__ as bench
from tritondeq.bench import machine, processes, report
from tritondeq.kernels import devices

CPU = torch.device("cpu")


@pytest.fixture
def stand_ins(monkeypatch):
    """(`go(*arguments)`, which returns results and what was done in which order; the parts it is to measure)."""
    log, parts = [], {}
    monkeypatch.setattr(machine, "roofs", lambda device, quick: log.append("roofs") or {"copy": 1e9})
    monkeypatch.setattr(processes, "run", lambda arguments, seconds: log.append(arguments[1]) or (0, "fine"))
    monkeypatch.setattr(bench, "_parts", lambda *_: list(parts.items()))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def go(*arguments):
        results = {"left_out": [], "records": [], "tests": None, "tuning": None}
        bench._round(results, torch.device("cuda"), bench._parser().parse_args(list(arguments)), [])
        return results, log

    return go, parts


def good(name):
    yield {"case": name}


def hangs(name="slow"):
    yield {"case": name}
    time.sleep(20)


def fails(error):
    raise error
    yield


def test_the_round_goes_in_order(stand_ins):
    go, parts = stand_ins
    parts |= {"one": good("one"), "two": good("two")}
    results, log = go()
    assert log == ["roofs", "pytest", "tritondeq"] and [r["case"] for r in results["records"]] == ["one", "two"]
    assert results["tests"]["passed"] and results["tuning"]["tuned"] and not results["left_out"]
    assert go("--no-tests", "--no-tune")[1][3:] == ["roofs"]


def test_a_part_that_fails_hangs_or_lacks_memory_does_not_end_the_round(stand_ins, monkeypatch):
    go, parts = stand_ins
    monkeypatch.setattr(bench, "PART_SECONDS", 0.1)
    parts |= {"slow": hangs(), "wide": fails(torch.OutOfMemoryError("no")), "broken": fails(KeyError("x"))}
    parts["last"] = good("last")
    results, _ = go()
    assert results["left_out"] == ["slow: stopped after 0 s", "wide: out of memory; take fewer --rows or --features"]
    assert [r["case"] for r in results["records"]] == ["slow", "broken", "last"]
    assert report.faults(results) == ["broken: raised KeyError: 'x'"]
    parts |= {"slow": hangs(), "late": good("late")}
    monkeypatch.setattr(bench, "SPARE_SECONDS", 0.05)
    assert go("--minutes", "0.001")[0]["left_out"][-1] == "late: no time"


def test_what_the_processes_of_a_round_report():
    assert processes.run(["-S", "-c", "print(1); print('2 passed')"], 60) == (0, "2 passed")
    assert processes.run(["-S", "-c", "import sys; sys.exit('no GPU')"], 60) == (1, "no GPU")
    assert processes.run(["-S", "-c", "import time; time.sleep(60)"], 0.2) == (None, "stopped after 0 s")
    assert processes.run(["-S", "-c", ""], 60) == (0, "no output") and processes.run([], 0) == (1, "no time")


def test_a_gpu_too_old_and_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    knobs = pytest.importorskip("triton").knobs
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    devices._chip.cache_clear()
    why = "the GPU is of capability 7.5, and the kernels need 8.0 or later"
    assert bench.unfit(cuda) == f"Tesla T4: {why}: take --cpu"
    devices._chip.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "file"))
    assert "set TRITON_CACHE_DIR to a folder it can write to" in bench.unfit(cuda)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "new"))
    assert bench.unfit(cuda) is None and bench.unfit(CPU) is None
    monkeypatch.setattr(bench, "installed", lambda package: package != "triton")
    assert "pip install triton, or take --cpu" in bench.unfit(cuda) and bench.unfit(CPU) is None
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "built for ROCm" in bench.unfit(cuda) and bench.unfit(CPU) is None
    devices._chip.cache_clear()
