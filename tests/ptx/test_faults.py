"""Each kind of fault, planted in PTX that is right without it, is caught under every schedule."""

import numpy as np
import pytest

from .errors import Fault
from .forms import CONTROL, EFFECTS
from .harness import entry, run
from .options import Options

COVERED = [*CONTROL, *(form for form in EFFECTS if form.startswith(("trap", "bar.warp")))]
SCHEDULES = [
    Options(), Options(lockstep=True), Options(seed=1), Options(seed=2), Options(seed=3),
    Options(seed=4, lockstep=True),
]  # fmt: skip
START = """mov.u32 %r1, %tid.x; ld.param.u64 %d1, [x]; ld.param.u64 %d2, [out]; mov.u32 %r2, smem;
    mad.wide.u32 %d3, %r1, 4, %d1; mad.wide.u32 %d4, %r1, 4, %d2; mad.lo.u32 %r3, %r1, 4, %r2;
    setp.lt.u32 %p1, %r1, 16; setp.lt.u32 %p2, %r1, 32; setp.ge.u32 %p3, %r1, 32;"""


@pytest.fixture(params=SCHEDULES, ids=lambda one: f"{one.seed}{' lockstep' * one.lockstep}")
def schedule(request):
    return request.param


def launch(body, schedule, threads=64, **options):
    """Runs a body with x[threads] and out[threads] of words, and 256 bytes of shared memory a warp."""
    x, out = np.arange(threads, dtype=np.uint32) + 7, np.zeros(threads, np.uint32)
    options = Options(**vars(schedule) | options)
    report = run(entry(START + body, ["x", "out"], threads=threads, shared=8 * threads), {"x": x, "out": out}, options)
    return x, out, report


def faulty(body, message, schedule, **options):
    with pytest.raises(Fault, match=message) as caught:
        launch(body, schedule, **options)
    assert "CTA 0" in str(caught.value) or "deadlock" in message
    return str(caught.value)


def test_a_sum_through_shared_memory_is_right(schedule):
    """What the others break: a load, a barrier, an exchange between warps, a store."""
    body = """ld.global.b32 %r4, [%d3]; st.shared.b32 [%r3], %r4; bar.sync 0; xor.b32 %r5, %r1, 63;
        mad.lo.u32 %r6, %r5, 4, %r2; ld.shared.b32 %r7, [%r6]; add.u32 %r8, %r7, %r4; st.global.b32 [%d4], %r8;"""
    x, out, report = launch(body, schedule)
    assert (out == x + x[::-1]).all() and not report.races and not report.notes
    assert report.warps == 2 and report.bytes["global read"] == report.bytes["global written"] == 256
    assert report.classes["bar.sync"] == 2 and report.steps == 2 * (10 + 8 + 1)


@pytest.mark.parametrize("place", ["%d3+4", "%d3+-4", "%d2+-64", "%d1+256"])
@pytest.mark.parametrize("line", ["ld.global.b32 %r4, [{}];", "st.global.b32 [{}], %r1;"])
def test_global_memory_out_of_bounds(line, place, schedule):
    if place.startswith("%d2"):  # beyond what stands before the second tensor, wherever that is
        place = "%d2+-1000000000000"
    found = faulty(line.format(place), "out of bounds: (1|64|32) of (32|64) accesses of 4 bytes", schedule)
    assert line.split()[0] in found


def test_an_access_reaches_over_the_end_of_a_tensor(schedule):
    faulty("ld.global.v2.b32 {%r4, %r5}, [%d1+252];", "misaligned", schedule)
    faulty(
        "setp.eq.u32 %p4, %r1, 63; @%p4 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d1+256];", "out of bounds", schedule
    )


@pytest.mark.parametrize(
    "line",
    ["ld.global.b64 %d5, [%d1+4];", "st.global.v2.b32 [%d1+4], {%r1, %r1};", "ld.shared.b32 %r4, [%r2+2];",
     "st.shared.v4.b32 [%r2+8], {%r1, %r1, %r1, %r1};", "atom.global.gpu.relaxed.add.u32 %r4, [%d1+2], 1;",
     "cp.async.ca.shared.global [%r2], [%d1+4], 8;", "cp.async.ca.shared.global [%r2+4], [%d1], 8;"],
)  # fmt: skip
def test_misaligned(line, schedule):
    faulty(line, "misaligned: an address is no multiple of (4|8|16)", schedule)


@pytest.mark.parametrize(
    "line", ["ld.shared.b32 %r4, [%r2+512];", "st.shared.b32 [%r3+512], %r1;",
             "st.shared.v2.b32 [%r2+512], {%r1, %r1};",
             "atom.shared.cta.relaxed.add.u32 %r4, [%r2+512], 1;", "st.shared.b32 [%r2+-4], %r1;"]
)  # fmt: skip
def test_shared_memory_out_of_bounds(line, schedule):
    faulty(line, "out of bounds: byte .* of 512 of shared memory", schedule)


def test_shared_memory_that_nobody_wrote(schedule):
    body = "@%p1 st.shared.b32 [%r3], %r1; bar.sync 0; @%p1 ld.shared.b32 %r4, [%r3];"
    launch(body, schedule)
    whole = body.replace("@%p1 ld", "ld")
    faulty(whole, "reads shared memory that was never written: granule (16|32)", schedule)
    launch(whole, schedule, uninit=False)
    # watched by the smallest access: a byte of a word is not the word
    faulty("st.shared.b8 [%r3], %h1; ld.shared.b32 %r4, [%r3];".replace("%h1", "1"), "never written", schedule)
    faulty("ld.shared.b16 %h1, [%r3];", "never written", schedule)
    faulty("setp.lt.u32 %p4, %r1, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 %r4, [%r2];", "never written", schedule)


@pytest.mark.parametrize(
    "line",
    ["st.global.b32 [%d4], %r9;", "ld.global.b32 %r4, [%d9];", "@%p9 st.global.b32 [%d4], %r1;", "@%p9 bra end;",
     "st.shared.b32 [%r9], %r1;", "@%p9 mov.u32 %r4, 0;", "shfl.sync.up.b32 %r4, %r1, %r9, 0, -1;",
     "redux.sync.add.u32 %r4, %r9, %r10;", "vote.sync.any.pred %p4, %p9, -1;",
     "atom.global.gpu.relaxed.add.u32 %r4, [%d1], %r9;"],
)  # fmt: skip
def test_registers_that_nobody_set(line, schedule):
    line += "end: ret;"
    faulty("mov.b32 %r10, -1;" + line, "reads a register that was never set", schedule)


def test_registers_that_some_threads_set(schedule):
    half = "@%p1 mov.u32 %r9, 5; "
    launch(half + "@%p1 st.global.b32 [%d4], %r9;", schedule)
    faulty(half + "st.global.b32 [%d4], %r9;", "never set", schedule)
    faulty(half + "@%p2 st.global.b32 [%d4], %r9;", "never set", schedule)
    launch(half + "@!%p1 mov.u32 %r9, 6; st.global.b32 [%d4], %r9;", schedule)
    # computing with them is allowed: the half of a pair that is not wanted
    _, out, _ = launch("mov.b64 %d5, {%r1, %r9}; mov.b64 {%r4, %r5}, %d5; st.global.b32 [%d4], %r4;", schedule)
    assert (out == np.arange(64)).all()


@pytest.mark.parametrize("predicate", ["%p1", "!%p1"])
def test_a_part_of_a_warp_at_a_barrier(predicate, schedule):
    faulty(f"@{predicate} bar.sync 0;", "(16|48) threads of these warps do not come to this barrier", schedule)
    faulty(f"@{predicate} bra over; bar.sync 0; over: ret;", "do not come to this barrier", schedule)


def test_a_warp_that_does_not_come_to_a_barrier(schedule):
    message = "do not come to this barrier" if schedule.lockstep else "others have ended"
    faulty("@%p3 bra over; bar.sync 0; over: ret;", message, schedule)
    if not schedule.lockstep:
        faulty("@%p3 exit; bar.sync 0;", "others have ended", schedule)


def test_warps_at_different_barriers(schedule):
    """On a GPU they would meet there, which PTX does not allow for code that Triton makes: no store is ordered."""
    message = "do not come" if schedule.lockstep else "wait at different barriers"
    faulty("@%p3 bra other; bar.sync 0; bra end; other: bar.sync 0; end: ret;", message, schedule)


def test_programs_that_wait_for_what_never_comes(schedule):
    spin = "again: {} setp.eq.u32 %p4, %r4, 0; @%p4 bra again;"
    for poll in ("atom.global.gpu.acq_rel.add.u32 %r4, [%d2], 0;", "ld.acquire.gpu.global.b32 %r4, [%d2];"):
        faulty(spin.format(poll), "deadlock: .* atomics that changed nothing", schedule, most_polls=500)
    # one that comes, if late
    body = "@%p3 bra store; " + spin.format("ld.acquire.gpu.global.b32 %r4, [%d2];")
    body += "bra end; store: st.release.gpu.global.b32 [%d2], 1; end: ret;"
    if not schedule.lockstep:  # there, threads that part in a branch run one side to its end
        launch(body, schedule, most_polls=500, races="off")


def test_a_trap(schedule):
    launch("setp.gt.u32 %p4, %r1, 100; @%p4 trap;", schedule)
    faulty("@%p1 trap;", "a trap: an assertion of the kernel failed", schedule)


def test_a_copy_that_nobody_waited_for(schedule):
    body = "cp.async.ca.shared.global [%r3], [%d3], 4; {} ld.shared.b32 %r4, [%r3]; st.global.b32 [%d4], %r4;"
    x, out, _ = launch(body.format("cp.async.commit_group; cp.async.wait_group 0;"), schedule)
    assert (x == out).all()
    for wait in (
        "",
        "cp.async.commit_group;",
        "cp.async.commit_group; cp.async.wait_group 1;",
        "cp.async.wait_group 0;",
    ):
        faulty(body.format(wait), "never written", schedule)
    faulty(body.format("@%p1 cp.async.commit_group;"), "only some of the threads commit copies", schedule)
    part = "mov.b32 %r9, 2; cp.async.ca.shared.global [%r3], [%d3], 4, %r9;"
    faulty(part, "a copy of 4 bytes of which some are read", schedule)


@pytest.mark.parametrize("uniform", ["bra", "bra.uni"])
def test_branches(uniform, schedule):
    """Threads that part in branches and loops meet again; those that end are gone."""
    body = f"""mov.u32 %r4, 0; mov.u32 %r5, 0; rem.u32 %r6, %r1, 5;
        loop: setp.ge.u32 %p4, %r5, %r6; @%p4 bra done; add.u32 %r5, %r5, 1; and.b32 %r7, %r5, 1;
        setp.eq.u32 %p5, %r7, 0; @%p5 bra even; add.u32 %r4, %r4, 100; {uniform} loop;
        even: add.u32 %r4, %r4, 1; {uniform} loop;
        done: setp.eq.u32 %p6, %r6, 3; @%p6 exit; setp.eq.u32 %p7, %r6, 4; @!%p7 bra over; add.u32 %r4, %r4, 1000;
        over: bar.warp.sync -1; st.global.b32 [%d4], %r4;"""
    _, out, report = launch(body, schedule)
    n = np.arange(64) % 5
    assert (out == np.where(n == 3, 0, 100 * ((n + 1) // 2) + n // 2 + 1000 * (n == 4))).all()
    assert report.classes[uniform]


@pytest.mark.parametrize("end", ["ret", "exit"])
def test_what_stands_behind_the_end_does_not_run(end, schedule):
    _, out, report = launch(f"@%p2 {end}; bar.warp.sync -1; st.global.b32 [%d4], %r1;", schedule)
    assert (out == np.where(np.arange(64) < 32, 0, np.arange(64))).all() and report.classes[end]
