"""Samples scaled to norm 1, for the right-hand side of a linear solve.

    m = max_i |g_i|,    n = ||g / m||,    unit = g / m / n,    scale = m n             (m or n that are 0 count as 1)

g, unit [B, N], scale [B, 1]; with a mask [B, N] the norm is that of the elements where it is True. Divided by the
largest element first, so that no square overflows or underflows; a sample with an element that is NaN or infinite
becomes NaN. A program has BLOCK_R whole samples. Bytes of a call: 8 B N, and B N of the mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import bound, launch
from ..dispatch import RowOp, register
from ..formulas import unit as unit_ref
from ..tl_common import constant, product

MOST = 8192  # elements of a sample that fit in the registers of a program
LESS, MORE = constant(2.0**-32), constant(2.0**32)


@triton.jit
def _unit_kernel(
    g_ptr,  # [B, N]
    mask_ptr,  # [B, N] bool, if HAS_MASK
    unit_ptr,  # [B, N]
    scale_ptr,  # [B]
    B,
    N,
    HAS_MASK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows < B)[:, None] & (offs_d < N)[None, :]
    offs = rows[:, None] * N + offs_d[None, :]
    g = tl.load(g_ptr + offs, mask=mask, other=0.0)
    scale = tl.max(tl.abs(g), 1)
    scale = tl.where(scale == 0.0, 1.0, scale)
    shift = tl.where(scale > 1.0, LESS, MORE)  # a quotient is exact to 2 ulps for divisors from 2^-126 to 2^126
    g = (g * shift[:, None]) / (scale * shift)[:, None]
    counted = g
    if HAS_MASK:
        counted = tl.where(tl.load(mask_ptr + offs, mask=mask, other=0) != 0, g, 0.0)
    norm = tl.sqrt(tl.sum(product(counted, counted), 1))
    norm = tl.where(norm == 0.0, 1.0, norm)
    tl.store(unit_ptr + offs, g / norm[:, None], mask=mask)
    tl.store(scale_ptr + rows, scale * norm, mask=rows < B)


def unit(g: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns what `unit_ref` does, for float32."""
    g = g.contiguous()
    batch, width = g.shape
    made, scale = torch.empty_like(g), g.new_empty(batch, 1)
    if batch:
        config = launch.parameters("norms.unit", g.device, features=width)
        given = (g, g if mask is None else mask.contiguous(), made, scale, batch, width)
        grid = (launch.cdiv(batch, config["BLOCK_R"]),)
        bound.launch(_unit_kernel, grid, g.device, *given, HAS_MASK=mask is not None, **config)
    return made, scale


def refuses(*, g: Tensor) -> str | None:
    """Returns why torch must do this, or None."""
    if g.dtype != torch.float32:
        return f"samples of {str(g.dtype).removeprefix('torch.')}"
    return None if 0 < g.shape[1] <= MOST else f"{g.shape[1]} elements, and a program holds samples of 1 to {MOST}"


op = register("norms.unit", RowOp(unit, unit_ref, refuses, "one launch that scales samples"))
