"""What lanes do together, lane by lane as PTX's manual has it."""

from itertools import product

import numpy as np
import pytest

from .errors import Fault, Unknown
from .forms import EFFECTS, expand
from .harness import compute, entry, run

COVERED = [form for form in EFFECTS if form.startswith(("shfl", "redux", "vote"))]


def shuffled(mode, lane, b, c):
    """Returns the lane from which a lane takes its value, and whether it is in range."""
    segment, limit = c >> 8 & 31, c & 31
    last, first = (lane & segment) | (limit & ~segment & 31), lane & segment
    if mode == "up":
        j, inside = lane - b, lane - b >= last
    elif mode == "down":
        j, inside = lane + b, lane + b <= last
    elif mode == "bfly":
        j, inside = lane ^ b, lane ^ b <= last
    else:
        j = first | (b & ~segment & 31)
        inside = j <= last
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    """With clamps, and in segments of 16, 8 and 1 lanes."""
    values = np.arange(32, dtype=np.uint32) * 7 + 1
    for b, c in product((0, 1, 2, 5, 16, 31), (0, 31, 7, 0x101F, 0x1007, 0x181F, 0x1F1F)):
        took = compute(f"shfl.sync.{mode}.b32", ["b32"] * 4, "b32", [values, b, c, -1])
        assert took.tolist() == [values[shuffled(mode, lane, b, c)[0]] for lane in range(32)], (b, c)


def test_a_shuffle_by_another_distance_in_each_lane_and_its_predicate():
    body = """mov.u32 %r1, %laneid; mul.lo.u32 %r2, %r1, 5; ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r1, 8, %d1;
        shfl.sync.idx.b32 %r3|%p1, %r1, %r2, 23, -1; selp.b32 %r4, 1, 0, %p1; st.global.v2.b32 [%d1], {%r3, %r4};"""
    out = np.zeros((32, 2), np.uint32)
    run(entry(body, ["out"]), {"out": out})
    assert out.tolist() == [list(map(int, shuffled("idx", lane, lane * 5 % 32, 23))) for lane in range(32)]


def test_several_warps_in_lockstep_keep_to_themselves():
    values = np.arange(96, dtype=np.uint32)
    assert compute("shfl.sync.bfly.b32", ["b32"] * 4, "b32", [values, 1, 31, -1]).tolist() == [x ^ 1 for x in range(96)]


@pytest.mark.parametrize("form", [form for form in COVERED if form.startswith("redux")])
def test_reductions(form):
    for opcode in expand(form):
        _, _, name, kind = opcode.split(".")
        values = np.random.default_rng(2).integers(0, 1 << 32, 64, np.uint64).astype(np.uint32)
        got = compute(opcode, [kind, "b32"], kind, [values, np.full(64, 0xFFFFFFFF, np.uint32)])
        for warp in (values[:32].tolist(), values[32:].tolist()):
            numbers = [x - (1 << 32) if kind == "s32" and x >> 31 else x for x in warp]
            result = numbers[0]
            for x in numbers[1:]:
                result = {
                    "add": result + x, "min": min(result, x), "max": max(result, x), "and": result & x,
                    "or": result | x, "xor": result ^ x,
                }[name]  # fmt: skip
            expected = [result & 0xFFFFFFFF] * 32
            assert got[:32].tolist() == expected, opcode
            got = got[32:]


def test_a_reduction_over_a_part_of_a_warp_is_a_fault():
    values = np.zeros(32, np.uint32)
    with pytest.raises(Fault, match="a part of a warp"):
        compute("redux.sync.add.u32", ["u32", "b32"], "u32", [values, values + 1])


@pytest.mark.parametrize("votes", [[False] * 32, [True] * 32, [lane % 3 == 0 for lane in range(32)]])
def test_votes(votes):
    given = np.array(votes)
    for name, negate in product(("any", "all", "uni", "ballot"), (False, True)):
        to, opcode = ("b32", "vote.sync.ballot.b32") if name == "ballot" else ("pred", f"vote.sync.{name}.pred")
        now = [vote != negate for vote in votes]
        expected = {
            "any": any(now), "all": all(now), "uni": all(now) or not any(now),
            "ballot": sum(vote << lane for lane, vote in enumerate(now)),
        }[name]  # fmt: skip
        got = compute(opcode, ["pred", "b32"], to, [given, -1]) if not negate else negated(opcode, to, votes)
        assert (got == expected).all(), (name, negate)


def negated(opcode, to, votes):
    """Runs a vote of the negation of a predicate."""
    bits = sum(vote << lane for lane, vote in enumerate(votes))
    body = f"""mov.u32 %r1, %laneid; ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r1, 4, %d1;
        shr.u32 %r2, {bits}, %r1; and.b32 %r2, %r2, 1; setp.ne.u32 %p1, %r2, 0;"""
    if to == "pred":
        body += f"{opcode} %p2, !%p1, -1; selp.b32 %r3, 1, 0, %p2;"
    else:
        body += f"{opcode} %r3, !%p1, -1;"
    out = np.zeros(32, np.uint32)
    run(entry(body + "st.global.b32 [%d1], %r3;", ["out"]), {"out": out})
    return out


@pytest.mark.parametrize("line", ["shfl.sync.idx.b32 %r2, %r1, 0, 31, 15;", "vote.sync.any.pred %p2, %p1, 15;"])
def test_masks_of_some_lanes_are_unknown(line):
    with pytest.raises(Unknown, match="mask"):
        run(entry(f"mov.u32 %r1, 1; setp.eq.u32 %p1, %r1, 0; {line}", []), {})


@pytest.mark.parametrize(
    "line", ["shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;", "vote.sync.any.pred %p2, %p1, -1;", "bar.warp.sync -1;",
             "redux.sync.add.u32 %r2, %r1, %r3;"]
)  # fmt: skip
def test_a_part_of_a_warp_is_a_fault(line):
    body = f"mov.u32 %r1, %tid.x; mov.b32 %r3, -1; setp.lt.u32 %p1, %r1, 5; @%p1 bra over; {line} over: ret;"
    with pytest.raises(Fault, match="a part of a warp"):
        run(entry(body, []), {})
    # lanes that have ended don't count
    run(entry(body.replace("bra over", "exit"), []), {})
