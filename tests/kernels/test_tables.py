"""The life of a table of launch parameters: absent, in force, stale, damaged, hostile, written by two at once."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tritondeq.kernels import launch, tables
from tritondeq.kernels.space import MORE_TILES, affine_tile

GPU = tables.Gpu("Fake 9000 (80 GB)", (9, 0))
CPU = torch.device("cpu")
SHAPE = {"width": 4096, "itemsize": 4, "features": 0}
PURE = launch.SHAPES["steps.picard"](**SHAPE)
OTHER = launch.candidates("steps.picard", **SHAPE)[-1]
ROWS = {"batch": 64, "shapes": ((64, 64),), "terms": 2, "memory": 0, "shared": launch.SHARED, "chip": 90}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A GPU that only has a name, and a cache folder of its own."""
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "gpu", cache(lambda device: GPU))
    launch.reread()
    yield tmp_path / "cache"
    launch.reread()


def entry(op="picard", shape=SHAPE, config=OTHER, **changed) -> tables.Entry:
    among = launch.spaces()[op]
    fresh = {
        "triton": tables.version(),
        "source": tables.source(op),
        "date": "2026-01-31",
        "measured": ("picard 64x4096 fp32",),
    }
    chosen = {name: config[name] for name in among.names}
    return tables.Entry(op, among.key(**shape), chosen, **fresh | changed)


def put(*entries: tables.Entry) -> Path:
    for one in entries:
        path = tables.write(GPU, one, launch.spaces())
    launch.reread()
    return path


def told(op="picard", **shape) -> dict:
    return launch.parameters(op, CPU, **shape or SHAPE)


def raw(path: Path) -> dict:
    return json.loads(path.read_text())


def test_without_a_table_the_pure_function_speaks():
    assert OTHER != PURE and told() == PURE


def test_a_table_is_picked_up_at_once():
    assert told() == PURE
    tables.write(GPU, entry(), launch.spaces())
    launch.reread()
    assert told() == OTHER


def test_what_is_handed_out_is_the_callers_own():
    put(entry())
    told().clear()
    assert told() == OTHER


def test_it_is_only_for_its_op_and_its_gpu(monkeypatch):
    put(entry())
    assert told("anderson") == PURE
    assert launch.parameters("steps.picard", **SHAPE) == PURE
    monkeypatch.setattr(launch, "gpu", lambda device: None)
    assert told() == PURE
    monkeypatch.setattr(launch, "gpu", lambda device: GPU._replace(name="Fake 9001"))
    launch.reread()
    assert told() == PURE


def test_a_pure_function_that_is_replaced_is_asked(monkeypatch):
    put(entry())
    monkeypatch.setitem(launch.SHAPES, "picard", lambda **shape: {"BLOCK_N": 1})
    assert told() == {"BLOCK_N": 1}


def test_the_nearest_shape_is_taken():
    """By ratio: 6000 is nearer to 8192 than to 4096, and each choice is made anew for the shape that asks."""
    wide = launch.candidates("steps.picard", width=8192, itemsize=4)[1]
    put(entry(), entry(shape={"width": 8192, "itemsize": 4, "features": 0}, config=wide))
    near = told(width=6000, itemsize=4)
    assert near["BLOCK_N"] == wide["BLOCK_N"] and near["num_warps"] == wide["num_warps"]
    assert near["SPLITS"] == -(-6000 // near["BLOCK_N"])
    near = told(width=5000, itemsize=4)
    assert (near["BLOCK_N"], near["num_warps"]) == (OTHER["BLOCK_N"], OTHER["num_warps"])


def test_a_shape_far_from_all_measured_ones_has_the_pure_function():
    """What is best for few rows is not for many; between measured ones, the nearest will do however far it is."""
    of = {"features": 512, "terms": 2, "shared": 232448}
    small, large = launch.affine_steps(batch=64, **of), launch.affine_steps(batch=1 << 16, **of)
    other, third = affine_tile(64, 64, 32, 5, warps=8), affine_tile(*MORE_TILES[0])
    put(entry("affine_steps", {"batch": 64} | of, other))
    batches = [told("affine_steps", batch=batch, **of, start=False) for batch in (31, 32, 128, 129, 1 << 16)]
    assert batches == [small, other, other, launch.affine_steps(batch=129, **of), large] and large != small
    assert told("affine_steps", batch=64, **of | {"features": 1024}, start=False) == other
    assert told("affine_steps", batch=64, **of | {"features": 1025}, start=False) != other
    put(entry("affine_steps", {"batch": 1 << 16} | of, third))
    batches = [told("affine_steps", batch=batch, **of, start=False) for batch in (128, 2000, 2100, 1 << 17)]
    assert batches == [other, other, third, third]
    assert told("affine_steps", batch=1 << 18, **of, start=False) == launch.affine_steps(batch=1 << 18, **of)


def test_the_nearest_shape_is_not_taken_where_it_can_not_be():
    """Silently: nothing is wrong with the table."""
    put(entry(), entry(shape={"width": 64, "itemsize": 4, "features": 0}, config=launch.steps(width=64, itemsize=4)))
    assert told(width=1000, itemsize=4) == launch.SHAPES["steps.picard"](width=1000, itemsize=4)
    assert told(width=4096, itemsize=8) == launch.SHAPES["steps.picard"](width=4096, itemsize=8)


@pytest.mark.parametrize("change", [{"terms": 1}, {"memory": 2}, {"batch": 4097}, {"shapes": ((64, 64), (64, 64))}])
def test_rows_need_what_is_no_size_to_be_equal(change):
    base = launch.candidates("rows.affine", **ROWS)
    put(entry("affine", ROWS, base[3]))
    assert told("affine", **ROWS) == base[3] != base[0]
    assert told("affine", **ROWS | {"batch": 4096, "shapes": ((50, 50),)}) == base[3] | {"BLOCK_D": 64}
    assert told("affine", **ROWS | change) == launch.rows(**ROWS | change)


def test_one_batch_size_is_like_another():
    put(entry("affine", ROWS, launch.candidates("rows.affine", **ROWS)[3]))
    configs = [told("affine", **ROWS | {"batch": batch}) for batch in (1, 2, 63, 4096)]
    assert all(config == configs[0] for config in configs)


def test_the_users_table_goes_before_the_shipped_one(tmp_path, monkeypatch):
    user = put(entry())
    shipped = tmp_path / "tuned" / user.name
    third = launch.candidates("steps.picard", **SHAPE)[1]
    wide = {"width": 1 << 14, "itemsize": 4, "features": 0}
    far = launch.candidates("steps.picard", **wide)[2]
    table = raw(user)
    user.unlink()
    put(entry(config=third), entry(shape=wide, config=far))
    shipped.parent.mkdir()
    user.rename(shipped)
    user.write_text(json.dumps(table))
    monkeypatch.setattr(tables, "paths", lambda gpu: [user, shipped])
    launch.reread()
    assert told() == OTHER and told(**wide) == far
    user.unlink()
    launch.reread()
    assert told() == third


def test_the_shipped_table_lies_in_the_package():
    import tritondeq

    user, shipped = tables.paths(GPU)
    assert user.name == shipped.name == "fake-9000-80-gb.json"
    assert shipped.parent == Path(tritondeq.__file__).parent / "tuned"


@pytest.mark.parametrize("change", [{"triton": "3.1"}, {"triton": ""}, {"source": "0" * 16}])
def test_a_stale_entry_is_ignored(change):
    path = put(entry(**change))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told() == PURE
    table = tables.read(path, GPU, launch.spaces())
    assert table.fault is None and [one.stale for one in table.entries] == [True]
    put(entry())
    assert told() == OTHER and len(raw(path)["entries"]) == 1


HOSTILE = [
    "",
    "{",
    "[]",
    "null",
    "\x00\xff",
    '{"schema": 2}',
    "[" * 100000,
    '{"schema": 1, "gpu": "Fake 9000 (80 GB)", "capability": [9, 0]}',
    '{"schema": 1, "gpu": "Fake 9000 (80 GB)", "capability": [9, 0], "entries": {}}',
    '{"schema": 1, "gpu": "another", "capability": [9, 0], "entries": []}',
    '{"schema": 1, "gpu": "Fake 9000 (80 GB)", "capability": [8, 0], "entries": []}',
    '{"schema": 1, "gpu": "Fake 9000 (80 GB)", "capability": [9, 0], "entries": [' + "1," * 5000 + "1]}",
    "1" * 5000,
    " " * (1 << 20) + "{}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_file_is_one_warning(text):
    path = put(entry())
    path.write_text(text, encoding="latin-1")
    launch.reread()
    with pytest.warns(UserWarning) as seen:
        assert told() == PURE and told(width=8192, itemsize=4) and told("anderson") == PURE
    (one,) = seen
    assert str(path) in str(one.message) and "tune --fresh" in str(one.message)
    assert len(str(one.message)) < 600
    put(entry())
    assert told() == OTHER, "writing mends it"


@pytest.mark.parametrize(
    "change",
    [
        {"op": "os.system"},
        {"op": ["picard"]},
        {"op": "dispatch"},
        {"shape": {"width": 4096}},
        {"shape": {"width": 4096, "itemsize": 4, "features": 0, "more": 1}},
        {"shape": {"width": -1, "itemsize": 4, "features": 0}},
        {"shape": {"width": 1 << 62, "itemsize": 4, "features": 0}},
        {"shape": {"width": 4096.0, "itemsize": 4, "features": 0}},
        {"shape": {"width": "4096", "itemsize": 4, "features": 0}},
        {"shape": {"width": [[[[1]]]], "itemsize": 4, "features": 0}},
        {"shape": [4096, 4]},
        {"parameters": {"BLOCK_N": 1024}},
        {"parameters": {"BLOCK_N": 1024, "num_warps": 4, "START": "os:system"}},
        {"parameters": {"BLOCK_N": "1024", "num_warps": 4}},
        {"parameters": {"BLOCK_N": 1024, "num_warps": None}},
        {"parameters": None},
        {"measured": "many"},
        {"measured": 3},
        {"measured": [64]},
        {"gain": float("nan")},
        {"gain": float("inf")},
        {"gain": 0},
        {"gain": "1"},
        {"triton": 3.9},
        {"date": None},
        {"code": "import os"},
    ],
    ids=str,
)
def test_an_entry_that_does_not_fit_is_left_out_and_said(change):
    """What stands beside it stays in force."""
    path = put(entry())
    table = raw(path)
    table["entries"] = [table["entries"][0] | change, entry_of(table, width=1 << 14)]
    path.write_text(json.dumps(table))
    launch.reread()
    with pytest.warns(UserWarning, match="entry 0: ") as seen:
        assert told() in (PURE, OTHER)
    assert len(seen) == 1 and str(path) in str(seen[0].message)
    config = told(width=1 << 14, itemsize=4)
    assert {name: config[name] for name in ("BLOCK_N", "num_warps")} == table["entries"][1]["parameters"]


def entry_of(table: dict, **shape) -> dict:
    return table["entries"][0] | {"shape": SHAPE | shape}


@pytest.mark.parametrize(
    "parameters",
    [
        {"BLOCK_N": 1 << 30, "num_warps": 4},
        {"BLOCK_N": 1023, "num_warps": 4},
        {"BLOCK_N": 1024, "num_warps": 3},
        {"BLOCK_N": 0, "num_warps": 0},
        {"BLOCK_N": 1024, "num_warps": 64},
        {"BLOCK_N": [[1, 2]], "num_warps": 4},
        {"BLOCK_N": True, "num_warps": True},
    ],
    ids=str,
)
def test_parameters_that_are_no_candidate_are_never_used(parameters):
    """For the shapes they stand at that is a warning, one a file; elsewhere they are only too far away."""
    path = put(entry())
    table = raw(path)
    table["entries"][0]["parameters"] = parameters
    table["entries"].append(entry_of(table, width=8192))
    path.write_text(json.dumps(table))
    launch.reread()
    assert told(width=1 << 20, itemsize=4) == launch.SHAPES["steps.picard"](width=1 << 20, itemsize=4)
    with pytest.warns(UserWarning, match="picard at .* can't take") as seen:
        assert told() == PURE
        assert told(width=8192, itemsize=4) == launch.SHAPES["steps.picard"](width=8192, itemsize=4)
    assert len(seen) == 1


def test_a_shape_of_another_kind_is_never_near():
    path = put(entry("affine", ROWS, launch.candidates("rows.affine", **ROWS)[3]))
    table = raw(path)
    for shapes in (64, [], [[64]], [[64, 64, 64]], [64, 64]):
        table["entries"][0]["shape"]["shapes"] = shapes
        path.write_text(json.dumps(table))
        launch.reread()
        assert told("affine", **ROWS) == launch.rows(**ROWS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe")
def test_what_is_no_file_does_not_make_a_launch_wait(home):
    home.mkdir()
    os.mkfifo(tables.paths(GPU)[0])
    with pytest.warns(UserWarning, match="it is no file"):
        assert told() == PURE


def test_a_folder_in_its_place(home):
    tables.paths(GPU)[0].mkdir(parents=True)
    with pytest.warns(UserWarning, match="it is no file"):
        assert told() == PURE


def test_a_cache_folder_that_can_not_be(home):
    """Reading goes on without it, writing says so."""
    home.write_text("a file")
    assert told() == PURE
    with pytest.raises(OSError, match="cache"):
        tables.write(GPU, entry(), launch.spaces())


def test_where_the_cache_folder_is(monkeypatch, tmp_path):
    assert tables.folder() == tmp_path / "cache"
    monkeypatch.delenv("TRITONDEQ_CACHE")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for platform, variable, fallback in (
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("darwin", "XDG_CACHE_HOME", "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.delenv(variable, raising=False)
        assert tables.folder() == tmp_path / "home" / fallback / "tritondeq"
        monkeypatch.setenv(variable, str(tmp_path / "told"))
        assert tables.folder() == tmp_path / "told" / "tritondeq"
        monkeypatch.setenv(variable, "relative")
        assert tables.folder() == tmp_path / "home" / fallback / "tritondeq"


def test_no_home_is_no_table(monkeypatch):
    def home():
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("TRITONDEQ_CACHE")
    monkeypatch.setattr(Path, "home", home)
    assert told() == PURE and len(tables.paths(GPU)) == 1
    with pytest.raises(OSError, match="set TRITONDEQ_CACHE"):
        tables.write(GPU, entry(), launch.spaces())


def test_what_is_written_is_what_is_read():
    first, second = entry(gain=1.25), entry("affine", ROWS, launch.candidates("rows.affine", **ROWS)[2])
    path = put(first, second, replace(first, gain=1.5))
    table = tables.read(path, GPU, launch.spaces())
    assert table.entries == [replace(first, gain=1.5), second] and table.fault is None
    assert sorted(one.name for one in path.parent.iterdir()) == [path.with_suffix(".json").name, path.stem + ".lock"]
    assert len(path.read_text().splitlines()) == 4, "a line for each entry"


def test_a_failed_write_leaves_the_old_table(monkeypatch):
    path = put(entry())
    before = path.read_text()

    def replace_(new, old):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_)
    with pytest.raises(KeyboardInterrupt):
        tables.write(GPU, entry(shape={"width": 64, "itemsize": 4, "features": 0}), launch.spaces())
    assert path.read_text() == before and len(list(path.parent.iterdir())) == 2


def test_two_that_write_at_once_lose_nothing(home):
    code = """
        import sys
        from tritondeq.kernels import launch, tables
        gpu = tables.Gpu("Fake 9000 (80 GB)", (9, 0))
        print("ready", flush=True)
        sys.stdin.readline()
        for i in range(40):
            shape = {"width": 128 + 2 * i + int(sys.argv[1]), "itemsize": 4, "features": 0}
            one = tables.Entry("picard", shape, {"BLOCK_N": 128, "num_warps": 1})
            tables.write(gpu, one, launch.spaces())
    """
    code = "\n".join(line.strip() if "  " * 6 not in line else "    " + line.strip() for line in code.splitlines())
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    for one in both:
        one.communicate()
        assert one.returncode == 0
    (path,) = home.glob("*.json")
    widths = sorted(one["shape"]["width"] for one in raw(path)["entries"])
    assert widths == list(range(128, 208))


def test_a_lock_ends_with_its_holder(home):
    """Whoever was killed while it wrote does not stop the next one."""
    code = """import os, sys; from tritondeq.kernels import tables; from pathlib import Path
with tables.locked(Path(sys.argv[1])): os._exit(9)"""
    path = tables.paths(GPU)[0]
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    put(entry())
    assert told() == OTHER


def test_sources_of_an_op():
    """A change in gated.py leaves what was measured of the affine cell; one in rows.py does not."""
    assert len({tables.source(op) for op in ("affine", "gated", "mlp", "picard", "anderson", "group_norm")}) == 6
    seen = []
    real, tables.source = tables.source, tables.source.__wrapped__
    read = Path.read_text
    try:
        Path.read_text = lambda self, **options: seen.append(self.stem) or read(self, **options)
        of = {}
        for op in ("affine", "gated", "anderson", "affine_steps", "group_norm", "residual_rms"):
            seen.clear()
            tables.source(op)
            of[op] = set(seen)
    finally:
        Path.read_text, tables.source = read, real
    assert {"affine", "rows", "tl_rows", "tl_common", "tl_anderson"} <= of["affine"]
    assert "gated" not in of["affine"] and "affine" not in of["gated"] and "rows" in of["gated"]
    assert {"anderson", "steps", "tl_steps", "tl_anderson", "tl_common"} <= of["anderson"]
    assert {"affine_steps", "rows", "steps", "tl_steps"} <= of["affine_steps"]
    assert {"group_norm", "tl_common"} <= of["group_norm"]
    assert not any({"launch", "tables", "space", "dispatch"} & files for files in of.values())


def test_a_source_that_changes_is_seen(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("from . import launch, two\nfrom .three import x\n")
    for name in ("two", "three", "four", "launch"):
        (tmp_path / f"{name}.py").write_text("from .one import y\n")
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "tables.py"))
    made = tables.source.__wrapped__("one")
    for name, matters in (("one", True), ("two", True), ("three", True), ("four", False), ("launch", False)):
        path = tmp_path / f"{name}.py"
        text = path.read_text()
        path.write_text(text + "z = 1\n")
        assert (tables.source.__wrapped__("one") != made) == matters
        path.write_text(text)


def test_a_trial_is_all_there_is_while_it_lasts():
    put(entry())
    third = launch.candidates("steps.picard", **SHAPE)[1]
    with launch.trial("picard", SHAPE, third):
        assert told() == third and told("anderson") == PURE
    assert told() == OTHER
    with pytest.raises(KeyError), launch.trial("picard", SHAPE, third):
        assert told() == third
        raise KeyError
    assert told() == OTHER


def test_a_trial_of_a_step_leaves_the_first_step_alone():
    shape = {"batch": 1 << 16, "features": 512, "terms": 2, "shared": launch.SHARED}
    config = launch.candidates("steps.affine", **shape)[1]
    with launch.trial("affine_steps", shape, config):
        assert told("affine_steps", **shape, start=False) == config
        assert told("affine_steps", **shape, start=True) == launch.affine_steps(**shape, start=True)


def faults(folder: Path) -> list[str]:
    """What is wrong with the tables of a folder, or with their names."""
    found = []
    for path in folder.glob("*.json"):
        gpu = tables.Gpu(raw(path)["gpu"], tuple(raw(path)["capability"]))
        table = tables.read(path, gpu, launch.spaces())
        found += [table.fault] if table.fault else []
        found += [] if tables.paths(gpu)[-1].name == path.name else [f"{path.name} is not for {gpu.name}"]
    return found


def test_what_is_shipped_can_be_read():
    path = put(entry())
    assert faults(path.parent) == []
    path.rename(path.with_name("another.json"))
    assert faults(path.parent) == [f"another.json is not for {GPU.name}"]
    table = raw(path.with_name("another.json"))
    path.write_text(json.dumps(table | {"entries": [table["entries"][0] | {"op": "none"}]}))
    assert len(faults(path.parent)) == 2
    assert faults(tables.paths(GPU)[-1].parent) == []


def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from tritondeq.kernels import tables; print(tables.version())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
