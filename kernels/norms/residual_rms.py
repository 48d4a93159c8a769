"""A residual sum and its root-mean-square norm, row by row, for evaluations without gradients.

    s = a + gamma b,    n = s / sqrt(mean(s^2) + eps) * weight           (Zhang and Sennrich 2019, equation 4)

a, b, s, n [R, D], each in float32 or bfloat16, computed in float32; gamma [D] or absent, weight [D] or absent. n is of
the sum before it is rounded to the dtype of s, which is the one that torch promotes a, gamma and b to.

A program has BLOCK_R whole rows, so a row's bits do not depend on how many there are. Bytes of a call: a and b read, s
and n written, 4 R D of their dtypes, or 3 R D where s is not wanted; eager torch takes 8 R D with gamma and 5 without.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import bound, launch
from ..dispatch import RowOp, interpreting, register
from ..tl_common import bf16_pair, product

MOST = 8192  # features whose row fits in the registers of a program
DTYPES = (torch.float32, torch.bfloat16)


def residual_rms_ref(
    a: Tensor, b: Tensor, gamma: Tensor | None, weight: Tensor | None, eps: float, keep_sum: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Returns (s or None, n) in torch, in the dtype of s."""
    s = a + b if gamma is None else a + gamma * b
    n = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return s if keep_sum else None, n if weight is None else n * weight


@triton.jit
def _rms_kernel(
    a_ptr,  # [R, D]
    b_ptr,  # [R, D]
    gamma_ptr,  # [D], if HAS_GAMMA
    weight_ptr,  # [D], if HAS_WEIGHT
    s_ptr,  # [R, D], if KEEP_SUM
    n_ptr,  # [R, D]
    R,
    D,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    KEEP_SUM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERP: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = (offs_r < R)[:, None] & mask_d[None, :]
    offs = offs_r[:, None] * D + offs_d[None, :]
    b = tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_GAMMA:
        b *= tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    s = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32) + b
    n = s * (1.0 / tl.sqrt(tl.sum(product(s, s), 1) / D + eps))[:, None]
    if HAS_WEIGHT:
        n *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if INTERP and n_ptr.dtype.element_ty == tl.bfloat16:
        s, _ = bf16_pair(s, INTERP)
        n, _ = bf16_pair(n, INTERP)
    if KEEP_SUM:
        tl.store(s_ptr + offs, s, mask=mask)
    tl.store(n_ptr + offs, n, mask=mask)


def residual_rms(
    a: Tensor, b: Tensor, gamma: Tensor | None, weight: Tensor | None, eps: float, keep_sum: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Returns what `residual_rms_ref` does, for a and b of one shape; without gradients."""
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.contiguous(), b.contiguous()
    features = a.shape[-1]
    n = a.new_empty(a.shape, dtype=sum_dtype(a, b, gamma))
    s = torch.empty_like(n) if keep_sum else None
    rows = n.numel() // features
    if rows:
        config = launch.parameters("norms.residual_rms", a.device, features=features)
        flags = {"HAS_GAMMA": gamma is not None, "HAS_WEIGHT": weight is not None, "KEEP_SUM": keep_sum}
        vectors = (a if gamma is None else gamma.contiguous(), a if weight is None else weight.contiguous())
        grid = (launch.cdiv(rows, config["BLOCK_R"]),)
        given = (a, b, *vectors, n if s is None else s, n, rows, features, eps)
        bound.launch(_rms_kernel, grid, a.device, *given, INTERP=interpreting(), **flags, **config)
    return s, n


def sum_dtype(a: Tensor, b: Tensor, gamma: Tensor | None) -> torch.dtype:
    """Returns the dtype that torch promotes the sum to."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


def refuses(*, a: Tensor, b: Tensor, gamma: Tensor | None, weight: Tensor | None, autocast: bool) -> str | None:
    """Returns why torch must do this, or None."""
    strange = [t.dtype for t in (a, b, gamma, weight) if t is not None and t.dtype not in DTYPES]
    if strange:
        return f"norms of {str(strange[0]).removeprefix('torch.')}"
    if not 0 < a.shape[-1] <= MOST:
        return f"{a.shape[-1]} features, and a program holds rows of 1 to {MOST}"
    dtype = sum_dtype(a, b, gamma)
    if weight is not None and weight.dtype != dtype:
        return f"a norm whose weight is {weight.dtype} and whose input is {dtype}"
    if autocast and dtype != torch.float32:
        return "autocast, which may norm narrow sums in float32"
    return None


op = register("norms.residual_rms", RowOp(residual_rms, residual_rms_ref, refuses, "one launch for a sum and its norm"))
