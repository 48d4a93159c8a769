"""The doctor says what the dispatcher would do. No GPU is needed: one is faked, and Triton hidden, as a test needs."""

import types

import pytest
import torch

from tritondeq import doctor, set_backend
from tritondeq.kernels import dispatch, launch, tables


def section(title: str) -> str:
    """What the report says under a heading."""
    (text,) = [part for part in doctor.report().split("\n\n") if part.startswith(title)]
    return text


@pytest.fixture(autouse=True)
def auto():
    set_backend("auto")
    yield
    set_backend("auto")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def op(monkeypatch):
    """Stands in for the affine ops, so that the answers are known: one takes up to 256 features, and no Anderson; the
    other's rule is against bf16."""

    def refuses(*, dtype, solver_memory, features=64, **problem):
        if solver_memory:
            return "too much history"
        return None if features <= 256 and dtype == torch.float32 else f"{features} features in {dtype} are too many"

    def refuses_wide(*, solver_memory, dtype, terms, **problem):
        if solver_memory or dtype == torch.float64:
            return refuses(solver_memory=solver_memory, dtype=dtype, features=problem["features"])
        return "cuBLAS is faster" if terms == 1 else None

    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "too_old", lambda: None)
    ops = {"affine": refuses, "mlp": refuses, "gated": refuses, "affine_steps": refuses_wide}
    for name, why in ops.items():
        says = "with its GEMM" if name == "affine_steps" else "one Triton launch"
        monkeypatch.setitem(dispatch._ops, name, types.SimpleNamespace(refuses=why, says=says))


@pytest.fixture
def gpu(monkeypatch, op):
    """One GPU that only answers questions, and, as in torch 2.6, none about its shared memory."""
    names = dict(name="Fake 9000", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    properties = types.SimpleNamespace(**names)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    launch.gpu.cache_clear()
    yield properties
    launch.gpu.cache_clear()


def test_versions():
    text = section("tritondeq 0.")
    assert torch.__version__ in text and "python" in text and "numpy" in text


def test_no_gpu(no_gpu):
    assert "none: " in section("GPUs")
    assert "a CUDA device, if there were one" in section("Solves")


def test_gpu_is_described(gpu):
    assert "cuda:0  Fake 9000, capability 9.0, 80.0 GiB, 132 multiprocessors" in section("GPUs")
    assert "shared memory" not in section("GPUs")
    gpu.shared_memory_per_block_optin = 227 * 1024
    assert "227 KiB shared memory per block" in section("GPUs")


def test_solves_are_what_the_dispatcher_answers(gpu):
    text = section("Solves")
    assert "cpu: the loop: tensors are on cpu, and Triton is for CUDA, for every problem asked" in text
    assert "a step of the loop, any cell: Picard in torch, Anderson in torch, Broyden in torch" in text
    _, _, on_gpu = text.partition("cuda:0\n")
    on_gpu, _, steps = on_gpu.partition("    a step of the loop, any cell: ")
    assert steps == "Picard one launch a step, Anderson {0}, Broyden {0}".format("one or two launches a step")
    answers, answer = {}, None
    for line in on_gpu.splitlines():
        if line.startswith(" " * 6):
            answers[answer].append(line.strip())
        else:
            answer = line.strip()
            answers[answer] = []
    assert answers["one Triton launch"] == [
        "Affine, float32, 64/128/256 features, by Picard",
        "Affine, bf16 operands, 64/128/256 features, by Picard",
        *(f"{cell}, 64/128/256/512 features, by Picard" for cell in list(doctor.CELLS)[3:]),
    ]
    assert answers["with its GEMM"] == ["Affine, float32, 512 features, by Picard"]
    assert answers["the loop: cuBLAS is faster"] == ["Affine, bf16 operands, 512 features, by Picard"]
    assert answers["the loop: 64 features in torch.float64 are too many"]
    assert len(answers["the loop: too much history"]) == len(doctor.CELLS)


def test_real_op_answers_without_a_gpu(no_gpu):
    if not dispatch.has_triton():
        pytest.skip("needs triton")
    _, _, text = section("Solves").partition("a CUDA device, if there were one\n")
    taken, _, refused = text.partition("the loop: ")
    assert "one Triton launch" in taken and "Affine, float32, 64/128/256 features, by Picard" in taken
    assert "MLP, bf16 operands, 64/128 features, by Picard" in taken
    assert "512" not in taken.partition("one launch a step and its GEMM")[0]
    assert "one launch a step and its GEMM\n" in taken and "Affine, float32, 512 features, by Picard" in taken
    assert "bytes of weights in 2 bf16 terms do not fit" in text
    assert "512 features, by Anderson(4)" in refused


def test_barriers_are_said(no_gpu):
    """And what is solved with them, where they are asked for."""
    if not dispatch.has_triton():
        pytest.skip("needs triton")
    never = "which no GPU has run, are not taken: set_backend(..., barriers=True) asks for them"
    assert never in section("Backend") and "a grid barrier" not in section("Solves")
    set_backend("auto", barriers=True)
    assert "which no GPU has run, may be taken" in section("Backend")
    _, _, text = section("Solves").partition("one Triton launch with a grid barrier a step\n")
    taken, _, _ = text.partition("the loop: ")
    assert "Affine, float32, 512 features, by Picard" in taken
    assert "float64 state, and the kernel's is float32" in text


def test_triton_missing(monkeypatch, gpu):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert "triton   not installed: every solve runs in torch" in section("tritondeq 0.")
    assert "cuda:0: the loop: triton is not installed" in section("Solves")


def test_triton_broken(monkeypatch, gpu):
    """It is installed and its import fails: the report says how, and goes on."""

    def load(name):
        raise ImportError("libsomething.so is missing")

    monkeypatch.setattr(dispatch, "load", load)
    assert "an error: libsomething.so is missing" in section("Solves")


def test_backend_in_force(gpu):
    set_backend("torch")
    assert "torch: " in section("Backend")
    assert "cuda:0: the loop: the torch backend is chosen" in section("Solves")


def test_forced_triton_on_cpu_is_said(monkeypatch, gpu):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    set_backend("triton")
    assert "cpu: an error: backend 'triton' can't run on cpu tensors" in section("Solves")


def test_interpreter_is_said(monkeypatch, op):
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    assert "interpreted" in section("Backend")


def test_no_gpu_has_no_table(no_gpu):
    assert section("Launch parameters").splitlines()[1:] == [
        "  pure functions of the shape; `python -m tritondeq tune` measures them where there is a GPU"
    ]


def test_the_table_of_each_gpu(monkeypatch, tmp_path, gpu):
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path))
    none = "  cuda:0  no table: pure functions of the shape. `python -m tritondeq tune` measures"
    assert section("Launch parameters").splitlines()[1:] == [none]
    for width, date in ((64, "2026-02-01"), (128, "2026-01-31")):
        key = {"width": width, "itemsize": 4, "features": 0}
        path = tables.write("Fake 9000", tables.Entry("steps.picard", key, {"num_warps": 1}, 1.1, [], date))
    line = f"  cuda:0  {path}: 2 choices, the last of 2026-02-01"
    assert section("Launch parameters").splitlines()[1:] == [line]
    path.write_text("{")
    (line,) = section("Launch parameters").splitlines()[1:]
    assert line.startswith(f"  cuda:0  {path} is damaged (JSONDecodeError: ")


def test_missing_extra_is_said(monkeypatch):
    find = doctor.util.find_spec
    monkeypatch.setattr(doctor.util, "find_spec", lambda name, *rest: None if name == "tqdm" else find(name, *rest))
    assert "tqdm          not installed: pip install tqdm" in section("Optional packages")


def test_the_report_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    doctor.report()
    assert torch.equal(before, torch.random.get_rng_state())
