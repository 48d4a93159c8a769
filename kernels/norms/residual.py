"""Which samples have a residual far above the one that their solve reported.

    far = ||y - z|| > max(factor * reported, least) * max(||y||, base)

y = f(z), z [B, N], reported and base [B], far [B] bool; base is max(SHARE ||z_0||, scale), z_0 [B, N], where it is not
given. With a mask [B, N] norms are those of the elements where it is True. NaN is not far. A program has BLOCK_R whole
samples. Bytes of a call: 8 B N, with z_0 12 B N, and B N of the mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import bound, launch, rules
from ..dispatch import RowOp, register
from ..tl_common import SHARE, product

MOST = 8192  # elements of a sample that fit in the registers of a program


def far_ref(
    y: Tensor, z: Tensor, base: Tensor | None, start: Tensor, mask: Tensor | None, reported: Tensor,
    *, scale: float, factor: float, least: float,
) -> Tensor:  # fmt: skip
    """Returns `far` in torch."""
    return rules.residual(y, z, base, start, mask, scale) > (factor * reported).clamp_(min=least)


@triton.jit
def _norm(x, mask_ptr, offs, mask, HAS_MASK: tl.constexpr):
    """Returns the norms of rows, of the elements that count."""
    if HAS_MASK:
        x = tl.where(tl.load(mask_ptr + offs, mask=mask, other=0) != 0, x, 0.0)
    return tl.sqrt(tl.sum(product(x, x), 1))


@triton.jit
def _far_kernel(
    y_ptr,  # [B, N]
    z_ptr,  # [B, N]
    base_ptr,  # [B], or z_0 [B, N] unless HAS_BASE
    mask_ptr,  # [B, N] bool, if HAS_MASK
    reported_ptr,  # [B]
    far_ptr,  # [B] bool
    B,
    N,
    scale,
    factor,
    least,
    HAS_BASE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows < B)[:, None] & (offs_d < N)[None, :]
    offs = rows[:, None] * N + offs_d[None, :]
    y = tl.load(y_ptr + offs, mask=mask, other=0.0)
    r = _norm(y - tl.load(z_ptr + offs, mask=mask, other=0.0), mask_ptr, offs, mask, HAS_MASK)
    s = _norm(y, mask_ptr, offs, mask, HAS_MASK)
    if HAS_BASE:
        base = tl.load(base_ptr + rows, mask=rows < B, other=0.0)
    else:
        start = tl.load(base_ptr + offs, mask=mask, other=0.0)
        base = tl.maximum(SHARE * _norm(start, mask_ptr, offs, mask, HAS_MASK), scale)
    limit = tl.maximum(factor * tl.load(reported_ptr + rows, mask=rows < B, other=0.0), least)
    tl.store(far_ptr + rows, r > limit * tl.maximum(s, base), mask=rows < B)


def far(
    y: Tensor, z: Tensor, base: Tensor | None, start: Tensor, mask: Tensor | None, reported: Tensor,
    *, scale: float, factor: float, least: float,
) -> Tensor:  # fmt: skip
    """Returns what `far_ref` does, for float32."""
    y, z = y.contiguous(), z.contiguous()
    batch, width = y.shape
    made = y.new_empty(batch, dtype=torch.bool)
    if batch:
        config = launch.parameters("norms.residual", y.device, features=width)
        given = (y, z, (start if base is None else base).contiguous(), y if mask is None else mask.contiguous())
        given += (reported.contiguous(), made, batch, width, max(scale, rules.EPS), factor, least)
        flags = {"HAS_BASE": base is not None, "HAS_MASK": mask is not None}
        grid = (launch.cdiv(batch, config["BLOCK_R"]),)
        bound.launch(_far_kernel, grid, y.device, *given, **flags, **config)
    return made


def refuses(*, y: Tensor) -> str | None:
    """Returns why torch must do this, or None."""
    if y.dtype != torch.float32:
        return f"samples of {str(y.dtype).removeprefix('torch.')}"
    return None if 0 < y.shape[1] <= MOST else f"{y.shape[1]} elements, and a program holds samples of 1 to {MOST}"


op = register("norms.residual", RowOp(far, far_ref, refuses, "one launch that compares residuals"))
