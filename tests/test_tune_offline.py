"""`tune --offline`: every candidate's launches are whole, and the report says what the compiler made of them."""

import importlib

import pytest
import torch

from tritondeq import __main__, works
from tritondeq.kernels import dispatch, jobs, launch, offline

pytestmark = pytest.mark.skipif(not dispatch.has_triton(), reason="needs triton")

CPU = torch.device("cpu")
ASKED = [("affine", 128, "fp32"), ("affine", 512, "bf16"), ("mlp", 32, "fp32"), ("gated", 32, "bf16")]
ASKED += [("transformer", 64, "bf16"), ("conv", 256, "fp32"), ("any", 4096, "fp32"), ("any", 4096, "fp64")]


@pytest.mark.parametrize(("cell", "features", "dtype"), ASKED)
def test_every_argument_of_a_launch_is_told(cell, features, dtype):
    """Each is a constant or has a type, and the constants are no more than the kernel takes."""
    for work in works.works(cell, features, 64, dtype, CPU, offline.limits(90)):
        for config in launch.candidates(work.op, **work.shape):
            made = jobs.of_candidate(work.op, 90, config, dtype, work.shape)
            assert made
            for job in made:
                module, name = job["kernel"].split(":")
                arguments = set(getattr(importlib.import_module(module), name).arg_names)
                assert set(job["constants"]) <= arguments <= set(job["constants"]) | set(job["types"])
                assert job["num_warps"] == config["num_warps"] and job["chip"] == 90
                for parameter in set(config) & arguments - {"SPLITS"}:
                    assert job["constants"][parameter] == config[parameter]


def test_both_directions_of_a_solve_and_all_launches_of_a_step():
    def kernels(cell, features):
        (work, *_) = works.works(cell, features, 64, "fp32", CPU)
        config = launch.candidates(work.op, **work.shape)[0]
        made = jobs.of_candidate(work.op, 80, config, "fp32", work.shape)
        return [(job["kernel"].split(":")[1], job["constants"].get("TRANSPOSE")) for job in made]

    assert kernels("affine", 64) == [("rows_kernel", True), ("rows_kernel", False)]
    assert kernels("any", 64) == [("_step_kernel", None), ("finish_kernel", None)]
    assert kernels("conv", 64) == [("_normalise_kernel", None)]
    assert kernels("conv", 4096) == [("_normalise_kernel", None), ("_measure_kernel", None)]


def found(registers=40, spills=0, shared=100):
    return {"registers": registers, "shared": shared, "total": {"LDL": spills // 2, "STL": spills - spills // 2}}


def test_the_report(monkeypatch, capsys):
    """The most of an op's kernels; who spills, does not fit or does not compile; the pure function first."""
    given = [found(32), found(40), found(64, 3), found(30, 4), found(64), found(30, shared=232449)]
    given += [found(), {"error": "PassManager::run failed | badly"}]

    def run(asked):
        assert len({str(one) for one in asked}) > len(given) and {one["chip"] for one in asked} == {90}
        return given + [found()] * (len(asked) - len(given))

    monkeypatch.setattr(offline, "run", run)
    assert (
        __main__.main("tune --offline sm_90 --cell affine gated --features 64 512 --rows 9 --dtype bf16".split()) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "### affine 9x64 bf16, sm_90" and lines[3].count("---:") == 3
    configs = launch.candidates("rows.affine", batch=9, shapes=((64, 64),), terms=1, memory=0, **offline.limits(90))
    assert lines[4].startswith(
        f"| BLOCK_B {configs[0]['BLOCK_B']} STREAM False REFILL {configs[0]['REFILL']} num_warps "
    )
    assert lines[4].endswith(f"programs {configs[0]['programs']} | 40 | 0 | 100 | the pure function's |")
    assert lines[5].endswith("| 64 | 4 | 100 | spills |")
    assert lines[6].endswith("| 64 | 0 | 232449 | does not fit |")
    assert lines[7].endswith("|  |  |  | does not compile: PassManager::run failed / badly |")
    assert lines[8].endswith("| 40 | 0 | 100 |  |")
    assert lines[4 + len(configs)] == "" and lines[5 + len(configs)].startswith("### affine 9x512 bf16")
    heads = [line for line in lines if line.startswith("### ")]
    assert heads[1:3] == ["### affine 9x512 bf16, sm_90", "### affine 9x512 bf16 start, sm_90"] and len(heads) == 4
    assert lines[-1] == "Left out: gated of 512 features does not fit in a multiprocessor: take fewer --features."


def test_no_more_spills_than_the_pure_functions(monkeypatch, capsys):
    """Some of its kernels have a few outside of their loop."""

    def run(asked):
        return [found(spills=2), found(spills=2), found(spills=3), *[found()] * (len(asked) - 3)]

    monkeypatch.setattr(offline, "run", run)
    assert __main__.main("tune --offline sm_80 --cell transformer --features 64 --dtype fp32".split()) == 0
    lines = [line.partition(" | ")[2] for line in capsys.readouterr().out.splitlines()[4:8]]
    ends = ("2 | 100 | the pure function's |", "2 | 100 |  |", "3 | 100 | spills |", "0 | 100 |  |")
    assert lines == [f"40 | {end}" for end in ends]


def test_it_needs_triton(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert __main__.main(["tune", "--offline", "sm_90"]) == 1
    out, error = capsys.readouterr()
    assert not out and error == "tritondeq: triton is not installed: on Linux, pip install triton\n"
