"""Tables of measured launch parameters: which entry a launch takes, what is ignored, and how tables are written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritondeq.kernels import devices, launch, tables

CPU = torch.device("cpu")
GPU = "Fake 9000 (80GB)"
KEY = {"width": 4096, "itemsize": 4, "features": 0}
ENTRY = tables.Entry("steps.picard", KEY, {"BLOCK_N": 1024, "num_warps": 2}, 1.12, ["any 4x4096 fp32"], "2026-01-31")
CHOSEN = {"BLOCK_N": 1024, "SPLITS": 4, "num_warps": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder, and a GPU whose table launches on the CPU take."""
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "gpu", lambda device: GPU)
    launch.reread()
    yield tmp_path / "cache"
    launch.reread()


def parameters(op="steps.picard", **shape):
    return launch.parameters(op, CPU, **({"width": 4096, "itemsize": 4} | shape))


def test_a_table_is_picked_up(cache):
    assert parameters() == launch.steps(width=4096, itemsize=4), "without one"
    path = tables.write(GPU, ENTRY)
    launch.reread()
    assert path == cache / "fake-9000-80gb.json" and tables.read(GPU) == ([ENTRY], None)
    assert parameters() == CHOSEN
    assert parameters("steps.anderson") == launch.steps(width=4096, itemsize=4), "another op"
    for other in ({"itemsize": 8}, {"features": 64}):
        assert parameters(**other) == launch.steps(**{"width": 4096, "itemsize": 4} | other)
    parameters()["num_warps"] = 99
    assert parameters() == CHOSEN, "a caller may change what it gets"


def test_a_tile_is_read_as_it_was_written():
    key = {"batch": 64, "features": 512, "terms": 2, "start": False}
    tables.write(GPU, tables.Entry("steps.affine", key, {"TILE": (32, 64, 64, 4), "num_warps": 4}, 1.1, [], ""))
    launch.reread()
    config = launch.parameters("steps.affine", CPU, batch=64, features=512, terms=2)
    assert [config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages")] == [32, 64, 64, 4]


def test_the_nearest_shape_within_a_factor_of_two():
    for width, warps in ((1024, 2), (4096, 8), (16384, 2)):
        tables.write(GPU, replace(ENTRY, key=KEY | {"width": width}, choice={"BLOCK_N": 1024, "num_warps": warps}))
    launch.reread()
    warps = {width: parameters(width=width)["num_warps"] for width in (600, 2047, 2049, 8191, 8193, 32768)}
    assert warps == {600: 2, 2047: 2, 2049: 8, 8191: 8, 8193: 2, 32768: 2}
    assert parameters(width=511) == launch.steps(width=511, itemsize=4)
    assert parameters(width=1 << 20) == parameters(width=32768) | {"SPLITS": 1024}, "wide samples are alike"


def test_shapes_of_weights_are_near_where_all_of_them_are():
    key = {"batch": 1, "shapes": ((128, 64), (64, 128)), "terms": 1, "memory": 0}
    choice = {"BLOCK_B": 32, "STREAM": False, "num_warps": 4}
    tables.write(GPU, tables.Entry("rows.mlp", key, choice, 1.1, [], ""))
    launch.reread()

    def taken(**other) -> bool:
        return launch.parameters("rows.mlp", CPU, **key | other)["BLOCK_B"] == 32

    assert taken() and taken(shapes=((128, 32), (32, 128))) and taken(batch=99)
    assert not taken(shapes=((128, 31), (31, 128))) and not taken(shapes=((128, 64), (64, 128), (128, 64)))
    assert not taken(terms=2) and not taken(memory=2)


@pytest.mark.parametrize(
    "choice",
    [{"BLOCK_N": 1000}, {"BLOCK_N": 1 << 14}, {"BLOCK_N": -1024}, {"BLOCK_M": 16}, {"num_warps": 32}, {"num_warps": 0}],
)
def test_a_choice_that_does_not_fit_is_the_pure_functions(choice):
    tables.write(GPU, replace(ENTRY, choice=choice))
    launch.reread()
    assert parameters() == launch.steps(width=4096, itemsize=4)


FAULTS = {
    "empty": ("", "is damaged"),
    "cut": ('{"schema": 2, ', "is damaged"),
    "deep": ("[" * 100_000, "is damaged"),
    "latin-1": ("\x80", "is damaged"),
    "a list": ("[]", "is no table of schema 2"),
    "another schema": ({"schema": 1}, "is no table of schema 2"),
    "foreign": ({"gpu": "Another"}, "is not about Fake 9000"),
    "stale": ({"made": "triton 1.0, kernels 0"}, "was made with triton 1.0, kernels 0, and this is "),
    "no entries": ({"entries": 7}, "is damaged"),
    "no entry": ({"entries": [1]}, "is damaged"),
    "less": ({"entries": [{"op": "steps.picard"}]}, "is damaged"),
    "more": ({"entries": [vars(ENTRY) | {"more": 1}]}, "is damaged"),
    "op": ({"entries": [vars(ENTRY) | {"op": ["steps.picard"]}]}, "is damaged"),
    "key": ({"entries": [vars(ENTRY) | {"key": {"width": "4096"}}]}, "is damaged"),
    "choice": ({"entries": [vars(ENTRY) | {"choice": {"BLOCK_N": 1e3}}]}, "is damaged"),
    "date": ({"entries": [vars(ENTRY) | {"date": 2026}]}, "is damaged"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_damaged_foreign_or_stale_table_is_one_warning(kind):
    path = tables.write(GPU, ENTRY)
    fault, message = FAULTS[kind]
    text = fault if isinstance(fault, str) else json.dumps(json.loads(path.read_text()) | fault)
    path.write_text(text, encoding="latin-1")
    launch.reread()
    with pytest.warns(UserWarning, match=f"fake-9000-80gb.json {message}.*: it is ignored.*tune") as caught:
        assert parameters() == launch.steps(width=4096, itemsize=4)
        parameters(width=100)
    assert len(caught) == 1 and message in tables.summary(GPU)
    tables.write(GPU, ENTRY)
    launch.reread()
    assert parameters() == CHOSEN, "it is begun anew"


def test_a_file_that_can_not_be_read_is_one_warning(cache):
    (cache / "fake-9000-80gb.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match="is damaged.*: it is ignored"):
        assert parameters() == launch.steps(width=4096, itemsize=4)
    with pytest.raises(OSError):
        tables.write(GPU, ENTRY)
    assert len(list(cache.iterdir())) == 1, "no half of a table is left"


def test_a_table_depends_on_triton_and_on_every_kernel(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    before = tables.made()
    monkeypatch.setattr("triton.__version__", "99.1.2+git")
    assert tables.made() == "triton 99.1," + before.partition(",")[2]
    (tmp_path / "rows").mkdir()
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "tables.py"))
    stamps = {before}
    for text in ("a = 1", "a = 2"):
        (tmp_path / "rows" / "affine.py").write_text(text)
        stamps.add(tables.made())
    assert len(stamps) == 3


def test_a_key_has_one_entry():
    for gain in (1.1, 1.2):
        tables.write(GPU, replace(ENTRY, gain=gain))
        tables.write(GPU, replace(ENTRY, op="steps.anderson", key=dict(reversed(KEY.items()))))
    assert [(one.op, one.gain) for one in tables.read(GPU)[0]] == [("steps.picard", 1.2), ("steps.anderson", 1.12)]


def test_a_write_that_fails_leaves_the_old_table(cache, monkeypatch):
    path = tables.write(GPU, ENTRY)
    before = path.read_bytes()

    def fails(*paths):
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="full"):
        tables.write(GPU, replace(ENTRY, gain=2.0))
    assert path.read_bytes() == before and list(cache.iterdir()) == [path]


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    assert tables.path(GPU) == tmp_path / "cache" / "fake-9000-80gb.json"
    monkeypatch.delenv("TRITONDEQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.path(GPU).parent == tmp_path / "tritondeq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tables.path(GPU).parent == Path.home() / ".cache" / "tritondeq"


def test_without_a_home_there_is_no_table(monkeypatch):
    def home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", home)
    assert parameters() == launch.steps(width=4096, itemsize=4) and tables.summary(GPU).startswith("no table")
    with pytest.raises(OSError, match="no home folder is known: set TRITONDEQ_CACHE"):
        tables.write(GPU, ENTRY)
