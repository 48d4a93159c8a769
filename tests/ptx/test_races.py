"""Data races are found under every schedule, and only they; what has none gives the same bits under all."""

import numpy as np
import pytest

from .harness import entry, run
from .options import Options

SCHEDULES = [Options(), Options(lockstep=True), *(Options(seed=seed) for seed in range(1, 5))]
START = """mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; ld.param.u64 %d1, [x];
    ld.param.u64 %d2, [out]; ld.param.u64 %d3, [flags]; mov.u32 %r40, smem; mad.lo.u32 %r41, %r1, 4, %r40;
    mad.lo.u32 %r4, %r2, 64, %r1; mad.wide.u32 %d4, %r4, 4, %d1; mad.wide.u32 %d5, %r1, 4, %d1;
    mad.wide.u32 %d6, %r4, 4, %d2; mad.wide.u32 %d7, %r1, 4, %d2; setp.eq.u32 %p1, %r1, 0; setp.lt.u32 %p2, %r1, 32;
    setp.eq.u32 %p3, %r2, 0; setp.eq.u32 %p4, %r2, 1; setp.eq.u32 %p5, %r2, 2;"""


@pytest.fixture(params=SCHEDULES, ids=lambda one: f"{one.seed}{' lockstep' * one.lockstep}")
def schedule(request):
    return request.param


def launch(body, schedule, programs=1, cooperative=False, **options):
    """Runs 64 threads a program on x, out and flags; returns out and the report."""
    x, out, flags = np.arange(512, dtype=np.uint32), np.zeros(512, np.uint32), np.zeros(8, np.uint32)
    options = Options(**vars(schedule) | options)
    ptx = entry(START + body, ["x", "out", "flags"], threads=64, shared=512)
    report = run(ptx, {"x": x, "out": out, "flags": flags}, options, (programs, 1, 1), cooperative=cooperative)
    return out, report


def kinds(report):
    return {(race.kind, race.space, race.scope) for race in report.races}


GLOBAL = "st.global.b32 [%d7], %r1; {} ld.global.b32 %r5, [{}]; st.global.b32 [%d5], %r5;"
OTHER_WARP = "xor.b32 %r6, %r1, 32; mad.wide.u32 %d8, %r6, 4, %d2;"


def test_warps_that_exchange_values_through_global_memory(schedule):
    barrier = OTHER_WARP + "bar.sync 0;"
    for between, races in ((barrier, set()), (OTHER_WARP, {"write-read", "read-write"})):
        _, report = launch(GLOBAL.format(between, "%d8"), schedule)
        assert {kind for kind, *_ in kinds(report)} <= races and bool(report.races) == bool(races)
        assert {(space, scope) for _, space, scope in kinds(report)} <= {("global out", "cta")}
        _, report = launch(GLOBAL.format(between, "%d8"), schedule, races="off")
        assert not report.races


@pytest.mark.parametrize("between", ["", "bar.sync 0;"])
def test_warps_that_exchange_values_through_shared_memory(between, schedule):
    body = f"st.shared.b32 [%r41], %r1; {between} xor.b32 %r6, %r1, 32; mad.lo.u32 %r6, %r6, 4, %r40;"
    out, report = launch(body + "ld.shared.b32 %r5, [%r6]; st.global.b32 [%d7], %r5;", schedule, uninit=False)
    assert bool(report.races) != bool(between)
    assert kinds(report) <= {("write-read", "shared", "cta"), ("read-write", "shared", "cta")}
    if between:
        assert (out[:64] == np.arange(64) ^ 32).all()


def test_a_race_names_both_accesses(schedule):
    _, report = launch(GLOBAL.format(OTHER_WARP, "%d8"), schedule)
    race = report.races[0]
    text = str(race)
    assert "CTA 0 thread" in text and "st.global.b32 [%d7], %r1" in text and "ld.global.b32 %r5, [%d8]" in text
    assert sum(race.times for race in report.races) > 30 and "granule" in text


def test_lanes_of_a_warp_race_where_asked(schedule):
    other = "xor.b32 %r6, %r1, 1; mad.wide.u32 %d8, %r6, 4, %d2; {}"
    for barrier, options, races in (
        ("", {}, 0), ("", {"races": "warp"}, 1), ("bar.warp.sync -1;", {"races": "warp"}, 0),
        ("bar.sync 0;", {"races": "warp"}, 0),
    ):  # fmt: skip
        _, report = launch(GLOBAL.format(other.format(barrier), "%d8"), schedule, **options)
        assert bool(report.races) == races and kinds(report) <= {("write-read", "global out", "warp")}
    # a lane's own accesses are in order
    assert not launch(GLOBAL.format("", "%d7"), schedule, races="warp")[1].races


def test_a_store_over_what_others_still_read(schedule):
    body = OTHER_WARP + "ld.global.b32 %r5, [%d8]; {} st.global.b32 [%d7], %r1;"
    _, report = launch(body.format(""), schedule)
    assert kinds(report) <= {("read-write", "global out", "cta"), ("write-read", "global out", "cta")} and report.races
    assert not launch(body.format("bar.sync 0;"), schedule)[1].races


@pytest.mark.parametrize("value", ["%r1", "5"])
def test_two_warps_write_one_place(value, schedule):
    """The same value from all is no race: what stands there does not depend on the order."""
    body = f"and.b32 %r6, %r1, 31; mad.wide.u32 %d8, %r6, 4, %d2; st.global.b32 [%d8], {value};"
    _, report = launch(body, schedule)
    assert kinds(report) == ({("write-write", "global out", "cta")} if value == "%r1" else set())
    ordered = f"@%p2 {body.split(';')[2]}; bar.sync 0; @!%p2 {body.split(';')[2]};"
    _, report = launch(";".join(body.split(";")[:2]) + ";" + ordered, schedule)
    assert not report.races


def test_lanes_of_one_instruction_that_write_one_place_are_noted(schedule):
    body = "shr.u32 %r6, %r1, 1; mad.wide.u32 %d8, %r6, 4, %d2; st.global.b32 [%d8], {};"
    out, report = launch(body.format("%r1"), schedule)
    assert not report.races and {note.scope for note in report.notes} == {"lanes"}
    assert (out[:32] // 2 == np.arange(32)).all() and (out[:32] % 2 == 1).all() == (schedule.seed is None)
    assert not launch(body.format("%r6"), schedule)[1].notes
    # a GPU has one NaN: whose it is makes no difference
    nan = "add.u32 %r7, %r1, 2143289344; " + body.format("%r7")
    assert not launch(nan, schedule)[1].notes


def test_programs_write_one_place(schedule):
    for value, races in (("%r4", {("write-write", "global out", "grid")}), ("%r1", set())):
        assert kinds(launch(f"st.global.b32 [%d7], {value};", schedule, 4)[1]) == races
    assert not launch("st.global.b32 [%d6], %r4;", schedule, 4)[1].races


LAST = """st.global.b32 [%d4], %r4; {before} mov.u32 %r7, 0;
    @%p1 atom.global.{scope}.{order}.add.u32 %r7, [%d3], 1; @%p1 st.shared.b32 [%r40], %r7; {after}
    ld.shared.b32 %r7, [%r40]; add.u32 %r7, %r7, 1; setp.eq.u32 %p6, %r7, %r3; @!%p6 bra end;
    mov.u32 %r8, 0; mov.u32 %r9, 0; mov.u64 %d8, %d5;
    again: ld.global.b32 %r10, [%d8]; add.u32 %r9, %r9, %r10; add.u64 %d8, %d8, 256; add.u32 %r8, %r8, 1;
    setp.lt.u32 %p7, %r8, %r3; @%p7 bra again; st.global.b32 [%d7], %r9; end: ret;"""


@pytest.mark.parametrize(
    "change, right",
    [
        ({}, True), ({"scope": "sys"}, True), ({"order": "relaxed"}, False), ({"order": "acquire"}, False),
        ({"order": "release"}, False), ({"before": ""}, False), ({"after": ""}, False), ({"scope": "cta"}, False),
    ],
)  # fmt: skip
def test_the_last_program_to_arrive_sums_what_all_stored(change, right, schedule):
    """The atomic has to release and acquire, for the GPU, after a barrier and before one."""
    parts = {"before": "bar.sync 0;", "after": "bar.sync 0;", "scope": "gpu", "order": "acq_rel"} | change
    out, report = launch(LAST.format(**parts), schedule, 4, uninit=False)
    assert bool(report.races) != right
    if right:
        assert (out[:64] == sum(np.arange(64) + 64 * i for i in range(4))).all()
    elif "after" not in change:
        assert {scope for *_, scope in kinds(report)} == {"grid"}


MESSAGE = """@!%p3 bra reader; @%p1 st.global.b32 [%d2], 5; {between} @%p1 st.{store}.gpu.global.b32 [%d3], 1; bra end;
    reader: @!%p1 bra over; again: ld.{load}.gpu.global.b32 %r7, [%d3]; setp.eq.u32 %p6, %r7, 0; @%p6 bra again;
    over: {after} {who} ld.global.b32 %r8, [%d2]; {who} st.global.b32 [%d6], %r8; end: ret;"""


@pytest.mark.parametrize(
    "change, right",
    [
        ({}, True), ({"store": "relaxed"}, False), ({"load": "relaxed"}, False),
        # only the thread that acquired has heard, until a barrier
        ({"after": "bar.sync 0;", "who": ""}, True), ({"after": "", "who": ""}, False),
    ],
)  # fmt: skip
def test_a_message_from_one_program_to_another(change, right, schedule):
    parts = {"between": "", "store": "release", "load": "acquire", "after": "", "who": "@%p1"} | change
    out, report = launch(MESSAGE.format(**parts), schedule, 2, cooperative=True)
    assert bool(report.races) != right, report.races
    if right:
        assert out[64] == 5


def test_a_message_by_way_of_a_third_program(schedule):
    """What the first released, the second hands on by an acquire and a release: causality is cumulative."""
    body = """@!%p1 bra end; @%p3 bra first; @%p4 bra second;
        spin: ld.acquire.gpu.global.b32 %r7, [%d3+4]; setp.eq.u32 %p6, %r7, 0; @%p6 bra spin;
        ld.global.b32 %r8, [%d2]; st.global.b32 [%d2+4], %r8; bra end;
        first: st.global.b32 [%d2], 5; st.release.gpu.global.b32 [%d3], 1; bra end;
        second: ld.{}.gpu.global.b32 %r7, [%d3]; setp.eq.u32 %p6, %r7, 0; @%p6 bra second;
        st.release.gpu.global.b32 [%d3+4], 1; end: ret;"""
    out, report = launch(body.format("acquire"), schedule, 3, cooperative=True)
    assert out[1] == 5 and not report.races
    assert launch(body.format("relaxed"), schedule, 3, cooperative=True)[1].races


def test_what_several_programs_release_by_atomics_adds_up(schedule):
    """An atomic continues what was released at its place before, whether it acquires or not."""
    body = """@!%p1 bra end; @%p5 bra last; st.global.b32 [%d6], 5;
        atom.global.gpu.release.add.u32 %r7, [%d3], 1; bra end;
        last: atom.global.gpu.acquire.add.u32 %r7, [%d3], 0; setp.ne.u32 %p6, %r7, 2; @%p6 bra last;
        ld.global.b32 %r8, [%d2]; ld.global.b32 %r9, [%d2+256]; add.u32 %r8, %r8, %r9; st.global.b32 [%d6], %r8;
        end: ret;"""
    out, report = launch(body, schedule, 3, cooperative=True)
    assert out[128] == 10 and not report.races
    assert launch(body.replace("release", "relaxed"), schedule, 3, cooperative=True)[1].races


@pytest.mark.parametrize("store", ["relaxed", "release"])
def test_a_store_ends_what_was_released_at_its_place(store):
    """In order of the programs, so that the second acquires from the second store."""
    body = f"""@!%p1 bra end; @!%p3 bra reader; st.global.b32 [%d2], 5; st.release.gpu.global.b32 [%d3], 1;
        st.{store}.gpu.global.b32 [%d3], 2; bra end; reader: ld.acquire.gpu.global.b32 %r7, [%d3];
        ld.global.b32 %r8, [%d2]; st.global.b32 [%d6], %r8; end: ret;"""
    _, report = launch(body, Options(), 2)
    assert bool(report.races) == (store == "relaxed")


@pytest.mark.parametrize("readers", ["%p2", "%p8"])
def test_a_thread_releases_its_own_reads_only(readers, schedule):
    """Another program stores over what was read: by the thread that released, or by others too."""
    body = f"""setp.eq.u32 %p8, %r1, 31; @!%p3 bra writer; @{readers} ld.global.b32 %r5, [%d2];
        @%p8 st.release.gpu.global.b32 [%d3], 1; bra end; writer: @!%p1 bra end;
        again: ld.acquire.gpu.global.b32 %r7, [%d3]; setp.eq.u32 %p6, %r7, 0; @%p6 bra again;
        st.global.b32 [%d2], 5; end: ret;"""
    _, report = launch(body, schedule, 2, cooperative=True)
    assert kinds(report) == ({("read-write", "global out", "grid")} if readers == "%p2" else set())


def test_a_store_that_changes_nothing_does_not_race_with_loads_before_it():
    body = "@%p3 ld.global.b32 %r5, [%d2]; @%p4 st.global.b32 [%d2], {};"
    assert not launch(body.format(0), Options(), 2)[1].races
    assert kinds(launch(body.format(1), Options(), 2)[1]) == {("read-write", "global out", "grid")}


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses(schedule):
    atomic = "@%p1 atom.global.gpu.relaxed.add.u32 %r7, [%d3], 1;"
    assert not launch(atomic, schedule, 4)[1].races
    assert not launch(atomic + "ld.relaxed.gpu.global.b32 %r8, [%d3];", schedule, 4)[1].races
    _, report = launch(atomic + "ld.global.b32 %r8, [%d3];", schedule, 4)
    assert any(scope == "grid" for *_, scope in kinds(report))
    _, report = launch(atomic + "@%p1 st.global.b32 [%d3], %r4;", schedule, 4)
    assert any(scope == "grid" for *_, scope in kinds(report))


def test_a_copy_is_for_the_thread_that_waited_until_a_barrier(schedule):
    body = """cp.async.ca.shared.global [%r41], [%d4], 4; cp.async.wait_all; {} xor.b32 %r6, %r1, 32;
        mad.lo.u32 %r6, %r6, 4, %r40; ld.shared.b32 %r5, [%r6]; st.global.b32 [%d7], %r5;"""
    out, report = launch(body.format("bar.sync 0;"), schedule)
    assert not report.races and (out[:64] == np.arange(64) ^ 32).all()
    assert launch(body.format(""), schedule, uninit=False)[1].races


def test_programs_that_share_a_column_of_what_is_known(monkeypatch, schedule):
    """Of many programs only the last that read is known; a race with it is found still."""
    monkeypatch.setattr("ptx.shadow._MOST", 1)
    body = "ld.global.b32 %r5, [%d2]; @%p1 st.global.b32 [%d2], %r4;"
    assert launch(body, schedule, 4)[1].races
    assert not launch("ld.global.b32 %r5, [%d2]; st.global.b32 [%d6+1024], %r5;", schedule, 4)[1].races


@pytest.mark.parametrize("resident", [None, 1, 3])
def test_all_schedules_give_the_same_bits(resident):
    """A sum in a fixed order of floats, by the last program to arrive; with atomics, the order shows."""
    results = set()
    parts = {"before": "bar.sync 0;", "after": "bar.sync 0;", "scope": "gpu", "order": "acq_rel"}
    for schedule in SCHEDULES:
        results.add(launch(LAST.format(**parts), schedule, 4, resident=resident)[0].tobytes())
    assert len(results) == 1
    orders = set()
    for seed in range(8):
        body = "@%p1 atom.global.gpu.relaxed.add.u32 %r7, [%d3], 1; @%p1 st.global.b32 [%d6], %r7;"
        orders.add(launch(body, Options(seed=seed), 4, resident=resident)[0].tobytes())
    assert len(orders) > 2


def test_options_are_checked():
    with pytest.raises(ValueError, match='races must be "off", "cta" or "warp"'):
        Options(races="all")


def test_conflicts_of_banks_are_counted():
    for stride, passes in ((4, 0), (8, 2), (128, 62), (0, 0)):
        body = f"mad.lo.u32 %r6, %r1, {stride}, %r40; and.b32 %r6, %r6, 4095; st.shared.b32 [%r6], 1;"
        ptx = entry(START + body, ["x", "out", "flags"], threads=64, shared=8192)
        data = {name: np.zeros(512, np.uint32) for name in ("x", "out", "flags")}
        report = run(ptx.replace("4095", "8191"), data, Options(counts=True))
        assert report.conflicts[4] == passes
    assert not run(ptx, data, Options()).conflicts
