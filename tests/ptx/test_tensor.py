"""Matrix instructions: fragments as PTX's manual lays them out, and sums as tensor cores make them."""

import numpy as np
import pytest

from .errors import Fault
from .forms import EFFECTS, expand
from .harness import entry, run
from .options import Options

COVERED = [form for form in EFFECTS if form.startswith(("<ldmatrix", "mma", "wgmma", "fence"))]
SHAPES = [opcode for form in COVERED if form.startswith("wgmma.mma_async") for opcode in expand(form)]


def names(letter, first, count):
    return "{" + ", ".join(f"%{letter}{first + i}" for i in range(count)) + "}"


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_ldmatrix_and_stmatrix(count, trans, space):
    """Lane 4 r + c of a matrix has the elements 2 c and 2 c + 1 of row r; rows lie where lanes 0 to 7 point."""
    suffix = f"sync.aligned.m8n8.x{count}{'.trans' * trans}.{space}.b16"
    x = np.random.default_rng(count).permutation(count * 64).astype(np.uint16)
    held, back = np.zeros((32, count), np.uint32), np.zeros_like(x)
    body = "mov.u32 %r40, %tid.x; mov.u32 %r42, smem; ld.param.u64 %d1, [x]; ld.param.u64 %d2, [held];"
    body += "ld.param.u64 %d3, [back]; mad.wide.u32 %d4, %r40, 16, %d1; mad.lo.u32 %r43, %r40, 16, %r42;"
    body += f"setp.lt.u32 %p1, %r40, {8 * count}; @%p1 ld.global.v4.b32 {names('r', 10, 4)}, [%d4];"
    body += f"@%p1 st.shared.v4.b32 [%r43], {names('r', 10, 4)}; ldmatrix.{suffix} {names('r', 1, count)}, [%r43];"
    body += f"mad.wide.u32 %d5, %r40, {4 * count}, %d2; mad.lo.u32 %r44, %r40, 16, %r42; add.u32 %r44, %r44, 512;"
    body += "".join(f"st.global.b32 [%d5+{4 * i}], %r{1 + i};" for i in range(count))
    body += f"stmatrix.{suffix} [%r44], {names('r', 1, count)}; mad.wide.u32 %d6, %r40, 16, %d3;"
    body += f"@%p1 ld.shared.v4.b32 {names('r', 20, 4)}, [%r44]; @%p1 st.global.v4.b32 [%d6], {names('r', 20, 4)};"
    run(entry(body, ["x", "held", "back"], shared=1024), {"x": x, "held": held, "back": back})
    matrices = x.reshape(count, 8, 8)
    for lane in range(32):
        for i in range(count):
            row, column = lane // 4, lane % 4 * 2
            pair = [matrices[i, column + j, row] if trans else matrices[i, row, column + j] for j in (0, 1)]
            assert held[lane, i] == int(pair[0]) | int(pair[1]) << 16
    assert (back == x).all()


def bits(x, kind):
    """Returns float32 values, exact in a type, as its bits."""
    x = np.ascontiguousarray(x, np.float32)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else x.view(np.uint32)


def packed(elements, kind):
    """Returns one or two elements in a register of 32 bits."""
    raw = [int(x) for x in bits(elements, kind)]
    return raw[0] | (raw[1] << 16 if len(raw) > 1 else 0)


def multiply(opcode, a, b, c, options=None):
    """Runs mma on matrices [16, k], [k, 8] and [16, 8] in float32; returns float32 [16, 8]."""
    kind = opcode.split(".")[7]
    depth = a.shape[1]
    step = 1 if kind == "tf32" else 2  # elements of a register
    fragments = np.zeros((32, 10), np.uint32)
    a_count, b_count = depth * 4 // (8 * step), depth * 2 // (8 * step)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(a_count):  # registers go down first: 8 rows further, then to the right
            row, column = group + 8 * (i % 2), thread * step + 4 * step * (i // 2)
            fragments[lane, i] = packed(a[row, column : column + step], kind)
        for i in range(b_count):
            row = thread * step + 4 * step * i
            fragments[lane, 4 + i] = packed(b[row : row + step, group], kind)
        for i in range(4):
            fragments[lane, 6 + i] = packed([c[group + 8 * (i // 2), 2 * thread + i % 2]], "f32")
    out = np.zeros((32, 4), np.float32)
    body = "mov.u32 %r40, %tid.x; ld.param.u64 %d1, [x]; ld.param.u64 %d2, [out]; mad.wide.u32 %d1, %r40, 40, %d1;"
    body += "mad.wide.u32 %d2, %r40, 16, %d2;" + "".join(f"ld.global.b32 %r{i}, [%d1+{4 * i}];" for i in range(10))
    body += f"{opcode} {names('r', 20, 4)}, {names('r', 0, a_count)}, {names('r', 4, b_count)}, {names('r', 6, 4)};"
    body += f"st.global.v4.b32 [%d2], {names('r', 20, 4)};"
    run(entry(body, ["x", "out"]), {"x": fragments, "out": out}, options)
    result = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for i in range(4):
            result[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = out[lane, i]
    return result


@pytest.mark.parametrize("opcode", [opcode for form in COVERED if form.startswith("mma") for opcode in expand(form)])
def test_mma(opcode):
    """On integers, whose sums are exact."""
    depth, rng = int(opcode.split(".")[3].split("k")[1]), np.random.default_rng(0)
    a, b, c = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    assert (multiply(opcode, a, b, c) == a @ b + c).all()


def row_of(products, added, opcode="mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", truncates=True):
    """Returns what a tensor core makes of one sum of products with 1, and of its negative."""
    depth = int(opcode.split(".")[3].split("k")[1])
    a, b, c = (np.zeros(shape, np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    a[0, : len(products)], a[9, : len(products)], b[:, 3] = products, [-x for x in products], 1
    c[0, 3], c[9, 3] = added, -added
    out = multiply(opcode, a, b, c, Options(truncates=truncates))
    assert out[0, 3] == -out[9, 3] and np.count_nonzero(out) == 2 * (out[0, 3] != 0)
    return float(out[0, 3])


LAST = 2.0**-23  # the last place of 1 in float32


@pytest.mark.parametrize(
    "products, added, cut, near",
    [
        ([1, LAST / 2], 0, 1, 1),
        ([1, LAST / 2, LAST / 2], 0, 1 + LAST, 1 + LAST),  # exact within a chunk
        ([1, LAST / 2, LAST / 4], 0, 1, 1 + LAST),
        ([LAST * 0.75], 1, 1, 1 + LAST),
        ([1, -LAST / 4], 0, 1 - LAST / 2, 1),
        ([1, -1, LAST / 4], 0, LAST / 4, LAST / 4),  # what cancels leaves what is small
        ([2.0**-14, 2.0**-24], 1, 1 + 2.0**-14, 1 + 2.0**-14),
        ([0.5] * 16, LAST, 8, 8),
        ([0.5] * 16, 8 + 8 * LAST, 16, 16),  # cut here, a tie there
    ],
)
def test_sums_are_cut_toward_zero(products, added, cut, near):
    """Both signs; without truncation, they are rounded to nearest even."""
    assert row_of(products, added) == np.float32(cut)
    assert row_of(products, added, truncates=False) == np.float32(near)


def test_tf32_reads_nineteen_bits():
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    assert row_of([1 + 2.0**-10, 1 + 2.0**-11], 0, opcode) == 2 + 2.0**-10


def tiles(x, kind):
    """Returns an operand [rows, depth] in shared memory without swizzle: 8 rows of 16 bytes lie together.

    Those of neighbours along the depth follow each other, and then those of the next rows.
    """
    raw = bits(x, kind)
    per = 16 // raw.itemsize
    rows, depth = raw.shape
    return raw.reshape(rows // 8, 8, depth // per, per).transpose(0, 2, 1, 3).copy().view(np.uint32).ravel()


def wgmma(opcode, a, b, c, *, fence=True, copy=False, registers=False, wait="0", keep=1, seed=None, after=""):
    """Runs a product of a warp group; returns the result and the report."""
    kind, columns, depth = opcode.split(".")[6], b.shape[1], a.shape[1]
    left, right = tiles(a, kind), tiles(b.T, kind)
    data, count = np.concatenate([left, right]), columns // 2
    out = np.zeros((128, count), np.float32)
    start = np.zeros((128, count), np.float32)
    for thread in range(128):
        lane, warp = thread % 32, thread // 32
        for i in range(count):
            row, column = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
            start[thread, i] = c[row, column]
    body = "mov.u32 %r280, %tid.x; mov.u32 %r281, smem; ld.param.u64 %d1, [data]; ld.param.u64 %d2, [out];"
    body += "ld.param.u64 %d3, [start];"
    for first in range(0, len(data), 512):  # 16 bytes a thread at a time
        body += (
            f"mad.wide.u32 %d4, %r280, 16, %d1; mad.lo.u32 %r282, %r280, 16, %r281; add.u32 %r283, %r280, {first // 4};"
        )
        body += f"setp.lt.u32 %p1, %r283, {len(data) // 4};"
        if copy:
            body += f"@%p1 cp.async.cg.shared.global [%r282+{4 * first}], [%d4+{4 * first}], 16;"
        else:
            body += f"@%p1 ld.global.v4.b32 {names('r', 0, 4)}, [%d4+{4 * first}];"
            body += f"@%p1 st.shared.v4.b32 [%r282+{4 * first}], {names('r', 0, 4)};"
    body += "cp.async.wait_all;" * copy + "fence.proxy.async.shared::cta;" * fence + "bar.sync 0;"
    body += f"mad.wide.u32 %d4, %r280, {4 * count}, %d3; mad.wide.u32 %d5, %r280, {4 * count}, %d2;"
    body += "".join(f"ld.global.b32 %r{i}, [%d4+{4 * i}];" for i in range(count))
    # start in the lowest bits, then the bytes to the next tile along the depth and to the next 8 rows, all by 16
    step = 128 * (depth * (4 if kind == "tf32" else 2) // 16)
    fixed = (128 >> 4) << 16 | (step >> 4) << 32
    body += f"mov.b64 %d6, {fixed}; mov.b64 %d7, {fixed | (4 * len(left)) >> 4}; setp.eq.u32 %p2, {keep}, 1;"
    first = "%d6"
    if registers:
        body += "shr.u32 %r290, %r280, 5; and.b32 %r291, %r280, 15; mov.u32 %r292, %r281;"
        body += f"and.b32 %r293, %r280, 16; mad.lo.u32 %r292, %r290, {2 * step}, %r292;"
        body += "and.b32 %r294, %r291, 7; mad.lo.u32 %r292, %r294, 16, %r292; shr.u32 %r294, %r291, 3;"
        body += f"mad.lo.u32 %r292, %r294, {step}, %r292; mad.lo.u32 %r292, %r293, 8, %r292;"
        body += f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {names('r', 270, 4)}, [%r292];"
        first = names("r", 270, 4)
    flags = "" if kind == "tf32" else ", 0" if registers else ", 0, 0"
    body += f"wgmma.fence.sync.aligned; {opcode} {names('r', 0, count)}, {first}, %d7, %p2, 1, 1{flags};"
    body += f"wgmma.commit_group.sync.aligned; {after} wgmma.wait_group.sync.aligned {wait};"
    body += "".join(f"st.global.b32 [%d5+{4 * i}], %r{i};" for i in range(count))
    tensors = {"data": data, "out": out, "start": start}
    report = run(entry(body, list(tensors), threads=128, shared=4 * len(data)), tensors, Options(seed=seed))
    result = np.zeros_like(c)
    for thread in range(128):
        lane, warp = thread % 32, thread // 32
        for i in range(count):
            row, column = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
            result[row, column] = out[thread, i]
    return result, report


def operands(opcode):
    columns, depth = (int(part) for part in opcode.split(".")[4][4:].split("k"))
    rng = np.random.default_rng(columns)
    return [rng.integers(-9, 10, shape).astype(np.float32) for shape in ((64, depth), (depth, columns), (64, columns))]


@pytest.mark.parametrize(
    "opcode",
    [one if any(f"m64n{n}k" in one for n in (8, 40)) else pytest.param(one, marks=pytest.mark.slow) for one in SHAPES],
)
def test_wgmma(opcode):
    a, b, c = operands(opcode)
    for seed in (None, 1):
        out, report = wgmma(opcode, a, b, c, seed=seed)
        assert (out == a @ b + c).all() and report.classes[opcode] == 4 and not report.races and not report.notes
    assert (wgmma(opcode, a, b, c, keep=0)[0] == a @ b).all()


PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"


def test_wgmma_takes_its_left_operand_from_registers():
    a, b, c = operands(PRODUCT)
    assert (wgmma(PRODUCT, a, b, c, registers=True)[0] == a @ b + c).all()


def test_wgmma_reads_what_was_fenced():
    a, b, c = operands(PRODUCT)
    with pytest.raises(Fault, match=r"without fence.proxy.async: @%p1 st.shared.v4.b32"):
        wgmma(PRODUCT, a, b, c, fence=False)
    out, report = wgmma(PRODUCT, a, b, c, fence=False, copy=True)  # a note only
    assert (out == a @ b + c).all() and {note.kind for note in report.notes} == {"copy-unfenced read"}
    assert not wgmma(PRODUCT, a, b, c, copy=True)[1].notes


def test_results_of_wgmma_are_there_after_the_wait():
    a, b, c = operands(PRODUCT)
    for more in ({"wait": "1"}, {"after": "st.global.b32 [%d5], %r0;"}):
        with pytest.raises(Fault, match="reads a register that was never set"):
            wgmma(PRODUCT, a, b, c, **more)


def test_a_wait_for_all_but_one_group_gives_the_results_of_the_others():
    a, b, c = operands(PRODUCT)
    other = "wgmma.fence.sync.aligned; " + "".join(f"mov.b32 %r{i}, 0;" for i in range(200, 204))
    other += f"{PRODUCT} {names('r', 200, 4)}, %d6, %d7, %p2, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"
    assert (wgmma(PRODUCT, a, b, c, after=other, wait="1")[0] == a @ b + c).all()


def test_a_register_that_a_later_group_writes_is_there_when_that_one_was_waited_for():
    a, b, c = operands(PRODUCT)
    again = f"{PRODUCT} {names('r', 0, 4)}, %d6, %d7, %p2, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"
    assert (wgmma(PRODUCT, a, b, c, after=again)[0] == 2 * a @ b + c).all()
    with pytest.raises(Fault, match="reads a register that was never set"):
        wgmma(PRODUCT, a, b, c, after=again, wait="1")


def test_memory_is_not_overwritten_before_wgmma_is_waited_for():
    a, b, c = operands(PRODUCT)
    with pytest.raises(Fault, match="without fence"):
        wgmma(PRODUCT, a, b, c, after="st.shared.b32 [%r281], %r280;")
