"""The doctor reports what the dispatcher would do. No GPU is needed: one is faked, and Triton hidden."""

import types

import pytest
import torch

import tritondeq as tdeq
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
    caches = devices.gpu, devices._chip
    for cache in caches:
        cache.cache_clear()
    yield properties
    for cache in caches:
        cache.cache_clear()


def solves() -> dict[str, list[str]]:
    """The table, by cell and solver."""
    _, _, text = doctor.report().partition("Fake 9000\n")
    rows = text.partition("\nwhole: ")[0].splitlines()[2:]
    return {row[: -4 * 7].strip(): row[-4 * 7 :].split() for row in rows}


def test_without_a_gpu_it_is_short(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    find = doctor.util.find_spec
    monkeypatch.setattr(doctor.util, "find_spec", lambda name, *rest: None if name == "tqdm" else find(name, *rest))
    report = doctor.report()
    assert len(report.splitlines()) <= 10
    assert torch.__version__ in report and "python" in report and "numpy" in report
    assert "no CUDA device: solves run in torch on the CPU" in report
    (line,) = lines("optional")
    assert line.startswith("optional   not installed: pip install ") and "tqdm" in line


def test_solves_with_the_real_kernels(gpu):
    if not dispatch.has_triton() or dispatch.too_old():
        pytest.skip("needs a Triton that the kernels take")
    state = torch.random.get_rng_state()
    table = solves()
    assert table["Affine, Picard"] == ["whole", "whole", "whole", "gemm"]
    assert table["MLP, bf16 operands, Picard"][:2] == ["whole", "whole"] and table["MLP, Picard"][3] == "steps"
    assert table["any cell, Broyden"] == ["steps"] * 4
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.device("meta"):
        assert solves() == table, "a default device counts for nothing"


def test_a_gpu_without_triton_or_with_a_broken_one(monkeypatch, gpu):
    def load(name):
        raise ImportError("libsomething.so is missing")

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "load", load)
        if dispatch.has_triton() and not dispatch.too_old():
            assert "an error: libsomething.so is missing" in doctor.report()
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert lines("triton ") == ["triton     not installed: every solve runs in torch. On Linux, pip install triton"]
    assert set(sum(solves().values(), [])) == {"torch"}
    text = "cuda:0     Fake 9000, capability 9.0, 80.0 GiB, 132 multiprocessors"
    assert lines("cuda:0")[0] == f"{text}, 227 KiB shared memory per block"
    del gpu.shared_memory_per_block_optin  # as in torch 2.6
    assert lines("cuda:0")[0] == text


@pytest.mark.parametrize("case", ["capability", "ROCm"])
def test_a_gpu_that_the_kernels_do_not_fit(monkeypatch, gpu, case):
    if case == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "6.2")
        why = "this torch is built for ROCm, and the kernels are for CUDA"
    else:
        gpu.major, gpu.minor = 7, 5
        why = "the GPU is of capability 7.5, and the kernels need 8.0 or later"
    assert f"kernels    not on cuda:0: {why}" in lines("kernels")
    assert set(sum(solves().values(), [])) == {"torch"}
    if dispatch.has_triton() and not dispatch.too_old():
        with tdeq.backend("triton"):
            assert f"an error: backend 'triton' can't run: {why}" in doctor.report()


def test_a_gpu_that_the_kernels_fit(gpu):
    assert not any("not on" in line for line in lines("kernels"))


def test_the_backend_in_force(monkeypatch, gpu):
    set_backend("torch")
    assert lines("backend") == ["backend    torch: torch for everything"]
    assert set(sum(solves().values(), [])) == {"torch"}
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    assert "they are interpreted" in lines("kernels")[0]


def test_the_table_of_launch_parameters(monkeypatch, tmp_path, gpu):
    """Which file, of what date, and what is wrong with it."""
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path))

    def section():
        return doctor.report().partition("launch parameters\n")[2]

    assert section().startswith("cuda:0  no table: ")
    for width, date in ((64, "2026-02-01"), (128, "2026-01-31")):
        path = tables.write(
            "Fake 9000", tables.Entry("steps.picard", {"width": width}, {"num_warps": 1}, 1.1, [], date)
        )
    assert section() == f"cuda:0  {path}: 2 choices, the last of 2026-02-01"
    path.write_text("{")
    assert section().startswith(f"cuda:0  {path} is damaged (JSONDecodeError")
