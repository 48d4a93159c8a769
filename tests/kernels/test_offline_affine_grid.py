"""What ptxas makes of the affine cell's solve with a grid barrier, and in which order the PTX touches memory."""

import pytest

from tritondeq.kernels import jobs as launches
from tritondeq.kernels import launch, offline

SPILLS = 16  # local loads and stores outside the loop over steps, which has none: at most 12 with Triton 3.9


def grid_jobs():
    """The pure function's parameters, and other candidates."""
    cases = [
        (90, 16, 1024, 2, "tanh", False, {}),
        (90, 16, 1024, 2, "tanh", True, {}),
        (80, 16, 1024, 2, "tanh", False, {}),
        (100, 16, 2048, 2, "tanh", False, {}),
        (90, 64, 1024, 3, "tanh", False, {}),
        (90, 32, 2048, 1, "sin", True, {}),
        (80, 1, 300, 1, "gelu", True, {}),
        (90, 16, 2048, 2, "tanh", False, {"GROUPS": 4, "BLOCK_K": 64}),
        (90, 32, 1024, 2, "tanh", True, {"num_warps": 16, "BLOCK_K": 32}),
        (80, 64, 512, 3, "tanh", False, {"GROUPS": 8, "num_warps": 8, "BLOCK_K": 32}),
        (100, 64, 1024, 1, "tanh", False, {"GROUPS": 4, "BLOCK_K": 128}),
    ]
    jobs = {}
    for chip, rows, features, terms, act, adj, chosen in cases:
        shape = {"batch": rows, "features": features, "terms": terms, "shared": offline.SHARED[chip]}
        shape["processors"] = offline.PROCESSORS[chip]
        found = launch.candidates("affine_grid", **shape)
        config = next(one for one in found if all(one[name] == value for name, value in chosen.items()))
        name = f"sm{chip} B{rows} D{features} terms{terms} {act} {'adjoint' if adj else 'solve'}"
        name += "".join(f" {key} {value}" for key, value in chosen.items())
        jobs[name] = launches.affine_grid(chip, config, features=features, terms=terms, act=act, adj=adj)
    return jobs


JOBS = grid_jobs()


@pytest.fixture(scope="module")
def found():
    return dict(zip(JOBS, offline.run(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_machine_code(found, name):
    seen, job = found[name], JOBS[name]
    assert "error" not in seen, seen["error"]
    assert seen["cooperative"]
    known, terms, warps = job["constants"], job["constants"]["TERMS"], job["num_warps"]
    depth = known["CHUNKS"] * known["GROUPS"] * known["BLOCK_K"]
    assert seen["shared"] <= 2 * depth * (terms * known["BLOCK_N"] + 16) <= offline.SHARED[job["chip"]]
    hot, total = seen["hot"], seen["total"]
    assert hot is not None and hot.get("LDL", 0) + hot.get("STL", 0) == 0
    assert total.get("LDL", 0) + total.get("STL", 0) <= SPILLS
    # of m16n8k16, divided among the warps: none does what another does
    assert hot["HMMA"] == depth // 16 * known["BLOCK_N"] // 8 * terms // warps
    # 16 rows of d, at 8 bytes or more a thread, and the sums: no more of W, which stays
    assert hot["LDG"] <= 16 * depth // (4 * 32 * warps) + max(2, known["BLOCK_S"] // 32)


def blocks_of(order):
    """{label: (instructions, each (op, whether it has a predicate), labels that may follow)}."""
    blocks, label, falls = {"": ([], [])}, "", True
    for line in order:
        *predicate, op, target = line.split() if "bra" in line else (*line.split(), None)
        if op.endswith(":"):
            if falls:
                blocks[label][1].append(op[:-1])
            label, falls = op[:-1], True
            blocks[label] = ([], [])
        elif target:
            blocks[label][1].append(target)
            falls = bool(predicate)
            label = f"{label}+"
            blocks[label] = ([], [])
            if falls:
                blocks[label[:-1]][1].append(label)
        else:
            blocks[label][0].append((op, bool(predicate)))
            falls = falls and op != "ret"
    return blocks


def following(blocks, label, at):
    """(op, whether there is a barrier between) of all that may run after instruction `at` of a block."""
    found, todo, seen = set(), [(label, at + 1, False)], set()
    while todo:
        label, start, fenced = todo.pop()
        ops, onward = blocks[label]
        for op, _ in ops[start:]:
            fenced = fenced or op.startswith("bar.")
            found.add((op, fenced))
        todo += [(name, 0, fenced) for name in onward if (name, fenced) not in seen]
        seen |= {(name, fenced) for name in onward}
    return found


@pytest.mark.parametrize("name", JOBS)
def test_memory_is_told_in_order(found, name):
    """All threads' stores, their barrier, the arrival of one; its polls, their barrier, the loads of all, past L1."""
    blocks = blocks_of(found[name]["order"])
    atoms = [(label, at) for label, (ops, _) in blocks.items() for at, (op, _) in enumerate(ops) if "atom." in op]
    acquires = {"add": [], "or": []}
    for label, at in atoms:
        op, one = blocks[label][0][at]
        *_, scope, sem, does, _ = op.split(".")
        if does != "max":  # of the outcomes, which nobody waits for
            assert (scope, sem, one) == ("gpu", "acq_rel", True), op
            acquires[does].append((label, at))
    arrival, poll = acquires["add"]
    assert len(acquires["or"]) == 1

    before = [op for op, _ in blocks[arrival[0]][0][: arrival[1]]]
    fences = [at for at, op in enumerate(before) if op.startswith("bar.")]
    assert fences and not any(op.startswith("st.global") for op in before[fences[-1] :])
    assert any(op.startswith("st.global") for op in before)
    for place in arrival, poll:
        loads = {
            (op, fenced) for op, fenced in following(blocks, *place) if op.startswith(("ld.global", "ld.volatile"))
        }
        assert loads and all(fenced and op.startswith("ld.global.cg.") for op, fenced in loads), loads
    assert (blocks[poll[0]][0][poll[1]][0], True) in following(blocks, *poll)  # it polls in a loop
