"""PTX that the emulator does not know, or that is no PTX, raises with its text."""

import re

import numpy as np
import pytest

from .errors import Unknown
from .forms import opcodes
from .harness import entry, run
from .parse import Address, Immediate, Not, Special, parse
from .program import Program


def program(body, pointers=("out",), **options):
    return Program(parse(entry(body, list(pointers), **options)), 32)


@pytest.mark.parametrize(
    "line",
    [
        "foo.bar %r1;", "sad.u32 %r1, %r2, %r3, %r4;", "activemask.b32 %r1;", "bar.red.popc.u32 %r1, 0, %p1;",
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", "mbarrier.inval.shared.b64 [%r1];",
        # of known instructions, forms that are not
        "add.rz.f32 %r1, %r2, %r3;", "add.rn.sat.ftz.f32 %r1, %r2, %r3;", "add.cc.u32 %r1, %r2, %r3;",
        "add.sat.s32 %r1, %r2, %r3;", "fma.rn.relu.f16 %h1, %h2, %h3, %h4;", "mul.f16x4 %r1, %r2, %r3;",
        "mul.u32 %r1, %r2, %r3;", "cvt.rn.satfinite.tf32.f32 %r1, %r2;", "cvt.rn.relu.bf16.f32 %h1, %r2;",
        "cvt.f32.s32 %r1, %r2;", "cvt.rm.f32.f64 %r1, %d2;", "div.rz.f32 %r1, %r2, %r3;",
        "prmt.b32.f4e %r1, %r2, %r3, 0;",
        "min.xorsign.abs.f32 %r1, %r2, %r3;", "setp.lt.f16x2 %p1, %r2, %r3;", "setp.foo.f32 %p1, %r2, %r3;",
        "ld.volatile.global.b32 %r1, [%d1];", "ld.global.v8.b32 {%r1, %r2}, [%d1];", "ld.b32 %r1, [%d1];",
        "ld.local.b32 %r1, [%d1];", "ld.global.L2::cache_hint.b32 %r1, [%d1], %d2;", "st.b32 [%d1], %r1;",
        "atom.global.add.u32 %r1, [%d1], 1;", "atom.global.gpu.acq_rel.add.f16 %h1, [%d1], %h2;",
        "shfl.bfly.b32 %r1, %r2, 1, 31;", "shfl.sync.bfly.b64 %d1, %d2, 1, 31, -1;", "vote.sync.any.b32 %r1, %p1, -1;",
        "bar.arrive 0, 64;", "barrier.cluster.arrive;", "fence.acq_rel.gpu;", "membar.gl;",
        "cp.async.bulk.commit_group;", "cp.async.ca.global.shared [%d1], [%r1], 16;",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r3, %r4, %r5, %r6}, {%r7, %r8}, {%r9, %r10};",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r3];",
        "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r1, %r2}, %d1, %d2, 1, 1, 1, 0, 0;",
    ],
)  # fmt: skip
def test_unknown_instructions_and_forms(line):
    with pytest.raises(Unknown, match=re.escape(line.rstrip(";"))):
        program(line)


@pytest.mark.parametrize(
    "line",
    [
        "add.u32 %r1, %r2;", "add.u32 %r1, %r2, %r3, %r4;", "mov.b32 %r1;", "bar.sync 0, 64;", "bar.sync 1;",
        "bar.sync;", "setp.lt.u32 %p1|%p2, %r1, %r2;", "add.u32 %r1, %r2, !%p1;", "selp.b32 %r1, %r2, %r3, !%p1;",
        "add.u32 5, %r1, %r2;", "add.u32 %r1, %r2, [%r3];", "add.u32 %r1, %r2, {%r3, %r4};",
        "add.u32 %r1, %d2, %r3;", "add.u64 %d1, %d2, %r3;", "selp.b32 %r1, %r2, %r3, %r4;", "cvt.f64.f32 %d1, %h1;",
        "ld.global.b32 %r1, %d1;", "ld.global.b32 %r1, [%r1];", "ld.shared.b32 %r1, [%d1];",
        "ld.global.v2.b32 %r1, [%d1];", "ld.global.v2.b32 {%r1, %r2, %r3}, [%d1];",
        "st.global.v4.b32 [%d1], {%r1, %r2};",
        "ld.param.b32 %r1, [missing];", "ld.param.b32 %r1, [out];", "ld.param.u64 %d1, [out+8];",
        "mov.b64 %d1, {%r1, %h1};", "mov.b32 {%h1, %h2, %h3}, %r1;", "shfl.sync.up.b32 %r1|%p1|%p2, %r2, 1, 0, -1;",
        "cp.async.ca.shared.global [%r1], [%d1], 12;", "cp.async.cg.shared.global [%r1], [%d1], 4;",
        "cp.async.ca.shared.global [%r1], [%d1], %r2;", "cp.async.wait_group %r1;",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r5];",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r7, %r8}, {%r1, %r2};",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %d1, %d2, 1, -1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2}, %d1, %d2, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %d1, %d2, 1, 1, 1, 0;",
        "wgmma.wait_group.sync.aligned %r1;",
    ],
)  # fmt: skip
def test_operands_that_do_not_fit(line):
    with pytest.raises(Unknown, match=re.escape(line.rstrip(";"))):
        program(line)


@pytest.mark.parametrize("line", ["add.u32 %r1, %r2, %x3;", "mov.u32 %r1, %lanemask_lt;", "mov.u32 %r1, nothing;"])
def test_registers_that_nobody_declared(line):
    with pytest.raises(Unknown, match=r"no register (%x3|%lanemask_lt|nothing)"):
        program(line)


def test_predicates_labels_and_scopes():
    with pytest.raises(Unknown, match="no register %q"):
        program("@%q bra end; end: ret;")
    with pytest.raises(Unknown, match="bra nowhere: no such label"):
        program("bra nowhere;")
    with pytest.raises(Unknown, match="label here stands twice"):
        program("here: mov.u32 %r1, 0; here: ret;")
    with pytest.raises(Unknown, match="no register t"):
        program("{ .reg .b32 t; mov.u32 t, 0; } mov.u32 %r1, t;")
    assert program("{ .reg .b32 t; mov.u32 t, 0; { .reg .b32 t; mov.u32 t, 1; } mov.u32 %r1, t; }").widths


def test_modules_without_what_they_need():
    good = entry("ret;", ["out"])
    for pattern, other, message in (
        (r"\.entry test", ".func test", "0 entries"),
        (r"\.reqntid 32", "", "not given by .reqntid"),
        (r"\.reqntid 32", ".reqntid 33", "multiple of 32"),
        (r"\.reqntid 32", ".reqntid 32, 2", "multiple of 32"),
        (r"1 out", "1 out[4]", r"parameter .*out\[4\]"),
        (r"\.u64 \.ptr", ".v4 .ptr", "parameter"),
        (r"\}\n$", "", "without an end"),
        (r"\.reg \.b16", ".reg .b128", "registers of type b128"),
    ):
        with pytest.raises(Unknown, match=message):
            parse(re.sub(pattern, other, good))
    with pytest.raises(Unknown, match="2 entries"):
        parse(good + good)
    with pytest.raises(Unknown, match="0 entries"):
        parse("")
    with pytest.raises(Unknown, match="address"):
        parse(entry("ld.global.b32 %r1, [%d1 * 4];", ["out"]))


def test_what_is_read():
    kernel = parse(
        """
.version 8.4 // comment
.file 1 "kernel.py"
.extern .shared .align 16 .b8 dynamic[];
.shared .align 8 .b8 one[12];
.shared .align 16 .b32 two[3];
.visible .entry name(
    .param .u64 .ptr .global .align 1 name_param_0, // a pointer
    .param .f32 name_param_1
)
.maxntid 64
.reqntid 64, 1, 1
{
    .reg .pred %p<2>; .reg .b32 %r<3>, single;
    .loc 1 7 3, function_name $L__info, inlined_at 1 9 1
$L__begin: /* more
    than one line */ @!%p1 bra.uni $L__begin;
    add.u32 %r2, single, -0x10; ld.shared.b32 %r1, [%r2+-8];
    setp.lt.and.u32 %p0, %r1, 3, !%p1; mov.u32 %r0, two; { .reg .b16 %h; mov.b32 {%h, _}, %r0; }
}
"""
    )
    assert kernel.name == "name" and kernel.threads == 64 and [name for name, _ in kernel.params][1] == "name_param_1"
    assert kernel.shared == {"dynamic": 0, "one": 0, "two": 16} and kernel.static == 28
    assert [one.opcode for one in kernel.code] == [
        "bra.uni", "add.u32", "ld.shared.b32", "setp.lt.and.u32", "mov.u32", "mov.b32", "ret",
    ]  # fmt: skip
    branch, add, load, compare, move, apart, _ = kernel.code
    assert branch.target == 0 and branch.predicate == 1 and branch.negated and branch.leader and add.leader
    assert branch.place == "kernel.py:7 (from kernel.py:9)"
    assert add.args == [4, 5, Immediate(-16)] and load.args == [3, Address(4, -8)]
    assert compare.args[3] == Not(1) and move.args[1] == Special("two") and apart.args[0] == [6, None]
    assert [dtype.itemsize for dtype in kernel.widths] == [1, 1, 4, 4, 4, 4, 2]


def test_comments_and_several_lines_are_one_instruction():
    out = np.zeros(32, np.uint32)
    body = """ld.param.u64 %d1, [out]; // the address; of the result
        mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4,
            %d1;
        st.global.b32 [ %d1 + 0 ], { %r1 };"""
    run(entry(body, ["out"]), {"out": out})
    assert (out == np.arange(32)).all()


def test_there_are_no_opcodes_without_a_name():
    assert all(re.fullmatch(r"[a-z0-9_.:NLBa]+", opcode) for opcode in opcodes())
    assert len(opcodes()) > 1000
