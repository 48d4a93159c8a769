"""Tuning: from a layer to the table that its next launches take. Kernels are interpreted, and the clock is made up."""

import json

import pytest
import torch

from tritondeq import DEQ, __main__, backend, cells, tune
from tritondeq.kernels import devices, dispatch, launch, tables

pytestmark = pytest.mark.skipif(not dispatch.has_triton(), reason="needs triton")

CPU = torch.device("cpu")
GPU = "Fake 9000"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder, and a GPU whose kernels are interpreted."""
    if torch.cuda.is_available():
        pytest.skip("for the interpreter")
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "gpu", lambda device: GPU)
    launch.reread()
    yield tmp_path / "cache"
    launch.reread()


@pytest.fixture
def few(monkeypatch):
    """Two candidates beside the pure function's for each choice."""
    candidates = launch.candidates
    monkeypatch.setattr(launch, "candidates", lambda op, **shape: candidates(op, **shape)[:3])


def rows(cell="affine", features=16, count=3, dtype="fp32") -> list[tune.Workload]:
    return tune.workloads([cell], [features], [count], [dtype])


ROW = {"batch": 3, "shapes": ((16, 16),), "terms": 2, "memory": 0}
CHOICES = launch.candidates("rows.affine", **ROW)
CONFIGS = [launch.rows(**ROW, **choice) for choice in CHOICES]
NAME = "rows.affine of affine 3x16 fp32"


def in_force() -> int:
    """Returns the index of the choice that is in force."""
    return CONFIGS.index(launch.parameters("rows.affine", CPU, **ROW))


def clock(times=(), seen=None):
    """Returns a clock whose times depend on the choice in force; `seen` gets each of these."""

    def time(call) -> float:
        if seen is not None:
            seen.append(in_force())
        return dict(times).get(in_force(), 1.0)

    return time


def run(workloads, clock, **options) -> tuple[int, list[str]]:
    finished = []
    return tune.run(workloads, finished, device=CPU, gpu=GPU, clock=clock, **options), finished


def entries(folder) -> list[dict]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["entries"]


def measured(clock) -> tables.Entry:
    with backend("triton"):
        return tune.measure(tune.Job("rows.affine", ROW, launch.key("rows.affine", **ROW), rows()), CPU, clock)


def test_from_a_layer_to_its_next_launch(cache, few, capsys):
    layer, x, seen = DEQ(cells.Affine(16), tol=1e-4), torch.randn(3, 16), []

    def use():
        with torch.no_grad(), backend("triton"):
            return layer(x)

    before = use()
    assert run(rows(), clock({2: 0.5}, seen)) == (0, [NAME])
    assert seen == [0, 1, 2, 0, 2], "all were right and timed, and the fastest twice"
    (entry,) = entries(cache)
    assert entry["choice"] == CHOICES[2] and entry["gain"] == 2.0 and entry["measured"] == ["affine 3x16 fp32"]
    assert in_force() == 2, "at once"
    torch.testing.assert_close(use(), before, rtol=1e-5, atol=1e-5)
    words = " ".join(f"{name} {value}" for name, value in CHOICES[2].items())
    assert f"{NAME}: 2.00x with {words}\nwritten: {cache}" in capsys.readouterr().out


OPS = {
    ("affine", 16, "fp32"): {"rows.affine"},
    ("monotone", 16, "bf16"): {"rows.affine"},
    ("mlp", 16, "fp32"): {"rows.mlp"},
    ("gated", 16, "bf16"): {"rows.gated"},
    ("affine", 260, "bf16"): {"steps.affine"},
    ("transformer", 64, "fp32"): {"norms.residual_rms", "steps.picard"},
    ("conv", 32, "bf16"): {"norms.group_norm", "steps.picard"},
    ("any", 130, "fp64"): {"steps.picard"},
}


@pytest.mark.parametrize(
    ("cell", "features", "dtype"),
    [pytest.param(*one, marks=[pytest.mark.slow] * (one[0] in ("transformer", "conv"))) for one in OPS],
)
def test_what_a_layer_launches_is_learnt_from_it(monkeypatch, cell, features, dtype):
    """And in all dtypes it has the right value and gradients."""
    monkeypatch.setattr(tune, "TOL", 1e-2)
    call, exact = rows(cell, features, 4, dtype)[0].prepare(CPU)  # by Picard, where there is a choice
    with backend("triton"), launch.recorded() as asked:
        made = call()
    assert {op for op, shape in asked if len(launch.candidates(op, **shape)) > 1} == OPS[cell, features, dtype]
    for got, expected in zip(made, exact, strict=True):
        assert expected.dtype == torch.float64
        assert (got.double() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("times", [[1.0, 1.0, 1.0], [1.0, 0.99, 1.5, 1.0, 0.99], [1.0, 0.9, 0.5, 1.0, 0.999]])
def test_no_gain_or_one_by_chance_is_the_pure_function(few, times):
    """The fastest is timed again beside the pure function."""
    times = iter(times)
    entry = measured(lambda call: next(times))
    assert entry.choice == {} and entry.gain == 1.0 and not list(times)


def test_one_choice_for_several_workloads(cache, few):
    """That of the least product of times, which has the largest mean gain."""
    times = {3: {1: 0.25, 2: 0.5}, 5: {1: 3.0, 2: 0.6}}
    assert run([*rows(), *rows(count=5)], lambda call: times[len(call.args[1])].get(in_force(), 1.0))[0] == 0
    (entry,) = entries(cache)
    assert entry["choice"] == CHOICES[2] and entry["gain"] == round((2 / 0.6) ** 0.5, 3)
    assert entry["measured"] == ["affine 3x16 fp32", "affine 5x16 fp32"]


@pytest.fixture
def broken(monkeypatch):
    """Spoils results, by the index of the choice in force."""
    solve, faults = tune._solved, {}

    def spoiled(*problem):
        fault = faults.get(in_force(), 0.0) if dispatch.chosen() == "triton" else 0.0
        if isinstance(fault, Exception):
            raise fault
        z, *gradients = solve(*problem)
        return [z, *(one + fault * one.norm() for one in gradients)]

    monkeypatch.setattr(tune, "_solved", spoiled)
    return faults


FAULTS = (0.01, float("nan"), RuntimeError("out of resource: shared memory"), torch.OutOfMemoryError("CUDA"))


@pytest.mark.parametrize(("fault", "best"), [*((fault, 2) for fault in FAULTS), (1e-6, 1)])
def test_a_choice_that_is_wrong_or_fails_is_left_out(few, broken, fault, best):
    """However fast it is. NaN is wrong, too; a little more error than the pure function's is not."""
    broken[1] = fault
    assert measured(clock({1: 0.25, 2: 0.5})).choice == CHOICES[best]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (RuntimeError("no kernel\nimage"), "left out: affine 3x16 fp32: RuntimeError: no kernel\n"),
        (0.5, f"left out: {NAME}: RuntimeError: the pure function's parameters give wrong"),
    ],
)
def test_a_workload_that_can_not_be_measured(broken, capsys, fault, message):
    broken[0] = fault
    assert run([*rows("conv", 12), *rows()], clock()) == (1, [])
    printed = capsys.readouterr().out
    assert message in printed and "left out: conv 3x12 fp32 Picard: ValueError: groups=8 must divide" in printed


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(cache, few, capsys):
    workloads = [*rows(), *rows("gated", 16)]

    def stops(call):
        if len(list(call.args[0].parameters())) > 3:
            raise KeyboardInterrupt
        return 1.0

    finished = []
    with pytest.raises(KeyboardInterrupt):
        tune.run(workloads, finished, device=CPU, gpu=GPU, clock=stops)
    assert finished == [NAME] and [one["op"] for one in entries(cache)] == ["rows.affine"]
    assert in_force() == 0, "no choice is left in force"
    assert run(workloads, clock()) == (0, ["rows.gated of gated 3x16 fp32"])
    assert "1 choices to make, 1 known" in capsys.readouterr().out
    assert run(rows(), clock(), fresh=True)[1] == [NAME]
    assert len(run(rows(count=4), clock())[1]) == 1, "other rows"


def test_a_table_that_is_stale_is_measured_anew(cache, few, capsys):
    run(rows(), clock())
    (path,) = cache.glob("*.json")
    path.write_text(path.read_text().replace(tables.made(), "triton 1.0"))
    assert len(run(rows(), clock({2: 0.5}))[1]) == 1
    assert entries(cache)[0]["choice"] == CHOICES[2] and tables.made() in path.read_text()
    assert f"{path} was made with triton 1.0, and this is {tables.made()}: it is begun anew" in capsys.readouterr().out


def test_without_a_gpu(capsys):
    assert __main__.main(["tune"]) == 1
    out, error = capsys.readouterr()
    assert out.startswith("tune needs a GPU, and torch sees none here.") and out.count("\n") == 1 and not error


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot write to .*file: .*: set TRITONDEQ_CACHE"):
        run(rows(), clock())


def test_the_command_line(monkeypatch, capsys):
    taken = []

    def interrupted(workloads, finished, *, fresh):
        taken.append(([str(one) for one in workloads], fresh))
        finished.append("rows.mlp of mlp")
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run", interrupted)
    arguments = ["--cell", "mlp", "affine", "--features", "8", "--rows", "2", "--dtype", "bf16", "--fresh"]
    assert __main__.main(["tune", *arguments]) == __main__.main(["tune"]) == 130
    assert taken[0] == (["mlp 2x8 bf16", "affine 2x8 bf16"], True)
    assert not taken[1][1] and set(tune.CELLS) == {name.split()[0] for name in taken[1][0]} == set(__main__.TUNED)
    assert capsys.readouterr().err.count("interrupted; finished: rows.mlp of mlp\n") == 2
    assert set(tune.DTYPES) == set(__main__.DTYPES)


def test_a_gpu_that_the_kernels_do_not_fit(monkeypatch):
    """It is refused at once, not layer by layer."""
    monkeypatch.setattr(devices, "lacks", lambda device: "the GPU is of capability 7.5")
    with pytest.raises(OSError, match="of capability 7.5"):
        tune.run(rows(), [], device=CPU, gpu=GPU)
