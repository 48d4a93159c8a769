"""Which instructions the emulator executes: their opcodes with all modifiers, and how many operands they have.

In an opcode, <a b> stands for a or b, and [.a] for .a or nothing. What is not listed is unknown, even where PTX has it:
a modifier that were passed over would make a result wrong in silence.
"""

import re
from functools import cache

from .errors import Unknown

_INTEGER = "<u16 s16 u32 s32 u64 s64>"
_ANY_INTEGER = "<u8 s8 u16 s16 u32 s32 u64 s64>"
_HALF = "<f16 f16x2 bf16 bf16x2>"
_NARROW = "<b8 u8 s8 b16 u16 s16 b32 u32 s32 f32>"
_WIDE = "<b64 u64 s64 f64>"
_SHARED = "<shared shared::cta>"
_SCOPE = "<cta gpu sys>"
_TILE = "m16n8"

ARITHMETIC = {
    f"<add sub min max>.{_INTEGER}": 3,
    "<add sub mul>[.rn][.ftz][.sat].f32": 3,
    "<add sub mul>[.rn].f64": 3,
    f"<add sub mul>[.rn].{_HALF}": 3,
    "fma.rn[.ftz][.sat].f32": 4,
    "fma.rn.f64": 4,
    f"fma.rn.{_HALF}": 4,
    f"mul.<lo hi>.{_INTEGER}": 3,
    "mul.wide.<u16 s16 u32 s32>": 3,
    f"mad.<lo hi>.{_INTEGER}": 4,
    "mad.wide.<u16 s16 u32 s32>": 4,
    f"<div rem>.{_INTEGER}": 3,
    "div.<rn approx full>[.ftz].f32": 3,
    "div.rn.f64": 3,
    "<min max>[.ftz][.NaN].f32": 3,
    "<min max>.f64": 3,
    f"<min max>[.NaN].{_HALF}": 3,
    "<abs neg>.<s16 s32 s64>": 2,
    "<abs neg>[.ftz].f32": 2,
    "<abs neg>.f64": 2,
    f"<abs neg>.{_HALF}": 2,
    "copysign.<f32 f64>": 3,
    "<sqrt rcp>.<approx rn>[.ftz].f32": 2,
    "<sqrt rcp>.rn.f64": 2,
    "<rsqrt ex2 lg2 sin cos>.approx[.ftz].f32": 2,
    "rsqrt.approx.f64": 2,
    "tanh.approx.f32": 2,
    "<and or xor>.<pred b16 b32 b64>": 3,
    "not.<pred b16 b32 b64>": 2,
    "shl.<b16 b32 b64>": 3,
    "shr.<b16 b32 b64 u16 s16 u32 s32 u64 s64>": 3,
    "shf.<l r>.<clamp wrap>.b32": 4,
    "prmt.b32": 4,
    "lop3.b32": 5,
    "bfe.<u32 s32>": 4,
    "bfi.b32": 5,
    "<popc clz>.<b32 b64>": 2,
    "brev.<b32 b64>": 2,
    "setp.<eq ne>.<b16 b32 b64>": 3,
    f"setp.<eq ne lt le gt ge>.{_INTEGER}": 3,
    f"setp.<eq ne lt le gt ge>.<and or xor>.{_INTEGER}": 4,
    "setp.<lo ls hi hs>.<u16 u32 u64>": 3,
    "setp.<eq ne lt le gt ge equ neu ltu leu gtu geu num nan>[.ftz].f32": 3,
    "setp.<eq ne lt le gt ge equ neu ltu leu gtu geu num nan>.<and or xor>[.ftz].f32": 4,
    "setp.<eq ne lt le gt ge equ neu ltu leu gtu geu num nan>.<f16 bf16 f64>": 3,
    "selp.<b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64>": 4,
}

CONVERSIONS = {
    f"cvt.{_ANY_INTEGER}.{_ANY_INTEGER}": 2,
    f"cvt.<rni rzi rmi rpi>.{_ANY_INTEGER}.<f16 f64>": 2,
    f"cvt.<rni rzi rmi rpi>[.ftz].{_ANY_INTEGER}.f32": 2,
    f"cvt.rn.<f16 f32 f64>.{_ANY_INTEGER}": 2,
    "cvt.<rni rzi rmi rpi>[.ftz].f32.f32": 2,
    "cvt.<rni rzi rmi rpi>.<f16.f16 f64.f64>": 2,
    "cvt[.ftz].sat.f32.f32": 2,
    "cvt.<f32.f16 f64.f16 f32.bf16 f64.bf16>": 2,
    "cvt[.ftz].f64.f32": 2,
    "cvt.<rn rz>[.ftz].f32.f64": 2,
    "cvt.<rn rz>.f16.f64": 2,
    "cvt.<rn rz>[.ftz].f16.f32": 2,
    "cvt.<rn rz>.bf16.f32": 2,
    "cvt.rna.tf32.f32": 2,
    "cvt.<rn rz>.<f16x2 bf16x2>.f32": 3,
}

EFFECTS = {
    "mov.<pred b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64>": 2,
    "ld.param.<b16 b32 u32 s32 f32 b64 u64 s64 f64>": 2,
    f"<ld st>.<global shared shared::cta>[.<v2 v4>].{_NARROW}": 2,
    f"<ld st>.<global shared shared::cta>[.v2].{_WIDE}": 2,
    "ld.global.<ca cg>[.<v2 v4>].<b8 b16 b32>": 2,
    "ld.global.<ca cg>[.v2].b64": 2,
    "st.global.<cg cs>[.<v2 v4>].<b8 b16 b32>": 2,
    "st.global.<cg cs>[.v2].b64": 2,
    "<ld st>.global.L1::<evict_first evict_last>[.<v2 v4>].<b8 b16 b32>": 2,
    "<ld st>.global.L1::<evict_first evict_last>[.v2].b64": 2,
    f"ld.<relaxed acquire>.{_SCOPE}.global.<b32 b64>": 2,
    f"st.<relaxed release>.{_SCOPE}.global.<b32 b64>": 2,
    **{
        f"atom.global.{_SCOPE}.<relaxed acquire release acq_rel>.{operation}": operands
        for operation, operands in (
            ("add.<u32 s32 u64 f32 f64>", 3), ("<min max>.<u32 s32 u64 s64>", 3), ("<inc dec>.u32", 3),
            ("<and or xor exch>.<b32 b64>", 3), ("cas.<b32 b64>", 4),
        )
    },
    f"red.global.{_SCOPE}.<relaxed release>.add.<u32 s32 u64 f32 f64>": 2,
    f"atom.{_SHARED}.cta.<relaxed acquire release acq_rel>.add.<u32 s32 u64 f32 f64>": 3,
    "shfl.sync.<up down bfly idx>.b32": 5,
    "redux.sync.<add min max>.<u32 s32>": 3,
    "redux.sync.<and or xor>.b32": 3,
    "vote.sync.<any all uni>.pred": 3,
    "vote.sync.ballot.b32": 3,
    "bar.warp.sync": 1,
    "fence.proxy.async[.shared::cta]": 0,
    "trap": 0,
    f"cp.async.<ca cg>.{_SHARED}.global[.L2::<64B 128B 256B>]": (3, 4),
    "cp.async.<commit_group wait_all>": 0,
    "cp.async.wait_group": 1,
    f"<ldmatrix stmatrix>.sync.aligned.m8n8.<x1 x2 x4>[.trans].{_SHARED}.b16": 2,
    f"mma.sync.aligned.{_TILE}<k8 k16>.row.col.f32.<bf16.bf16 f16.f16>.f32": 4,
    f"mma.sync.aligned.{_TILE}<k4 k8>.row.col.f32.tf32.tf32.f32": 4,
    "wgmma.<fence commit_group>.sync.aligned": 0,
    "wgmma.wait_group.sync.aligned": 1,
    "wgmma.mma_async.sync.aligned.<N>k16.f32.<bf16.bf16 f16.f16>": (7, 8),
    "wgmma.mma_async.sync.aligned.<N>k8.f32.tf32.tf32": 6,
}  # fmt: skip
EFFECTS = {
    form.replace("<N>", f"<{' '.join(f'm64n{n}' for n in range(8, 257, 8))}>"): count for form, count in EFFECTS.items()
}

CONTROL = {"bra[.uni]": 1, "<ret exit>": 0, "bar.sync": 1}

FORMS = ARITHMETIC | CONVERSIONS | EFFECTS | CONTROL


def expand(form: str) -> list[str]:
    """Returns all opcodes of a form."""
    found = re.search(r"<([^<>\[\]]*)>|\[([^\[\]<>]*)\]", form)  # in [.<a b>] the choice comes first, then what is left
    if not found:
        return [form]
    choices = found[1].split() if found[1] is not None else [found[2], ""]
    made = [form[: found.start()] + choice + form[found.end() :] for choice in choices]
    return list(dict.fromkeys(opcode for one in made for opcode in expand(one)))


@cache
def opcodes() -> dict[str, tuple[int, ...]]:
    """Returns every opcode that is known, with the numbers of operands that it can have."""
    return {
        opcode: (count,) if isinstance(count, int) else count
        for form, count in FORMS.items()
        for opcode in expand(form)
    }


def check(instruction) -> None:
    """Raises Unknown unless the instruction's opcode is known and has as many operands."""
    counts = opcodes().get(instruction.opcode)
    if counts is None:
        raise Unknown(instruction.text)
    if len(instruction.args) not in counts:
        raise Unknown(f"{instruction.text}: {len(instruction.args)} operands where {counts} are known")
