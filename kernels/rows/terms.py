"""The bf16 terms of a cell's matrices: W = W_1 + ... + W_terms up to 2^(-8 terms), each term rounded to nearest.

All matrices [out, in] in one launch. Bytes: of every element 4 read, and 2 written for each term.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import bound, launch
from ..dispatch import interpreting
from ..tl_common import bf16_pair

BLOCK = 1024  # elements of a program


def bf16_terms_ref(
    matrices: tuple[Tensor, ...], terms: int, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """Returns of each matrix, fp32 of any strides, its terms [terms, out, in].

    They are written to `out` where that is given, [terms, ., .] each, which may be wider and then is zero beyond.
    """
    made = out or _made(matrices, terms)
    for w, parts in zip(matrices, made, strict=True):
        rows, columns = w.shape
        for part in parts.zero_()[:, :rows, :columns]:
            part.copy_(w)
            w = w - part
    return made


def _made(matrices: tuple[Tensor, ...], terms: int) -> tuple[Tensor, ...]:
    return tuple(w.new_empty((terms, *w.shape), dtype=torch.bfloat16) for w in matrices)


@triton.jit
def _store_terms(w, term, program, rows, columns, down, along, height, width, TERMS, BLOCK, INTERP: tl.constexpr):
    """Stores BLOCK elements of each term of a matrix."""
    at = program * BLOCK + tl.arange(0, BLOCK)
    row, column = at // width, at % width
    rest = tl.load(w + row * down + column * along, mask=(row < rows) & (column < columns), other=0.0)
    for t in tl.static_range(TERMS):
        part, near = bf16_pair(rest, INTERP)
        tl.store(term + t * height * width + at, part, mask=row < height)
        rest -= near


@triton.jit
def terms_kernel(
    w_ptrs,  # each [out, in] fp32
    t_ptrs,  # each [TERMS, height, width] bf16
    sizes,  # of each: out, in, its two strides, height, width
    programs,  # the first of each, and how many there are
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERP: tl.constexpr,
):
    """Stores the terms of all matrices, one after another."""
    pid = tl.program_id(0)
    for i in tl.static_range(len(w_ptrs)):
        if (pid >= programs[i]) & (pid < programs[i + 1]):
            _store_terms(
                *(w_ptrs[i], t_ptrs[i], pid - programs[i], sizes[6 * i], sizes[6 * i + 1], sizes[6 * i + 2]),
                *(sizes[6 * i + 3], sizes[6 * i + 4], sizes[6 * i + 5], TERMS, BLOCK, INTERP),
            )


def bf16_terms(matrices: tuple[Tensor, ...], terms: int, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """Returns what `bf16_terms_ref` does, for matrices that are not empty."""
    made = out or _made(matrices, terms)
    sizes = [(*w.shape, *w.stride(), *parts.shape[1:]) for w, parts in zip(matrices, made, strict=True)]
    programs = (0, *accumulate(launch.cdiv(parts.numel(), terms * BLOCK) for parts in made))
    bound.launch(
        *(terms_kernel, programs[-1:], matrices[0].device, matrices, made, sum(sizes, ()), programs),
        TERMS=terms,
        BLOCK=BLOCK,
        INTERP=interpreting(),
        num_warps=4,
    )
    return made
