"""Tuning: from candidates to the table that the next launch reads. Kernels are interpreted and the clock is told."""

import contextlib
import dataclasses
import importlib
import json
import os
import types
from functools import cache

import pytest
import torch

from tritondeq import DEQ, __main__, backend, cell_works, cells, fixed_point, tune, work, works
from tritondeq.kernels import dispatch, launch, residual_rms, rules, space, tables, trials
from tritondeq import row_kernels

pytestmark = pytest.mark.skipif(not dispatch.has_triton(), reason="needs triton")

GPU = tables.Gpu("Fake 9000", (9, 0))
CPU = torch.device("cpu")


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU whose kernels the interpreter runs, and a cache folder."""
    if torch.cuda.is_available():
        pytest.skip("for the interpreter")
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "gpu", cache(lambda device: GPU))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.torch, "device", lambda *where: CPU)
    launch.reread()
    yield tmp_path / "cache"
    launch.reread()


@dataclasses.dataclass(frozen=True)
class Stub(works.Work):
    """Picard's op without its kernels; `does` says what a candidate gives."""

    does: object = lambda parameters: torch.ones(3)

    def prepare(self):
        exact = (torch.ones(3, dtype=torch.float64),)
        return works.Problem(lambda: (self.does(trying()),), exact, lambda: lambda: None)


def stub(does=Stub.does, rows=4, width=4096) -> Stub:
    return Stub("picard", rows, width, "fp32", CPU, {"width": width, "itemsize": 4}, does)


def job(*of: Stub) -> tune.Job:
    return tune.Job("picard", of[0].shape, list(of))


def trying() -> dict:
    """The parameters on trial."""
    return tables._only[0].parameters


CONFIGS = launch.candidates("steps.picard", width=4096, itemsize=4)
NAMES = launch.spaces()["picard"].names
CHOICES = [{name: config[name] for name in NAMES} for config in CONFIGS]


def clock(*fast: dict, by: float = 0.5):
    """A clock on which these candidates are faster than all others."""
    return lambda call: by if trying() in fast else 1.0


def options(*cells, features=(16,), rows=(3,), dtypes=("fp32",), fresh=False) -> tune.Options:
    return tune.Options(list(cells), list(features), list(rows), list(dtypes), fresh)


class Spy:
    """A kernel that notes what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid):
        def run(*args, **config):
            self.seen.append(config)
            return self.kernel[grid](*args, **config)

        return run


@pytest.mark.parametrize(
    ("cell", "op", "module", "kernel"),
    [("affine", "affine", "rows", "rows_kernel"), ("transformer", "residual_rms", "residual_rms", "_rms_kernel")],
)
def test_from_candidates_to_the_next_launch(gpu, monkeypatch, cell, op, module, kernel):
    """What is measured is written, read at once, and used; results are what they were."""
    layer = DEQ(cells.Affine(16), tol=1e-4)
    x, weight = torch.randn(3, 16), torch.rand(16)

    def use():
        with torch.no_grad(), backend("triton"):
            return layer(x) if cell == "affine" else residual_rms.residual_rms(x, x, None, weight, 1e-6)[1]

    spy = Spy(getattr(importlib.import_module(f"tritondeq.kernels.{module}"), kernel))
    monkeypatch.setattr(f"tritondeq.kernels.{module}.{kernel}", spy)
    before = use()
    monkeypatch.setattr(works, "STEPS", {})  # of a transformer cell its norm alone
    (work,) = works.works(cell, 16, 3, "fp32", CPU)
    candidates = launch.candidates(op, **work.shape)
    wanted = candidates[5]
    chosen = {name: wanted[name] for name in launch.spaces()[op].names}
    assert any(spy.seen[-1][name] != wanted[name] for name in chosen if name in spy.seen[-1])
    seen = []

    def time(call):
        if cell == "transformer":
            call()
        seen.append(trying())
        return 0.5 if trying() == chosen else 1.0

    assert tune.run(options(cell), [], CPU, time) == 0
    assert len(seen) == len(candidates) and seen[5] == chosen, "all were right, and timed"
    after = use()
    assert all(spy.seen[-1][name] == wanted[name] for name in chosen if name != "programs")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    (path,) = gpu.glob("*.json")
    (one,) = json.loads(path.read_text())["entries"]
    assert one["parameters"] == chosen and one["gain"] == 2.0 and one["measured"] == [str(work)]
    assert one["triton"] == tables.version() and one["source"] == tables.source(op)


SMALL = [("affine", 16, "fp32", 1e-4), ("monotone", 16, "bf16", 1e-4), ("mlp", 8, "fp32", 1e-4)]
SMALL += [("gated", 8, "bf16", 1e-4), ("affine", 40, "fp32", 1e-4), ("transformer", 24, "bf16", 1e-4)]
SMALL += [("conv", 16, "fp32", 1e-4), ("any", 40, "fp32", 1e-2), ("any", 40, "fp64", 1e-4)]


@pytest.mark.parametrize(("cell", "features", "dtype", "tol"), SMALL)
def test_every_problem_is_right_and_ready_to_be_timed(monkeypatch, cell, features, dtype, tol):
    """Nobody stops while steps are timed, for a launch that has nothing left to do costs nothing; and a work's shape is
    what its kernels look up, or it would be tuned in vain."""
    monkeypatch.setattr(works, "SIDES", (4,))
    for module in (launch, row_kernels):
        monkeypatch.setattr(module, "FEATURES", 32)
    monkeypatch.setattr(space, "WIDE", 48)
    assert work.EVALUATIONS < rules.WINDOW, "before its end no sample stops that has not converged"
    for module in (works, cell_works):
        monkeypatch.setattr(module, "TOL", tol)
        monkeypatch.setattr(module, "EVALUATIONS", 3)
    if dtype == "fp64":
        monkeypatch.setattr(works, "STEPS", {"picard": works.STEPS["picard"]})
    started, asked = [], []
    samples = importlib.import_module("tritondeq.kernels.steps.base").Samples
    forget, parameters = samples.forget, launch.parameters
    monkeypatch.setattr(samples, "forget", lambda self: (started.append(self), forget(self)))
    monkeypatch.setattr(launch, "parameters", lambda op, *on, **of: asked.append((op, of)) or parameters(op, *on, **of))
    for one in works.works(cell, features, 2, dtype, CPU):
        asked.clear()
        problem = one.prepare()
        made = problem.run()
        key = launch.spaces()[one.op].key
        assert key(**one.shape) in [key(**of) for op, of in asked if op == one.op]
        assert len(made) == len(problem.exact)
        for got, exact in zip(made, problem.exact, strict=True):
            assert exact.dtype == torch.float64 and tune._error(got, exact) < (6e-3 if got.itemsize < 4 else 5 * tol)
        started.clear()
        problem.timed()()
        if isinstance(one, (cell_works.CellSteps, works.SolverSteps)):
            evaluations = 1 if isinstance(one, cell_works.FirstStep) else works.EVALUATIONS
            assert started and all(int(steps.count) == len(steps.rel) for steps in started)
            assert all(int(steps.flags[1].min()) == evaluations for steps in started)


def test_a_cell_in_float64_or_too_wide_is_refused():
    for arguments, says in [
        (("affine", 16, 2, "fp64"), "in fp64 is torch's"),
        (("transformer", 16, 2, "fp64"), "in fp64 is torch's"),
        (("gated", 512, 2, "fp32"), "does not fit in a multiprocessor"),
        (("conv", 12, 2, "fp32"), "multiples"),
    ]:
        with pytest.raises(ValueError, match=says):
            list(works.works(*arguments, CPU))


def test_what_the_op_refuses_is_not_tuned(monkeypatch):
    cases = [("transformer", 8193, 2, "holds rows of 1 to 8192"), ("affine", 4097, 2, "for 257 to 4096")]
    cases += [("conv", 8 * 8193, 2, "8193 channels, above 8192"), ("affine", 512, 1 << 20, "predicted to be faster")]
    for cell, features, rows, says in cases:
        with pytest.raises(ValueError, match=says):
            list(works.works(cell, features, rows, "bf16", CPU))
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert list(works.works("affine", 4097, 2, "bf16", CPU)), "nobody to ask, and nothing will be measured"


def test_the_fastest_is_chosen():
    outcome = tune.measure(job(stub()), clock(CHOICES[3]))
    assert outcome.config == CONFIGS[3] and outcome.gains == [2.0] and not outcome.left_out


def test_no_gain_is_the_pure_function():
    for by in (1.0, 0.99, 1.5):
        outcome = tune.measure(job(stub()), clock(CHOICES[3], by=by))
        assert outcome.config == CONFIGS[0] and outcome.gains == [1.0]


def test_one_choice_for_several_shapes():
    """The least product of times, which is the largest mean gain."""
    times = {4: {2: 0.25, 3: 0.5}, 64: {2: 3.0, 3: 0.6}}
    now = []

    def time(call):
        return times[now[-1]].get(CHOICES.index(trying()), 1.0)

    class Noted(Stub):
        def prepare(self):
            now.append(self.rows)
            return super().prepare()

    several = [Noted(*dataclasses.astuple(stub(rows=rows))[:4], CPU, stub().shape, Stub.does) for rows in times]
    outcome = tune.measure(job(*several), time)
    assert outcome.config == CONFIGS[3] and outcome.gains == [2.0, 1 / 0.6]
    assert outcome.gain == pytest.approx((2 / 0.6) ** 0.5)


def test_a_wrong_candidate_is_left_out():
    """However fast it is. NaN is wrong, too; one that is a bit off is not."""

    def does(parameters):
        off = {3: 1.0, 4: float("nan"), 5: 1e-6}.get(CHOICES.index(parameters), 0.0)
        return torch.ones(3) + off

    outcome = tune.measure(job(stub(does)), clock(CHOICES[3], CHOICES[4]))
    assert outcome.config == CONFIGS[0] and outcome.left_out == {"is wrong": 2}
    assert tune.measure(job(stub(does)), clock(CHOICES[5])).config == CONFIGS[5]


def test_errors_are_held_against_those_of_the_pure_function():
    def does(parameters):
        return torch.ones(3) + {0: 4e-3, 3: 7e-3, 4: 9e-3}.get(CHOICES.index(parameters), 0.0)

    assert tune.measure(job(stub(does)), clock(CHOICES[3])).config == CONFIGS[3]
    assert tune.measure(job(stub(does)), clock(CHOICES[4])).left_out == {"is wrong": 1}


def test_a_candidate_that_raises_is_left_out():
    def does(parameters):
        if parameters == CHOICES[3]:
            raise RuntimeError("OutOfResources: shared memory")
        return torch.ones(3)

    outcome = tune.measure(job(stub(does)), clock(CHOICES[3], CHOICES[4]))
    assert outcome.config == CONFIGS[4] and outcome.left_out == {"fails": 1}


def test_a_candidate_that_spills_is_left_out(monkeypatch):
    """But if it spills no more than the pure function's, which is what there is."""
    base = 0

    @contextlib.contextmanager
    def launched():
        more = {0: base, 1: 8, 2: base + 4, 3: base}.get(CHOICES.index(trying()), 0)
        yield [types.SimpleNamespace(n_spills=more), types.SimpleNamespace(n_spills=0)]

    monkeypatch.setattr(trials, "launched", launched)
    outcome = tune.measure(job(stub()), clock(*CHOICES[1:3]))
    assert outcome.config == CONFIGS[0] and outcome.left_out == {"spills": 2}
    assert "2 spills" in tune.describe(job(stub()), outcome)
    base = 8
    outcome = tune.measure(job(stub()), clock(*CHOICES[1:3]))
    assert outcome.config == CONFIGS[1] and outcome.left_out == {"spills": 1}


def test_what_fails_for_one_shape_fails_for_all():
    def does(parameters):
        return torch.full((3,), 9.0 if parameters == CHOICES[3] else 1.0)

    outcome = tune.measure(job(stub(), stub(does, rows=64)), clock(CHOICES[3], CHOICES[4]))
    assert outcome.config == CONFIGS[4] and outcome.left_out == {"is wrong": 1} and outcome.gains == [2.0, 2.0]


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda parameters: torch.zeros(3), "picard 4x4096 fp32: what the pure function gives is wrong; please report"),
        (lambda parameters: 1 / 0, "gives fails: ZeroDivisionError: division by zero; please report it"),
        (lambda parameters: exhaust(), "does not fit in the memory of this GPU: take fewer --rows or --features"),
    ],
)
def test_a_shape_that_can_not_be_measured(does, says):
    with pytest.raises(tune.Unfit, match=says):
        tune.measure(job(stub(does)), clock())


def exhaust():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def stubs(gpu, monkeypatch):
    """In place of all problems: Picard's steps, as wide as the features."""
    monkeypatch.setattr(tune, "works", lambda cell, features, rows, *of: [stub(rows=rows, width=features)])


def widths(folder) -> list[int]:
    (path,) = folder.glob("*.json")
    return [one["shape"]["width"] for one in json.loads(path.read_text())["entries"]]


def command(*arguments: str) -> int:
    return __main__.main(["tune", "--cell", "any", "--dtype", "fp32", "--rows", "4", *arguments])


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(stubs, gpu, monkeypatch, capsys):
    measured = []

    def seconds(call):
        measured.append(tables._only[0].shape["width"])
        if measured[-1] == 8192:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(trials, "seconds", seconds)
    assert command("--features", "2048", "4096", "8192") == 130
    assert "interrupted; finished: picard 4x2048 fp32, picard 4x4096 fp32" in capsys.readouterr().err
    assert widths(gpu) == [2048, 4096] and not tables._only
    measured.clear()
    monkeypatch.setattr(trials, "seconds", lambda call: measured.append(tables._only[0].shape["width"]) or 1.0)
    assert command("--features", "2048", "4096", "8192") == 0
    assert set(measured) == {8192} and widths(gpu) == [2048, 4096, 8192]
    assert "1 choices to measure, 2 known" in capsys.readouterr().out
    measured.clear()
    assert command("--features", "2048", "8192") == 0 and not measured
    assert command("--features", "2048", "8192", "--fresh") == 0 and set(measured) == {2048, 8192}
    measured.clear()
    assert command("--features", "2048", "--rows", "4", "64") == 0 and set(measured) == {2048}, "other rows"
    monkeypatch.setattr(tables, "source", lambda op: "changed")
    measured.clear()
    assert command("--features", "2048", "4096") == 0 and set(measured) == {2048, 4096}


def test_a_choice_is_in_force_as_soon_as_it_is_made(stubs, monkeypatch):
    monkeypatch.setattr(trials, "seconds", clock(CHOICES[3]))
    assert launch.parameters("steps.picard", CPU, width=4096, itemsize=4) == CONFIGS[0]
    assert command("--features", "4096") == 0
    assert launch.parameters("steps.picard", CPU, width=4096, itemsize=4) == CONFIGS[3]


def test_a_line_for_each_shape(stubs, monkeypatch, capsys):
    monkeypatch.setattr(trials, "seconds", clock(CHOICES[3]))
    assert command("--features", "4096", "--rows", "4", "64") == 0
    out = capsys.readouterr().out.splitlines()
    chosen = " ".join(f"{name} {value}" for name, value in CHOICES[3].items())
    of = f"of {len(CONFIGS)} candidates"
    assert out[1] == f"picard 4x4096 fp32 2.00x, picard 64x4096 fp32 2.00x: {chosen} {of}"
    assert out[0].startswith("Fake 9000, triton ") and out[2].startswith("written: ") and len(out) == 3


def test_shapes_beyond_memory_are_left_out_and_the_others_measured(stubs, gpu, monkeypatch, capsys):
    def made(cell, features, rows, *of):
        return [stub(lambda parameters: exhaust() if features > 4096 else torch.ones(3), rows=rows, width=features)]

    monkeypatch.setattr(tune, "works", made)
    monkeypatch.setattr(trials, "seconds", clock())
    assert command("--features", "8192", "4096") == 0
    assert (
        widths(gpu) == [4096] and "left out: picard 4x8192 fp32 does not fit in the memory" in capsys.readouterr().out
    )
    assert command("--features", "8192") == 1
    assert "written" not in capsys.readouterr().out


def test_sizes_that_no_op_takes_are_said(gpu, capsys):
    assert __main__.main(["tune", "--cell", "gated", "--features", "512", "1024", "--dtype", "bf16", "fp64"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [
        "left out: gated of 512 features does not fit in a multiprocessor: take fewer --features",
        "left out: gated in fp64 is torch's",
        "left out: gated of 1024 features does not fit in a multiprocessor: take fewer --features",
    ]


def test_a_damaged_table_is_said_and_written_anew(stubs, gpu, monkeypatch, capsys):
    monkeypatch.setattr(trials, "seconds", clock())
    gpu.mkdir()
    (gpu / "fake-9000.json").write_text("{")
    assert command("--features", "4096") == 0
    assert "fake-9000.json is damaged (" in capsys.readouterr().out and widths(gpu) == [4096]


def one_line(capsys, *arguments: str) -> str:
    assert command(*arguments) == 1
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and error.startswith("tritondeq: ")
    return error


def test_a_cache_folder_that_can_not_be_written(stubs, gpu, monkeypatch, capsys):
    """It is said before anything is measured."""
    monkeypatch.setattr(trials, "seconds", lambda call: pytest.fail("measured"))
    gpu.write_text("a file")
    assert "cannot write to" in (line := one_line(capsys)) and "set TRITONDEQ_CACHE" in line
    gpu.unlink()
    gpu.mkdir(mode=0o500)
    if hasattr(os, "geteuid") and os.geteuid():
        assert "set TRITONDEQ_CACHE" in one_line(capsys)


def test_a_gpu_too_old(stubs, monkeypatch, capsys):
    monkeypatch.setattr(launch, "gpu", lambda device: tables.Gpu("Tesla T4", (7, 5)))
    assert "Tesla T4 has capability 7.5, and the kernels are tuned from 8.0" in one_line(capsys)


def test_triton_missing_or_old(stubs, monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "too_old", lambda: "triton 3.0 is installed")
    assert "triton 3.0 is installed" in one_line(capsys)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert "triton is not installed" in one_line(capsys)


@pytest.mark.parametrize("triton", [True, False])
def test_without_a_gpu_it_explains_itself(monkeypatch, capsys, triton):
    """In three lines and a table of what is used instead; nothing is written, and the status says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "has_triton", lambda: triton)
    monkeypatch.setattr(tables, "write", lambda *_: pytest.fail("written"))
    assert __main__.main(["tune", "--features", "64", "512", "--rows", "64"]) == 1
    out, error = capsys.readouterr()
    assert not error and "no GPU that torch sees" in out and "<gpu>.json" in out
    head, *lines = out.split("\n\n")[1].splitlines()
    assert head.split()[:2] == ["shape", "candidates"]
    affine = launch.rows(batch=64, shapes=((64, 64),), terms=2, memory=0)
    assert f"BLOCK_B {affine['BLOCK_B']} STREAM False" in lines[1] and "affine 64x64 fp32 and 1 more" in lines[1]
    assert "gated of 512 features does not fit" in out


def test_a_bar_only_on_a_terminal(stubs, monkeypatch, capsys):
    monkeypatch.setattr(trials, "seconds", clock())
    monkeypatch.setattr(tune.sys.stderr, "isatty", lambda: True, raising=False)
    assert command("--features", "4096") == 0
    out, error = capsys.readouterr()
    assert f"{len(CONFIGS)}/{len(CONFIGS)}" in error and "written: " in out
    monkeypatch.setattr(tune.util, "find_spec", lambda name: None)
    assert command("--features", "2048") == 0
    assert not capsys.readouterr().err


def test_compiled_kernels_are_seen_as_they_are_launched(monkeypatch):
    """With a stand-in for Triton's launch, which returns the kernel: `run` is what `kernel[grid](...)` calls."""
    jit = pytest.importorskip("triton.runtime.jit")
    kernels = iter([types.SimpleNamespace(n_spills=0), types.SimpleNamespace(n_spills=24), None])

    def run(self, *args, grid, warmup, **options):
        return next(kernels)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    kernel = object.__new__(jit.JITFunction)
    with trials.launched() as found:
        kernel[(1,)](1)
        kernel[(1,)](2, num_warps=4)
    assert [one.n_spills for one in found] == [0, 24] and trials.spills(found) == 24
    assert jit.JITFunction.run is run
    with pytest.raises(KeyError), trials.launched() as found:
        kernel[(1,)](3)
        raise KeyError
    assert jit.JITFunction.run is run and trials.spills(found) == 0 and trials.spills([]) == 0


def test_defaults_are_what_there_is():
    assert __main__.TUNED == works.CELLS and tuple(works.DTYPES) == __main__.DTYPES


def test_a_fixed_point_is_the_same_at_every_candidate_of_its_steps(gpu):
    """Of a split sample, too: 300 values in parts of 128."""
    u = torch.randn(2, 300)

    def solve():
        with backend("triton"):
            return fixed_point(lambda z: u + 0.5 * torch.tanh(z), torch.zeros_like(u), tol=1e-5)

    first = solve()
    for config in launch.candidates("steps.picard", width=300, itemsize=4)[1:]:
        with launch.trial("picard", {"width": 300, "itemsize": 4}, config):
            again = solve()
        assert torch.equal(first.steps, again.steps)
        torch.testing.assert_close(first.value, again.value, rtol=1e-5, atol=1e-6)
