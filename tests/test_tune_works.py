"""What `tune` measures: every op, every variant that the library launches, each under a name of its own."""

import ast
import importlib
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from programs import InProcesses

from tritondeq import DEQ, Anderson, Broyden, Picard, __main__, backend, cell_works, cells, fixed_point, tune, works
from tritondeq.kernels import dispatch, launch, offline, tables
from tritondeq import row_kernels

pytestmark = pytest.mark.skipif(not dispatch.has_triton(), reason="needs triton")

CPU = torch.device("cpu")
LIMITS = offline.limits(90)
CALLS = "launch.parameters"
CUDA = torch.cuda.is_available()


def options(cells=works.CELLS, features=(64, 128, 256), rows=(256, 16384), dtypes=("fp32", "bf16"), **more):
    return tune.Options(list(cells), list(features), list(rows), list(dtypes), **more)


@cache
def found(rare: bool) -> list[tune.Job]:
    """What a run measures on an H100 by default, or with --all and in float64, too."""
    more = {"features": (64, 128, 256, 1024), "dtypes": ("fp32", "bf16", "fp64"), "all": True} if rare else {}
    return tune.jobs_of(options(**more), CPU, LIMITS)[0]


def kind(op: str, shape: dict) -> tuple:
    """What has to be equal for a choice to be taken; sizes, of which the nearest will do, are left out."""
    among = launch.spaces()[op]
    key = among.key(**shape)
    return op, *((name, tables._form(size) if name in among.near else size) for name, size in key.items())


def kinds(rare: bool = True) -> set[tuple]:
    return {kind(work.op, work.shape) for job in found(rare) for work in job.works}


def test_every_op_with_launch_parameters_is_measured():
    assert {job.op for job in found(True)} == set(launch.SHAPES) == set(launch.spaces())


def test_every_value_that_a_key_may_have_is_measured():
    """In kernels that hold a cell: each of terms, memories and counts of matrices; of sizes the nearest is taken."""
    memory = importlib.import_module("tritondeq.kernels.rows.skeleton").MEMORY
    d, h = 64, 128
    sizes = {"affine": [((d, d),)], "gated": [((d, d),) * 3], "mlp": [((h, d), (d, h)), ((h, d), (d, h), (h, d))]}
    wanted = []
    for op, terms in itertools.product(sizes, (1, 2, 3)):
        for shapes, m, batch in itertools.product(sizes[op], range(memory + 1), (1, launch.LARGE + 1)):
            wanted.append((op, {"batch": batch, "shapes": shapes, "terms": terms, "memory": m} | LIMITS))
    for terms, start in itertools.product((1, 2, 3), (False, True)):
        wanted.append(("affine_steps", {"batch": 256, "features": 1024, "terms": terms, "start": start}))
        wanted.append(("affine_grid", {"batch": 64, "features": 1024, "terms": terms}))
    assert not {kind(op, shape) for op, shape in wanted} - kinds()


@pytest.fixture
def wide(monkeypatch):
    """Cells of more than 32 features are too wide for a multiprocessor."""
    for module in (launch, row_kernels):
        monkeypatch.setattr(module, "FEATURES", 32)


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """(op, shape) of every launch that asks for its parameters."""
    seen, parameters = [], launch.parameters
    monkeypatch.setattr(launch, "parameters", lambda op, *on, **of: seen.append((op, of)) or parameters(op, *on, **of))
    return seen


@pytest.mark.skipif(CUDA, reason="for the interpreter")
def test_what_solves_ask_for_is_measured(wide, asked):
    """Forwards and backwards, by every cell that has a kernel and every solver."""
    solves = [(cells.Affine(8), Anderson(memory), 1e-2) for memory in (1, 3)]
    solves += [(cells.Affine(8), Picard(), tol) for tol in (1e-3, 1e-6)]
    solves += [(cells.Affine(8, operands="bf16"), Picard(), 1e-2), (cells.Monotone(8), None, 1e-2)]
    solves += [(cells.MLP(4, form=form), None, 1e-2) for form in ("post", "pre")]
    solves += [(cells.MLP(4, activation="swiglu"), None, 1e-2), (cells.Gated(8), None, 1e-2)]
    solves += [(cells.Affine(40), Picard(), 1e-2), (cells.Affine(40), Anderson(), 1e-2)]
    for cell, solver, tol in solves:
        with backend("triton"):
            x = torch.randn(2, cell.features, requires_grad=True)
            DEQ(cell, **{"solver": solver} if solver else {}, tol=tol, max_steps=3)(x).sum().backward()
    for solver in (Picard(), Anderson(), Broyden()):
        with backend("triton"):
            DEQ(cells.Transformer(16, heads=2), solver=solver, max_steps=2)(torch.randn(1, 3, 16))
    with backend("triton"):
        for solver, dtype in itertools.product(
            (Picard(), Anderson(half=True), Broyden()), (torch.float32, torch.float64)
        ):
            fixed_point(lambda z: 0.5 * z, torch.ones(2, 3, dtype=dtype), solver=solver, max_steps=2)
    ops = {op for op, _ in asked}
    assert ops == {"affine", "mlp", "gated", "affine_steps", "picard", "anderson", "broyden", "residual_rms"}
    assert {of["memory"] for op, of in asked if op == "affine"} == {0, 1, 3}
    assert {of["terms"] for op, of in asked if op == "affine"} == {1, 2, 3}
    assert {of["start"] for op, of in asked if op == "affine_steps"} == {False, True}
    assert {of["features"] for op, of in asked if op == "picard"} == {0, 16}
    assert not {kind(op, of | LIMITS if "shapes" in of else of) for op, of in asked} - kinds()


def calls(path: Path):
    """(function, call) of each call for launch parameters in a file."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == CALLS:
                    yield function.name, node


def test_every_launch_asks_the_tables():
    """With the device that it launches on; only who says whether there are any parameters at all does without."""
    told = [(path.stem, *one) for path in Path(launch.__file__).parent.glob("*.py") for one in calls(path)]
    names = {"affine_grid", "affine_steps", "group_norm", "residual_rms", "rows", "steps", "tails"}
    assert {name for name, *_ in told} == names
    assert all(function == "refuses" or len(call.args) == 2 for _, function, call in told)


def test_a_name_is_of_one_problem():
    """What has been measured is known by its name."""
    of: dict[str, set] = {}
    for job in found(True):
        for work in job.works:
            of.setdefault(str(work), set()).add((job.op, str(job.key), str(work.shape)))
    assert all(len(problems) == 1 for problems in of.values()) and len(of) > 250
    assert all("," not in name for name in of), "which stands between names"


def test_what_is_rare_comes_last_and_not_by_default():
    usual, every = found(False), found(True)
    first = [str(job) for job in tune.jobs_of(options(all=True), CPU, LIMITS)[0]][: len(usual)]
    assert first == [str(job) for job in usual] and len(usual) == 51 and len(every) > 100
    names = [str(work) for job in usual for work in job.works]
    assert "mlp pre 256x64 fp32" in names, "it shares its choice with the post-norm form"
    assert not any(word in name for name in names for word in ("memory", "terms 3", "swiglu", "grid"))
    assert {str(job) for job in usual} <= {str(job) for job in every}, "known by then, and not measured again"


def test_one_choice_for_both_forms():
    """Each form has its trial of each candidate, and the compiler sees the launches of both."""
    (job,) = tune.jobs_of(options(["mlp"], [64], [9], ["fp32"]), CPU, LIMITS)[0]
    assert list(map(str, job.works)) == ["mlp 9x64 fp32", "mlp pre 9x64 fp32"]
    made = [work.launches(90, job.candidates[0]) for work in job.works]
    steps = [one["constants"]["STEP"].rpartition(":")[2] for launches in made for one in launches]
    assert steps == ["_post_step", "_post_adjoint_step", "_pre_step", "_pre_adjoint_step"]
    assert len(made[0][0]["constants"]["VECTORS"]) == 1 and len(made[1][0]["constants"]["VECTORS"]) == 2


def test_a_report_has_the_launches_of_all_works_each_once(monkeypatch, capsys):
    asked = []
    found = {"registers": 40, "shared": 100, "total": {}}
    monkeypatch.setattr(offline, "run", lambda of: asked.extend(of) or [found] * len(of))
    command = "tune --offline sm_90 --cell mlp --features 64 --rows 9 99 --dtype fp32"
    assert __main__.main(command.split()) == 0
    (job,) = tune.jobs_of(options(["mlp"], [64], [9, 99], ["fp32"]), CPU, LIMITS)[0]
    assert len(job.works) == 4 and len(asked) == 4 * len(job.candidates)
    assert len({str(one) for one in asked[:4]}) == 4
    title = "### mlp 9x64 fp32, mlp pre 9x64 fp32, mlp 99x64 fp32, mlp pre 99x64 fp32, sm_90"
    assert capsys.readouterr().out.splitlines()[0] == title


ASKED = [("affine", 64, "fp32"), ("affine", 1024, "fp32"), ("mlp", 32, "fp32"), ("gated", 32, "bf16")]


@pytest.mark.parametrize(("cell", "features", "dtype"), ASKED)
def test_every_argument_of_a_rare_launch_is_told(cell, features, dtype):
    """And constants are those of the candidate and of the work."""
    seen = set()
    for work in works.works(cell, features, 64, dtype, CPU, LIMITS, rare=True):
        for config in launch.candidates(work.op, **work.shape):
            for job in work.launches(90, config):
                module, name = job["kernel"].split(":")
                arguments = set(getattr(importlib.import_module(module), name).arg_names)
                told = job["constants"]
                assert set(told) <= arguments <= set(told) | set(job["types"])
                assert all(told[name] == config[name] for name in set(config) & set(told))
                assert told["TERMS"] == work.shape["terms"] and job["num_warps"] == config["num_warps"]
                assert work.op != "mlp" or told["ACT"] == ("silu" if "swiglu" in str(work) else "gelu")
                assert told.get("MEMORY") == work.shape.get("memory")
                assert told.get("START") == work.shape.get("start", False) or work.op != "affine_steps"
                assert job.get("launch_cooperative_grid", False) == (work.op == "affine_grid")
        seen.add(work.op)
    assert seen == ({"affine_steps", "affine_grid"} if features == 1024 else {cell})


RUN = [
    ("affine", 16, "fp32", ("affine 2x16 fp32 memory 2", "affine 2x16 fp32 memory 4 terms 3")),
    ("monotone", 16, "fp32", ("monotone 2x16 fp32 terms 3",)),
    ("mlp", 8, "fp32", ("swiglu 2x8 fp32 terms 3", "swiglu pre 2x8 fp32", "mlp pre 2x8 fp32 memory 2")),
    ("gated", 8, "bf16", ("gated 2x8 bf16 memory 4",)),
    ("affine", 40, "fp32", ("affine 2x40 fp32 terms 3", "affine 2x40 fp32 start terms 3")),
]


@pytest.mark.skipif(CUDA, reason="for the interpreter")
@pytest.mark.parametrize(("cell", "features", "dtype", "names"), RUN)
def test_a_rare_problem_is_right_and_ready_to_be_timed(wide, asked, cell, features, dtype, names):
    """To its tolerance, and by kernels that look up its shape."""
    of = {str(work): work for work in works.works(cell, features, 2, dtype, CPU, rare=True)}
    for name in names:
        work = of[name]
        asked.clear()
        problem = work.prepare()
        made = problem.run()
        key = launch.spaces()[work.op].key
        own = [shape for op, shape in asked if op == work.op]
        assert key(**work.shape) in [key(**shape) for shape in own]
        assert all(shape.get("memory") == work.shape.get("memory") for shape in own)
        bound = 6e-3 if dtype == "bf16" else 5 * work.tol
        for got, exact in zip(made, problem.exact, strict=True):
            assert tune._error(got, exact) < bound
        assert work.tol == (cell_works.FINE if work.shape["terms"] == 3 else cell_works.TOL)
        problem.timed()()


class Spy:
    """A kernel that notes how it is launched."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid):
        def run(*args, **config):
            self.seen.append(config)
            return self.kernel[grid](*args, **config)

        return run


@pytest.mark.skipif(CUDA, reason="for the interpreter")
def test_a_first_step_is_timed_as_the_first(wide, monkeypatch):
    """From zero, from a start that is multiplied, and of the adjoint; again and again the same, and nobody stops."""
    op = importlib.import_module("tritondeq.kernels.steps.affine")
    spy, made, start = Spy(op._step_kernel), [], op.AffineSteps.reset
    monkeypatch.setattr(op, "_step_kernel", spy)
    monkeypatch.setattr(op.AffineSteps, "reset", lambda self, z: (made.append(self), start(self, z)))
    (work,) = [one for one in works.works("affine", 40, 2, "fp32", CPU) if one.shape.get("start")]
    call = work.prepare().timed()
    made = made[-3:]
    assert [bool(steps.moved) and steps.pre is None for steps in made] == [False, True, False]
    assert [steps.pre is None for steps in made] == [True, True, False]
    spy.seen.clear()
    call()
    first = [steps.rel.clone() for steps in made]
    call()
    assert [(one["START"], one["ADJ"]) for one in spy.seen] == [(True, False), (True, False), (True, True)] * 2
    for steps, rel in zip(made, first, strict=True):
        assert int(steps.count) == 2 and (steps.flags[1] == 1).all() and (rel > 0.1).all()
    assert torch.equal(made[0].rel, first[0]) and torch.equal(made[2].rel, first[2])


@pytest.fixture
def grid(wide, monkeypatch):
    """A chip of 3 multiprocessors, whose programs are processes, and a GPU's name for its tables."""
    if CUDA:
        pytest.skip("for the interpreter")
    processes = InProcesses("tritondeq.kernels.affine_grid:grid_kernel")
    monkeypatch.setattr(importlib.import_module("tritondeq.kernels.affine_grid"), "grid_kernel", processes)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(launch, "gpu", cache(lambda device: tables.Gpu("Fake 9000", (9, 0))))
    launch.reread()
    yield processes
    launch.reread()


def test_candidates_of_a_grid_are_measured(grid, monkeypatch):
    """Each is launched as it is, on no more programs than there are multiprocessors, and is right."""
    of = list(works.works("affine", 40, 2, "fp32", CPU, rare=True))
    work, fine = [one for one in of if one.op == "affine_grid"]
    assert (str(work), str(fine)) == ("affine grid 2x40 fp32", "affine grid 2x40 fp32 terms 3")
    configs = launch.candidates("affine_grid", **work.shape)
    few = [configs[0], *(one for one in configs if one["BLOCK_K"] == 32 and one["GROUPS"] == 4)]
    monkeypatch.setattr(launch, "candidates", lambda op, **shape: few)
    seen = []

    def clock(call):
        seen.append({name: grid.options[name] for name in few[0]})
        return 1.0 if seen[-1] != few[-1] else 0.5

    job = tune.Job("affine_grid", launch.spaces()["affine_grid"].key(**work.shape), [work])
    outcome = tune.measure(job, clock)
    assert seen == few and not outcome.left_out and outcome.config == few[-1]
    assert grid.grids == [3, 3, 3, 3, 2, 2] and grid.options["launch_cooperative_grid"]


def test_a_table_never_launches_more_programs_than_there_are_processors(grid, tmp_path, monkeypatch):
    """What is measured reaches the launch; where it would be too many, the pure function's slices do."""
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path))
    among, of = launch.spaces()["affine_grid"], {"features": 40, "terms": 2, "shared": launch.SHARED, "processors": 3}
    configs = launch.candidates("affine_grid", batch=2, **of)
    wanted = next(one for one in configs if (one["BLOCK_N"], one["GROUPS"], one["BLOCK_K"]) == (16, 4, 32))
    chosen = {name: wanted[name] for name in among.names}
    fresh = {"measured": ("x",), "triton": tables.version(), "source": tables.source("affine_grid")}
    entry = tables.Entry("affine_grid", among.key(batch=2, **of), chosen, **fresh, date="2026-01-31")
    tables.write(launch.gpu(CPU), entry, launch.spaces())
    launch.reread()
    w, u = torch.randn(40, 40) / 12, torch.randn(2, 40)
    op = dispatch.load("affine_grid")
    z = op.solve(w, u, activation="tanh", tol=1e-5, max_steps=50)[0]
    assert (z - torch.tanh(u + z @ w.T)).norm() < 1e-4 * z.norm()
    assert grid.grids == [3] and all(grid.options[name] == value for name, value in wanted.items())
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    with pytest.warns(UserWarning, match="can't take"):
        op.solve(w, u, activation="tanh", tol=1e-5, max_steps=50)
    assert grid.grids == [3, 2] and grid.options["BLOCK_N"] == 32


def test_a_grid_is_measured_with_as_many_rows_as_slices_of_each_width_take():
    def names(features, rows, dtype="fp32"):
        of = works.works("affine", features, rows, dtype, CPU, LIMITS, rare=True)
        return [str(work) for work in of if work.op == "affine_grid" and work.shape["terms"] < 3]

    assert names(1024, 256) == ["affine grid 32x1024 fp32", "affine grid 64x1024 fp32"]
    assert names(1024, 16384, "bf16") == ["affine grid 32x1024 bf16", "affine grid 64x1024 bf16"]
    assert names(1024, 40) == ["affine grid 32x1024 fp32", "affine grid 40x1024 fp32"]
    assert names(512, 256) == ["affine grid 64x512 fp32"] and names(512, 3) == ["affine grid 3x512 fp32"]
    assert names(2048, 64) == ["affine grid 16x2048 fp32"], "slices of 32 features in two terms do not fit"
    assert names(4096, 16) == [] and names(256, 16) == []


def test_the_command_measures_all(monkeypatch):
    """With one feature count more, for what is too wide for a multiprocessor; what is told is left as it is."""
    seen = []
    monkeypatch.setattr(tune, "run", lambda options, finished: seen.append(options))
    for told in ("tune", "tune --all", "tune --all --features 32 --rows 8"):
        assert __main__.main(told.split()) == 0
    assert [(one.features, one.rows, one.all) for one in seen] == [
        ([64, 128, 256], [256, 16384], False),
        ([64, 128, 256, 1024], [256, 16384], True),
        ([32], [8], True),
    ]
