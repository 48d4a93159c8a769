"""Tables of measured launch parameters: which entry a launch takes, what is ignored, and how tables are written."""

import json
import multiprocessing
import os
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritondeq.kernels import launch, tables

CPU = torch.device("cpu")
GPU = "Fake 9000 (80GB)"
KEY = {"width": 4096, "itemsize": 4, "features": 0}
ENTRY = tables.Entry("steps.picard", KEY, {"BLOCK_N": 1024, "num_warps": 2}, 1.12, ["any 4x4096 fp32"], "2026-01-31")
CHOSEN = {"BLOCK_N": 1024, "SPLITS": 4, "num_warps": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder, and a GPU whose table launches on the CPU take."""
    monkeypatch.setenv("TRITONDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "gpu", lambda device: GPU)
    launch.reread()
    yield tmp_path / "cache"
    launch.reread()


def parameters(op="steps.picard", **shape):
    return launch.parameters(op, CPU, **({"width": 4096, "itemsize": 4} | shape))


def edit(path: Path, **fields) -> None:
    """Writes other fields into a table."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_without_a_table_the_pure_function_is_used():
    assert parameters() == launch.steps(width=4096, itemsize=4)


def test_a_table_is_picked_up(cache):
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

    def block_b(*shapes, **other):
        return launch.parameters("rows.mlp", CPU, **{"batch": 1, "shapes": shapes, "terms": 1, "memory": 0} | other)[
            "BLOCK_B"
        ]

    assert block_b((128, 64), (64, 128)) == block_b((128, 32), (32, 128)) == block_b((128, 64), (64, 128), batch=99)
    assert block_b((128, 64), (64, 128)) == 32
    assert block_b((128, 31), (31, 128)) == block_b((128, 64), (64, 128), (128, 64)) == 16
    assert block_b((128, 64), (64, 128), terms=2) == block_b((128, 64), (64, 128), memory=2) == 16


@pytest.mark.parametrize(
    "choice",
    [{"BLOCK_N": 1000}, {"BLOCK_N": 1 << 14}, {"BLOCK_N": -1024}, {"BLOCK_M": 16}, {"num_warps": 32}, {"num_warps": 0}],
)
def test_a_choice_that_does_not_fit_is_the_pure_functions(choice):
    tables.write(GPU, replace(ENTRY, choice=choice))
    launch.reread()
    assert parameters() == launch.steps(width=4096, itemsize=4)


def damage(path: Path, kind: str) -> None:
    """Spoils a table."""
    entry = json.loads(path.read_text())["entries"][0]
    entries = {
        "op": [entry | {"op": ["steps.picard"]}],
        "key": [entry | {"key": {"width": "4096"}}],
        "no key": [entry | {"key": None}],
        "choice": [entry | {"choice": {"BLOCK_N": 1e3}}],
        "gain": [entry | {"gain": "1"}],
        "date": [entry | {"date": 2026}],
        "more": [entry | {"more": 1}],
        "less": [{"op": "steps.picard"}],
        "no entry": [1],
        "no list": 7,
    }
    texts = {"empty": "", "cut": path.read_text()[:-9], "deep": "[" * 100_000, "list": "[]", "utf-16": "\x80"}
    if kind in texts:
        path.write_text(texts[kind], encoding="latin-1")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        edit(path, entries=entries[kind])


KINDS = "empty,cut,deep,list,utf-16,folder,op,key,no key,choice,gain,date,more,less,no entry,no list"


@pytest.mark.parametrize("kind", KINDS.split(","))
def test_a_damaged_table_is_one_warning(kind):
    path = tables.write(GPU, ENTRY)
    damage(path, kind)
    launch.reread()
    with pytest.warns(UserWarning, match="fake-9000-80gb.json .*ignored.*tune") as caught:
        parameters(), parameters(width=100)
    assert len(caught) == 1 and parameters() == launch.steps(width=4096, itemsize=4)
    if kind != "folder":
        tables.write(GPU, ENTRY)
        launch.reread()
        assert parameters() == CHOSEN, "it is begun anew"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpu": "Another"}, "is not about Fake 9000"),
        ({"made": "triton 1.0, kernels 0"}, "was made with triton 1.0, kernels 0, and this is triton"),
        ({"schema": 1}, "is no table of schema 2"),
    ],
)
def test_a_foreign_or_stale_table_is_one_warning(fields, message):
    edit(tables.write(GPU, ENTRY), **fields)
    launch.reread()
    with pytest.warns(UserWarning, match=message) as caught:
        assert parameters() == launch.steps(width=4096, itemsize=4)
        parameters(width=100)
    assert len(caught) == 1 and message in tables.summary(GPU)
    tables.write(GPU, ENTRY)
    launch.reread()
    assert parameters() == CHOSEN


def test_a_table_depends_on_triton_and_on_every_kernel(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    before = tables.made()
    monkeypatch.setattr("triton.__version__", "99.1.2+git")
    tables.forget()
    assert tables.made().startswith("triton 99.1, kernels ") and before.partition(",")[2] in tables.made()
    (tmp_path / "rows").mkdir()
    (tmp_path / "tables.py").touch()
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "tables.py"))
    stamps = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "rows" / "affine.py").write_text(text)
        tables.forget()
        stamps.add(tables.made())
    assert len(stamps) == 2 and before not in stamps
    tables.forget()


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

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="full"):
        tables.write(GPU, replace(ENTRY, gain=2.0))
    assert path.read_bytes() == before and sorted(one.suffix for one in cache.iterdir()) == [".json", ".lock"]


def test_a_reader_never_sees_half_a_table():
    stop, faults = threading.Event(), []

    def read():
        while not stop.is_set():
            faults.append(tables.read(GPU)[1])

    reader = threading.Thread(target=read)
    reader.start()
    for width in range(1, 40):
        tables.write(GPU, replace(ENTRY, key=KEY | {"width": width}))
    stop.set()
    reader.join()
    assert set(faults) == {None}


def write_many(first: int) -> None:
    for width in range(first, first + 10):
        tables.write(GPU, replace(ENTRY, key=KEY | {"width": width}))


@pytest.mark.skipif(sys.platform == "win32", reason="there the last writer wins")
def test_two_processes_that_write_lose_nothing():
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads
        writers = [context.Process(target=write_many, args=(first,)) for first in (100, 200)]
        for writer in writers:
            writer.start()
    for writer in writers:
        writer.join()
    assert len(tables.read(GPU)[0]) == 20


def test_the_folder_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITONDEQ_CACHE")
    for platform, name, fallback in (
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("darwin", "XDG_CACHE_HOME", "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        monkeypatch.setenv(name, "relative")
        assert tables.folder() == tmp_path / fallback / "tritondeq"
        monkeypatch.setenv(name, str(tmp_path / "other"))
        assert tables.folder() == tmp_path / "other" / "tritondeq"
        monkeypatch.delenv(name)


def test_without_a_home_there_is_no_table(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("TRITONDEQ_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert parameters() == launch.steps(width=4096, itemsize=4)
    with pytest.raises(OSError, match="set TRITONDEQ_CACHE"):
        tables.write(GPU, ENTRY)
    assert "set TRITONDEQ_CACHE" in tables.summary(GPU)
