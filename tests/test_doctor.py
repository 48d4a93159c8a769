"""The doctor reports what the dispatcher would do. No GPU is needed: one is faked, and Triton hidden."""

import types

import pytest
import torch

from tritondeq import doctor, set_backend
from tritondeq.kernels import devices, dispatch, tables


def lines(start: str) -> list[str]:
    return [line for line in doctor.report().splitlines() if line.startswith(start)]


@pytest.fixture(autouse=True)
def auto():
    set_backend("auto")
    yield
    set_backend("auto")


@pytest.fixture
def gpu(monkeypatch):
    """One GPU that only answers questions."""
    names = dict(name="Fake 9000", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    properties = types.SimpleNamespace(**names, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    devices.gpu.cache_clear()
    yield properties
    devices.gpu.cache_clear()


def solves() -> dict[str, list[str]]:
    """The table, by cell and solver."""
    _, _, text = doctor.report().partition("Fake 9000\n")
    rows = text.partition("\nwhole: ")[0].splitlines()[2:]
    return {row[: -4 * 7].strip(): row[-4 * 7 :].split() for row in rows}


def test_without_a_gpu_it_is_short(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = torch.random.get_rng_state()
    report = doctor.report()
    assert len(report.splitlines()) <= 10
    assert torch.__version__ in report and "python" in report and "numpy" in report
    assert "no CUDA device: solves run in torch on the CPU" in report
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_gpu_is_described(gpu):
    text = "cuda:0     Fake 9000, capability 9.0, 80.0 GiB, 132 multiprocessors"
    assert lines("cuda:0")[0] == f"{text}, 227 KiB shared memory per block"
    del gpu.shared_memory_per_block_optin  # as in torch 2.6
    assert doctor._gpu(gpu) == text.removeprefix("cuda:0     ")


def test_solves_are_those_of_the_dispatcher(monkeypatch, gpu):
    """With known answers: rows take up to 256 features, affine steps are for wider ones, and none has Anderson."""

    def refuses(*, solver_memory, features=64, **problem):
        return "too much history" if solver_memory else "too wide" if features > 256 else None

    def refuses_wide(*, solver_memory, terms, **problem):
        return "too much history" if solver_memory else "cuBLAS is faster" if terms == 1 else None

    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "too_old", lambda: None)
    load = dispatch.load
    fakes = {"rows": (refuses, "one Triton launch"), "affine": (refuses_wide, "one launch a step and its GEMM")}

    def fake(name):
        folder, _, op = name.rpartition(".")
        kind = "rows" if folder == "rows" else op
        return types.SimpleNamespace(refuses=fakes[kind][0], says=fakes[kind][1]) if kind in fakes else load(name)

    monkeypatch.setattr(dispatch, "load", fake)
    table = solves()
    assert table["Affine, Picard"] == ["whole"] * 3 + ["gemm"]
    assert table["Affine, bf16 operands, Picard"] == ["whole"] * 3 + ["steps"] and table["MLP, Picard"] == ["whole"] * 4
    assert table["Gated, Anderson"] == table["any cell, Broyden"] == ["steps"] * 4


def test_real_kernels_answer_without_a_gpu(gpu):
    if not dispatch.has_triton() or dispatch.too_old():
        pytest.skip("needs a Triton that the kernels take")
    table = solves()
    assert table["Affine, Picard"] == ["whole", "whole", "whole", "gemm"]
    assert table["MLP, bf16 operands, Picard"][:2] == ["whole", "whole"] and table["MLP, Picard"][3] == "steps"


def test_triton_missing_or_broken(monkeypatch, gpu):
    def load(name):
        raise ImportError("libsomething.so is missing")

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "load", load)
        if dispatch.has_triton() and not dispatch.too_old():
            assert "an error: libsomething.so is missing" in doctor.report()
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert lines("triton ") == ["triton     not installed: every solve runs in torch. On Linux, pip install triton"]
    assert set(sum(solves().values(), [])) == {"torch"}


def test_the_backend_in_force(monkeypatch, gpu):
    set_backend("torch")
    assert lines("backend") == ["backend    torch: torch for everything"] and set(sum(solves().values(), [])) == {
        "torch"
    }
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    assert "they are interpreted" in lines("kernels")[0]


def test_tables_in_force(monkeypatch, tmp_path, gpu):
    """Which file, of what date, how much of it counts, and what is wrong with it."""
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path))

    def section():
        return doctor.report().partition("launch parameters\n")[2].splitlines()

    none = "cuda:0  no table in force: pure functions of the shape. `python -m tritondeq tune` measures them"
    assert section() == [none]
    name, made = tables.Gpu("Fake 9000", (9, 0)), {"triton": tables.version(), "source": tables.source("steps.picard")}
    for width, date, changed in (
        (64, "2026-02-01", {}),
        (128, "2026-01-31", {}),
        (256, "2026-03-01", {"triton": "1.0"}),
    ):
        shape, chosen = {"width": width, "itemsize": 4, "features": 0}, {"BLOCK_N": 128, "num_warps": 1}
        path = tables.write(
            name, tables.Entry("steps.picard", shape, chosen, date=date, **made | changed), launch.spaces()
        )
    stale = "stale: made with another Triton or other kernels"
    assert section() == [f"cuda:0  {path}: 2 choices in force, the last of 2026-02-01, 1 {stale}"]
    monkeypatch.setattr(tables, "version", lambda: "2.0")
    assert section() == [f"cuda:0  {path}: nothing in force, 3 {stale}", none]
    path.write_text("{")
    line, last = section()
    assert line.startswith(f"cuda:0  {path}: nothing in force, damaged: JSONDecodeError: ") and last == none


def test_missing_packages_are_named(monkeypatch):
    find = doctor.util.find_spec
    monkeypatch.setattr(doctor.util, "find_spec", lambda name, *rest: None if name == "tqdm" else find(name, *rest))
    (line,) = lines("optional")
    assert line.startswith("optional   not installed: pip install ") and "tqdm" in line
