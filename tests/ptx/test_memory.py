"""Loads, stores, atomics and copies, against numpy."""

import numpy as np
import pytest

from .forms import EFFECTS, expand
from .harness import entry, register, run
from .options import Options
from .parse import TYPES

LOADS = [form for form in EFFECTS if form.startswith(("ld.", "<ld st>"))]
STORES = [form for form in EFFECTS if form.startswith(("st.", "<ld st>"))]
ATOMICS = [form for form in EFFECTS if form.startswith(("atom.", "red."))]
MOVES = [form for form in EFFECTS if form.startswith("mov.")]
COPIES = [form for form in EFFECTS if form.startswith("cp.async")]
COVERED = [*LOADS, *STORES, *ATOMICS, *MOVES, *COPIES]

WHERE = "mov.u32 %r40, %tid.x; ld.param.u64 %d20, [x]; ld.param.u64 %d21, [out];"
SHARED = "mov.u32 %r42, smem;"


def opcodes(forms, first):
    return [opcode for form in forms for opcode in expand(form) if opcode.split(".")[0] == first]


def lanes(opcode):
    """Returns the elements of an access, bytes of one, and their registers."""
    kind, parts = opcode.split(".")[-1], opcode.split(".")
    count = next((int(part[1]) for part in parts if part in ("v2", "v4")), 1)
    names = [register(kind, i) for i in range(count)]
    return count, TYPES[kind].itemsize, names[0] if count == 1 else "{" + ", ".join(names) + "}"


@pytest.mark.parametrize("first", ["ld", "st"])
def test_each_load_and_store_moves_its_elements(first):
    """The instruction under test is a load or a store; the other way goes byte by byte."""
    for opcode in opcodes(LOADS if first == "ld" else STORES, first):
        if "param" in opcode:
            continue
        count, width, names = lanes(opcode)
        size, shared = count * width, ".shared" in opcode
        x = np.random.default_rng(size).integers(0, 256, 32 * size).astype(np.uint8)
        out = np.zeros_like(x)
        through = [f"mad.lo.u32 %r41, %r40, {size}, %r42;" if shared else f"mad.wide.u32 %d22, %r40, {size}, %d{{}};"]
        body = [
            WHERE,
            SHARED * shared,
            f"mad.wide.u32 %d23, %r40, {size}, %d20; mad.wide.u32 %d24, %r40, {size}, %d21;",
        ]
        if first == "ld":
            if shared:
                body += [f"ld.global.b8 %h40, [%d23+{i}]; st.shared.b8 [%r41+{i}], %h40;" for i in range(size)]
                body.insert(3, through[0])
                body.append(f"{opcode} {names}, [%r41];")
            else:
                body.append(f"{opcode} {names}, [%d23];")
            body += bytes_to("%d24", count, width, opcode.split(".")[-1])
        else:
            body += bytes_from("%d23", count, width, opcode.split(".")[-1])
            if shared:
                body += [through[0], f"{opcode} [%r41], {names};"]
                body += [f"ld.shared.b8 %h40, [%r41+{i}]; st.global.b8 [%d24+{i}], %h40;" for i in range(size)]
            else:
                body.append(f"{opcode} [%d24], {names};")
        report = run(entry("\n".join(body), ["x", "out"], shared=shared * 32 * size), {"x": x, "out": out})
        assert report.classes[opcode] == 1 and not report.races
        assert (x == out).all(), opcode


def bytes_to(base, count, width, kind):
    """Returns code that stores registers 0.. byte by byte."""
    code = []
    for i in range(count):
        name = register(kind, i)
        for byte in range(width):
            place = f"[{base}+{i * width + byte}]"
            if width <= 2:
                code.append(f"shr.b16 %h40, {name}, {8 * byte}; st.global.b8 {place}, %h40;")
            elif width == 4:
                code.append(f"shr.b32 %r43, {name}, {8 * byte}; cvt.u16.u32 %h40, %r43; st.global.b8 {place}, %h40;")
            else:
                code.append(f"shr.b64 %d30, {name}, {8 * byte}; cvt.u16.u64 %h40, %d30; st.global.b8 {place}, %h40;")
    return code


def bytes_from(base, count, width, kind):
    """Returns code that loads registers 0.. byte by byte."""
    code = []
    for i in range(count):
        name = register(kind, i)
        letter = {1: "16", 2: "16", 4: "32", 8: "64"}[width]
        part = {"16": "%h41", "32": "%r43", "64": "%d30"}[letter]
        code.append(f"mov.b{letter} {name}, 0;")
        for byte in range(width):
            code.append(f"ld.global.b8 %h40, [{base}+{i * width + byte}];")
            code.append(f"cvt.u{letter}.u16 {part}, %h40; shl.b{letter} {part}, {part}, {8 * byte};")
            code.append(f"or.b{letter} {name}, {name}, {part};")
    return code


@pytest.mark.parametrize("kind, to, negative", [("s8", "h", 0xFF80), ("s16", "r", 0xFFFF8000), ("u8", "r", 0x80)])
def test_loads_into_wider_registers_extend(kind, to, negative):
    x = np.array([1 << 8 * TYPES[kind].itemsize - 1] * 32, f"u{TYPES[kind].itemsize}")
    width = 2 if to == "h" else 4
    out = np.zeros(32, f"u{width}")
    body = f"{WHERE} ld.global.{kind} %{to}1, [%d20]; mad.wide.u32 %d21, %r40, {width}, %d21;"
    run(entry(f"{body} st.global.b{8 * width} [%d21], %{to}1;", ["x", "out"]), {"x": x, "out": out})
    assert (out == negative).all()


def test_each_parameter_is_loaded():
    for opcode in opcodes(LOADS, "ld"):
        if "param" not in opcode:
            continue
        kind = opcode.split(".")[-1]
        width = TYPES[kind].itemsize
        value = 0x8123456789ABCDEF & (1 << 8 * width) - 1
        out = np.zeros(1, f"u{width}")
        body = f"ld.param.u64 %d21, [out]; {opcode} {register(kind, 1)}, [value];"
        body += f"st.global.b{8 * width} [%d21], {register(kind, 1)};"
        ptx = entry(body, ["out"], scalars={"value": kind})
        report = run(ptx, {"out": out}, scalars={"value": value})
        assert out[0] == value and report.classes[opcode]


def test_each_move():
    for opcode in opcodes(MOVES, "mov"):
        kind = opcode.split(".")[-1]
        if kind == "pred":
            body = "setp.lt.u32 %p1, %r40, 5; mov.pred %p0, %p1; selp.b32 %r0, 1, 0, %p0;"
            expected, kind = (np.arange(32) < 5).astype(np.uint32), "u32"
        else:
            width = TYPES[kind].itemsize
            body = f"cvt.u{8 * width}.u32 {register(kind, 1)}, %r40; {opcode} {register(kind, 0)}, {register(kind, 1)};"
            expected = np.arange(32, dtype=f"u{width}")
        width = TYPES[kind].itemsize
        out = np.zeros(32, f"u{width}")
        store = f"mad.wide.u32 %d22, %r40, {width}, %d21; st.global.b{8 * width} [%d22], {register(kind, 0)};"
        report = run(entry(WHERE + body + store, ["x", "out"]), {"x": out.copy(), "out": out})
        assert report.classes[opcode] and (out == expected).all()


def test_moves_take_registers_apart_and_join_them():
    body = """
        mov.u64 %d1, 0x1122334455667788;
        mov.b64 {%r1, %r2}, %d1; mov.b32 {%h1, %h2}, %r1; mov.b64 {%h3, %h4, %h5, %h6}, %d1;
        mov.b32 %r3, {%h2, %h1}; mov.b64 %d2, {%r2, %r3}; mov.b64 %d3, {%h6, %h5, %h4, %h3};
        st.global.v2.b64 [%d21], {%d2, %d3};"""
    out = np.zeros(2, np.uint64)
    run(entry(WHERE + body, ["x", "out"]), {"x": out.copy(), "out": out})
    assert [hex(x) for x in out.tolist()] == ["0x7788556611223344", "0x7788556633441122"]


def test_special_registers():
    names = ["%tid.x", "%tid.y", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%laneid"]
    names += ["%warpid", "%clock", "%smid"]
    body = WHERE + "mov.u32 %r41, %ctaid.x; mov.u32 %r42, %ctaid.y; mov.u32 %r43, %ctaid.z;"
    body += "mad.lo.u32 %r42, %r43, 3, %r42; mad.lo.u32 %r41, %r42, 2, %r41; mad.lo.u32 %r41, %r41, 64, %r40;"
    body += f"mad.wide.u32 %d22, %r41, {4 * len(names)}, %d21;"
    body += "".join(f"mov.u32 %r1, {name}; st.global.b32 [%d22+{4 * i}], %r1;" for i, name in enumerate(names))
    out = np.full((2, 3, 2, 64, len(names)), -1, np.int32)
    run(entry(body, ["x", "out"], threads=64), {"x": out.copy(), "out": out}, grid=(2, 3, 2))
    z, y, x, t = np.indices(out.shape[:4])
    zero = 0 * t
    expected = [t, zero, zero + 64, x, y, z, zero + 2, zero + 3, t % 32, t // 32, zero, x + 2 * (y + 3 * z)]
    assert (out == np.stack(expected, -1)).all()


OPERATIONS = {
    "add": lambda old, x: old + x, "min": min, "max": max, "and": lambda old, x: old & x, "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x, "exch": lambda old, x: x, "inc": lambda old, x: 0 if old >= x else old + 1,
    "dec": lambda old, x: x if old == 0 or old > x else old - 1,
}  # fmt: skip


@pytest.mark.parametrize("form", ATOMICS)
@pytest.mark.parametrize("seed", [None, 3])
def test_atomics(form, seed):
    """Thread by thread: the values that threads get and the one that is left are those of some order of the threads."""
    for opcode in expand(form):
        name, kind = opcode.split(".")[-2:]
        dtype = TYPES[kind]
        rng = np.random.default_rng(1)
        x = (
            rng.integers(1, 9, 33).astype(dtype)
            if dtype.kind == "f"
            else rng.integers(0, 1 << 8 * dtype.itemsize, 33, np.uint64)
        )
        x = x if dtype.kind == "f" else x.astype(f"u{dtype.itemsize}").view(dtype)
        if name == "cas":
            x[:] = rng.integers(0, 4, 33)
        if name in ("inc", "dec"):
            x[:] = rng.integers(3, 9, 33)
        place, out = x[:1].copy(), np.zeros(32, dtype)
        width, shared = dtype.itemsize, ".shared" in opcode
        value, compare, target = register(kind, 1), register(kind, 2), register(kind, 3)
        body = WHERE + f"ld.param.u64 %d25, [place]; mad.wide.u32 %d22, %r40, {width}, %d20;"
        body += f"mad.wide.u32 %d23, %r40, {width}, %d21; ld.global.b{8 * width} {value}, [%d22+{width}];"
        if name == "cas":
            body += f"ld.global.b{8 * width} {compare}, [%d22];"
        where = "%d25"
        if shared:
            where = "%r42"
            body += SHARED + f"ld.global.b{8 * width} {target}, [%d25]; setp.eq.u32 %p1, %r40, 0;"
            body += f"@%p1 st.shared.b{8 * width} [%r42], {target}; bar.sync 0;"
        given = f"{compare}, {value}" if name == "cas" else value
        if opcode.startswith("red"):
            body += f"{opcode} [{where}], {given};"
        else:
            body += f"{opcode} {target}, [{where}], {given}; st.global.b{8 * width} [%d23], {target};"
        if shared:
            body += (
                f"bar.sync 0; ld.shared.b{8 * width} {target}, [%r42]; @%p1 st.global.b{8 * width} [%d25], {target};"
            )
        tensors = {"x": x, "out": out, "place": place}
        report = run(entry(body, list(tensors), shared=16 * shared), tensors, Options(seed=seed))
        assert report.classes[opcode] == 1
        _check_order(name, x, out, place[0], ordered=seed is None, returns=not opcode.startswith("red"))


def _check_order(name, x, out, left, ordered, returns):
    """Replays the threads, in their order or in the one that the values they got show."""
    bits = 8 * x.dtype.itemsize
    real = x.dtype.kind == "f"

    def wrap(number):
        if real:
            return number
        number = int(number) & (1 << bits) - 1
        return number - (1 << bits) if x.dtype.kind == "i" and number >> bits - 1 else number

    def after(old, thread):
        if name == "cas":
            return x[thread + 1].item() if old == x[thread].item() else old
        return wrap(OPERATIONS[name](old, x[thread + 1].item()))

    value, todo = x[0].item(), list(range(32))
    if ordered or not returns:
        for thread in todo:
            assert not returns or out[thread] == value
            value = after(value, thread)
    else:
        order = _some_order(value, todo, out.tolist(), after)
        assert order is not None
        value = order
    assert left == value


def _some_order(value, todo, got, after):
    """Returns what is left after some order in which each thread meets the value that it got, or None.

    Threads that change nothing go first; a value that comes back makes no difference to which thread may go.
    """
    while todo:
        able = [thread for thread in todo if got[thread] == value]
        if not able:
            return None
        idle = [thread for thread in able if after(value, thread) == value]
        thread = (idle or able)[0]
        todo.remove(thread)
        value = after(value, thread)
    return value


@pytest.mark.parametrize("opcode", [one for one in opcodes(COPIES, "cp") if "global" in one])
@pytest.mark.parametrize("wait", ["commit_group; cp.async.wait_group 0", "wait_all"])
def test_copies(opcode, wait):
    """Of zero bytes where the fourth operand asks for that: zeros, and nothing is read."""
    for size in (16,) if "cg" in opcode else (4, 8, 16):
        x = np.random.default_rng(0).integers(0, 1 << 32, 32 * size // 4).astype(np.uint32)
        for used in ("", ", %r44"):
            out = np.zeros_like(x)
            body = WHERE + SHARED + f"mad.lo.u32 %r41, %r40, {size}, %r42; mad.wide.u32 %d22, %r40, {size}, %d20;"
            body += f"setp.lt.u32 %p1, %r40, 16; selp.b32 %r44, {size}, 0, %p1;"
            if used:  # beyond the tensor
                body += "selp.b64 %d23, 0, 4096, %p1; add.u64 %d22, %d22, %d23;"
            body += f"{opcode} [%r41], [%d22], {size}{used}; cp.async.{wait}; mad.wide.u32 %d23, %r40, {size}, %d21;"
            for i in range(0, size, 4):
                body += f"ld.shared.b32 %r1, [%r41+{i}]; st.global.b32 [%d23+{i}], %r1;"
            for seed in (None, 1, 2):
                report = run(entry(body, ["x", "out"], shared=32 * size), {"x": x, "out": out}, Options(seed=seed))
                half = len(x) // 2
                assert (out[:half] == x[:half]).all() and (out[half:] == (0 if used else x[half:])).all()
                assert report.bytes["global read"] == 32 * size // (2 if used else 1)


def test_wait_group_leaves_the_last_groups_open():
    body = WHERE + SHARED + "mad.lo.u32 %r41, %r40, 16, %r42; mad.wide.u32 %d22, %r40, 16, %d20;"
    for i in range(3):
        body += f"cp.async.ca.shared.global [%r41+{512 * i}], [%d22+{512 * i}], 16; cp.async.commit_group;"
    body += "cp.async.wait_group 1; mad.wide.u32 %d23, %r40, 4, %d21;"
    x, out = np.arange(384, dtype=np.uint32), np.zeros(32, np.uint32)
    for i in range(3):
        ptx = entry(
            body + f"ld.shared.b32 %r1, [%r41+{512 * i}]; st.global.b32 [%d23], %r1;", ["x", "out"], shared=1536
        )
        if i < 2:
            run(ptx, {"x": x, "out": out})
            assert (out == x[128 * i : 128 * i + 128 : 4]).all()
        else:
            with pytest.raises(Exception, match="never written"):
                run(ptx, {"x": x, "out": out})
