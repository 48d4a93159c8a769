"""GroupNorm of a sum with a ReLU before or after it, of channels_last images: y = GN(a + b) * weight + bias.

Wu and He (2018), equations 1 and 7. a, b and y are [B, C, *size] with P = prod(size) pixels, in memory [P, C] within a
sample, as convolutions leave them; G groups of D = C / G channels. One program holds one group of one sample, P D
values, so that one launch reads and writes everything once. Groups above launch.GROUP values are split by pixels, at
places that depend on P and D only: a first launch leaves mean and squared deviation of each part, a second one joins
them in a fixed order (Chan et al. 1983) and normalises.

Moments are float32, of deviations from a first mean, and the mean is a pair, so that an offset far above the deviation
costs no digits.

Bytes of a call: a and b read, y written, once each; where split, a and b are read twice and 12 for each part are added.
Torch's CUDA GroupNorm knows no channels_last and copies into and out of its format; a + b and the ReLU are 2 launches.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import bound, launch
from ..dispatch import RowOp, interpreting, register
from ..tl_common import act, add2, bf16_pair, product

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def group_norm_ref(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: str | None
) -> Tensor:
    """Does in torch what `group_norm` does, for a and b of one shape [B, C, *size]; b may be None.

    `groups` divides C, weight and bias are [C], eps is added to the variance, and `relu` is "before" (of the sum),
    "after" (of the result) or None.
    """
    x = a if b is None else a + b
    y = F.group_norm(torch.relu(x) if relu == "before" else x, groups, weight, bias, eps)
    return torch.relu(y) if relu == "after" else y


@triton.jit
def _tile(
    a_ptr,
    b_ptr,
    stride_ab,
    stride_bb,
    sample,
    group,
    part,
    P,
    C,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_B: tl.constexpr,
    RELU: tl.constexpr,
    INTERP: tl.constexpr,
):
    """Returns (a + b or its ReLU for one part of one group, which exist, offset of the first, of the others)."""
    offs_p, offs_d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    mask = (offs_p < P - part * BLOCK_P)[:, None] & (offs_d < D)[None, :]
    start = part * BLOCK_P * C + group * D
    offs = offs_p[:, None] * C + offs_d[None, :]
    x = tl.load(a_ptr + sample * stride_ab + start + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_B:
        x += tl.load(b_ptr + sample * stride_bb + start + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU == "before":
        x = act(x, "relu", INTERP)
    return x, mask, start, offs


@triton.jit
def _moments(x, mask, n, INTERP: tl.constexpr):
    """Returns (m, o, squared deviations from m + o, summed), m + o the mean of the n elements under the mask."""
    first = tl.sum(tl.sum(x, 1), 0) / n
    d = tl.where(mask, x - first, 0.0)
    if INTERP:
        off, squares = tl.sum(tl.sum(d, 1), 0), tl.sum(tl.sum(product(d, d), 1), 0)
    else:
        off, squares = tl.reduce(tl.reduce((d, product(d, d)), 1, add2), 0, add2)
    return first, off / n, squares - off * off / n


@triton.jit
def _measure_kernel(
    a_ptr,  # [B, P, C], samples stride_ab apart
    b_ptr,  # [B, P, C], samples stride_bb apart, if HAS_B
    part_ptr,  # [B, G, SPLITS, 3]: what _moments returns
    stride_ab,
    stride_bb,
    P,
    C,
    G,
    SPLITS,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_B: tl.constexpr,
    RELU: tl.constexpr,
    INTERP: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    part, group, sample = pid % SPLITS, pid // SPLITS % G, pid // SPLITS // G
    x, mask, _, _ = _tile(
        a_ptr, b_ptr, stride_ab, stride_bb, sample, group, part, P, C, D, BLOCK_P, BLOCK_D, HAS_B, RELU, INTERP
    )
    n = (tl.minimum(BLOCK_P, P - part * BLOCK_P) * D).to(tl.float32)
    first, off, squares = _moments(x, mask, n, INTERP)
    tl.store(part_ptr + 3 * pid, first)
    tl.store(part_ptr + 3 * pid + 1, off)
    tl.store(part_ptr + 3 * pid + 2, squares)


@triton.jit
def _normalise_kernel(
    a_ptr,  # [B, P, C], samples stride_ab apart
    b_ptr,  # [B, P, C], samples stride_bb apart, if HAS_B
    part_ptr,  # [B, G, SPLITS, 3], if BLOCK_S
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [B, P, C]
    stride_ab,
    stride_bb,
    P,
    C,
    G,
    SPLITS,
    eps,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # 0 where a group is not split
    HAS_B: tl.constexpr,
    RELU: tl.constexpr,
    ROUND: tl.constexpr,  # to bf16, where storing truncates
    INTERP: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    part, group, sample = pid % SPLITS, pid // SPLITS % G, pid // SPLITS // G
    x, mask, start, offs = _tile(
        a_ptr, b_ptr, stride_ab, stride_bb, sample, group, part, P, C, D, BLOCK_P, BLOCK_D, HAS_B, RELU, INTERP
    )
    n = P * D * 1.0  # P is a plain number where it is 1
    if BLOCK_S == 0:
        first, off, squares = _moments(x, mask, n, INTERP)
    else:
        parts = tl.arange(0, BLOCK_S)
        mask_s = parts < SPLITS
        at = part_ptr + 3 * ((pid - part) + parts)
        firsts = tl.load(at, mask=mask_s, other=0.0)
        first = tl.sum(tl.where(parts == 0, firsts, 0.0), 0)
        away = tl.where(mask_s, firsts - first, 0.0) + tl.load(at + 1, mask=mask_s, other=0.0)
        sizes = tl.where(mask_s, tl.minimum(BLOCK_P, P - parts * BLOCK_P) * D, 0).to(tl.float32)
        off = tl.sum(product(sizes, away), 0) / n
        squares = tl.sum(tl.load(at + 2, mask=mask_s, other=0.0) + sizes * (away - off) * (away - off), 0)
    known = tl.arange(0, BLOCK_D) < D
    channels = group * D + tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + channels, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=known, other=0.0).to(tl.float32)
    y = (x - first - off) * (1.0 / tl.sqrt(squares / n + eps)) * weight[None, :] + bias[None, :]
    if RELU == "after":
        y = act(y, "relu", INTERP)
    if ROUND:
        y = bf16_pair(y, INTERP)[1]
    tl.store(y_ptr + sample * P * C + start + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def group_norm(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: str | None
) -> Tensor:
    """Returns what `group_norm_ref` does, where `refuses` is None; channels_last, in the wider dtype of a and b."""
    batch, channels, *size = a.shape
    pixels, width = a[0, 0].numel() if batch else 0, channels // groups
    dtype = a.dtype if b is None else torch.promote_types(a.dtype, b.dtype)
    y = torch.empty(batch, *size, channels, dtype=dtype, device=a.device).movedim(-1, 1)
    if y.numel() == 0:
        return y
    config = launch.parameters("norms.group_norm", a.device, pixels=pixels, width=width)
    splits = config.pop("SPLITS")
    grid = (batch * groups * splits,)
    interp = interpreting()
    flags = config | {"D": width, "HAS_B": b is not None, "RELU": relu or "", "INTERP": interp}
    other = a if b is None else b
    strides = (a.stride(0), other.stride(0), pixels, channels, groups, splits)
    part = a.new_empty(batch, groups, splits, 3, dtype=torch.float32) if splits > 1 else y
    block_s = launch.power_of_two(splits) if splits > 1 else 0
    rounds = interp and dtype == torch.bfloat16
    if splits > 1:
        bound.launch(_measure_kernel, grid, a.device, a, other, part, *strides, **flags)
    given = (a, other, part, weight, bias, y, *strides, float(eps))
    bound.launch(_normalise_kernel, grid, a.device, *given, BLOCK_S=block_s, ROUND=rounds, **flags)
    return y


def refuses(*, a: Tensor, b: Tensor | None, groups: int) -> str | None:
    """Returns why torch must do this, or None."""
    for x in (a,) if b is None else (a, b):
        if x.dtype not in FLOATS:
            return f"GroupNorm in {str(x.dtype).removeprefix('torch.')} is torch's"
        if x.shape != a.shape:
            return f"a sum of shapes {tuple(a.shape)} and {tuple(x.shape)} is torch's"
        if not x[:1].movedim(1, -1).is_contiguous():
            return "the image is not channels_last"
    if launch.parameters("norms.group_norm", pixels=1, width=a.shape[1] // groups) is None:
        return f"a group has {a.shape[1] // groups} channels, above {launch.GROUP}"
    return None


op = register("norms.group_norm", RowOp(group_norm, group_norm_ref, refuses))
