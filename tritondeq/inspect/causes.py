"""Whether a cell is what a fixed-point problem needs: a function of its state, and one sample apart from another."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..deq import DEQ
from ..guards import generator_state
from ..problem import HeldCell, Problem
from .jacobian import Point, point

TINY = 1e-30
ULPS = 16  # of float32 (or float64) that two images of one state may lie apart
SHARE = 1e-2  # of the tolerance, below which no solve shows whether images differ
LEAST = 1e-3  # of the largest image's norm, that distances are relative to at least


@dataclass(frozen=True)
class Causes:
    """What `find` measured.

    Attributes:
        differs: Largest relative difference of two images of one state.
        moved: Buffers and attributes that changed from one evaluation to another.
        coupled: Largest relative change of a sample's image as others change; NaN where the cell does not repeat.
        texts: What is wrong with the cell, in words.
    """

    differs: float
    moved: tuple[str, ...]
    coupled: float
    texts: tuple[str, ...]


class Snapshot:
    """The buffers of a cell's modules, and those of their attributes that are tensors or numbers."""

    def __init__(self, cell: nn.Module):
        self._kept: list[tuple[str, nn.Module, str, Any, Any]] = []
        for path, part in cell.named_modules(prefix="cell"):
            for name, value in (vars(part) | part._buffers).items():
                if isinstance(value, Tensor | int | float):
                    copy = value.detach().clone() if isinstance(value, Tensor) else value
                    self._kept.append((f"{path}.{name}", part, name, value, copy))

    def changed(self) -> tuple[str, ...]:
        """Returns the paths of what no longer has its value."""
        return tuple(path for path, part, name, _, copy in self._kept if not _same(getattr(part, name, None), copy))

    @torch.no_grad()
    def restore(self) -> None:
        """Gives everything its value back."""
        for _, part, name, value, copy in self._kept:
            if not _same(getattr(part, name, None), copy):
                if isinstance(value, Tensor) and not _same(value, copy):
                    value.detach().copy_(copy)
                setattr(part, name, value)


def state_only(at: Point, layer: DEQ) -> Point:
    """Returns the point of a function that leaves out what the layer's cell returns beside the state."""
    return replace(at, f=lambda *args: at.f(*args)[0]) if layer.has_aux else at


@torch.no_grad()
def find(layer: DEQ, value: Any, x: Any, mask: Any, warned: list[str]) -> Causes:
    """Evaluates a layer's cell at its solution `value` and at a random state, with dropout masks and weights held.

    Random states take the place of those of some samples, and the images of the others are compared. Sample i acts on
    sample j in one of 2 log2(B) such evaluations, for any i and j: in that where the samples with one bit of their
    index set, or not set, are replaced, a bit in which i and j differ. A permutation of the batch would have to permute
    whatever in x and the masks belongs to a sample, and moves rounding errors; here each row stays where it is, and an
    image that does not depend on the others is the same to the bit. Of what the solve `warned`, it reports a residual
    that is not the true one, where neither is why.
    """
    at = point(layer, value, (x,), None, mask)
    held = HeldCell(layer.cell, layer.cell, lambda: at.args[0])
    problem, intact = Problem(held, held.args, at.layout, has_aux=layer.has_aux), True

    def f(z: Tensor) -> Tensor:
        nonlocal intact
        given = z.clone()
        image = at.counted(problem(given))
        intact = intact and _same(given, z)
        return image

    z, device = at.z, at.z.device
    allowed = max(_rounding(at), SHARE * (layer.tol or 1e-3))
    first, before, drawn = f(z), Snapshot(layer.cell), generator_state(device)
    differs = _most(f(z), first)
    draws = not torch.equal(drawn, generator_state(device))
    size = z.square().mean().sqrt()
    other = torch.randn_like(z) * 2 * torch.where(size > 0, size, 1.0)  # of another variance, too
    aside = f(other)  # so that a running mean, which has settled at the solution, moves
    differs = max(differs, _most(f(z), first), _most(f(other), aside))
    moved = before.changed()
    for _ in range(layer.max_steps if moved and differs <= allowed else 0):  # a clock may be slow
        differs = max(differs, _most(f(z), first))
    texts = [] if intact else ["the cell changes its state in place, unseen by autograd: it must return a new state"]
    coupled = math.nan
    if differs > allowed:
        texts.append(_not_a_function(differs, moved, draws))
    else:
        shape = at.layout.batch_shape
        group = torch.arange(at.layout.batch, device=device)
        coupled = _coupling(f, z, first, other, group)
        if coupled > allowed:
            coarser = ((d, group // shape[d:].numel()) for d in range(len(shape) - 1, 0, -1))
            dims = next((d for d, g in coarser if _coupling(f, z, first, other, g) <= allowed), 0)
            texts.append(
                "samples depend on one another (statistics of the batch, nodes of a graph as rows, attention across "
                f"samples): where others change, the image of one moves by {coupled:.1e} of its norm. Set batch_dims="
                f"{dims} on the cell, which makes {'those that do' if dims else 'all of them'} one sample"
            )
    if not texts:
        residual = [text.partition(": either")[0] for text in warned if text.startswith("the residual at the solution")]
        more = "though the cell repeats itself and samples are apart: is it another map where gradients are on?"
        texts = [f"{text}, {more}" for text in residual[:1]]
    return Causes(differs, moved, coupled, tuple(texts))


def _coupling(f: Callable[[Tensor], Tensor], z: Tensor, first: Tensor, other: Tensor, group: Tensor) -> float:
    """Returns how far images of samples move where samples of other groups have another state."""
    most = 0.0
    for bit in range(int(group.max()).bit_length()):
        for side in (0, 1):
            replaced = (group >> bit) % 2 == side
            image = f(torch.where(replaced[:, None], other, z))
            most = max(most, _most(image[~replaced], first[~replaced]))
    return most


def _not_a_function(differs: float, moved: tuple[str, ...], draws: bool) -> str:
    text = f"the cell is not a function of its state: two evaluations at one state differ by {differs:.1e} of its norm"
    if draws:
        text += "; it draws random numbers at each: draw them once, outside of the cell, or use FixedDropout"
    if moved:
        text += f"; what changes in it is {', '.join(moved)}: make that a part of the state or of x, or hold it fixed"
    if not moved and not draws:
        text += "; no buffer, tensor or number of its modules changes, so that it depends on something elsewhere"
    return text


def _rounding(at: Point) -> float:
    """Returns the relative distance below which images count as equal: bits differ by atomic additions at most."""
    kind = at.layout.device.type
    dtypes = [*at.layout.dtypes, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
    return max(ULPS * torch.finfo(at.layout.dtype).eps, *(torch.finfo(dtype).eps for dtype in dtypes))


def _most(image: Tensor, before: Tensor) -> float:
    """Returns the largest relative distance of a sample's images, inf where only one is NaN."""
    same = (image == before) | (image.isnan() & before.isnan())
    gap = torch.where(same, 0.0, image - before).norm(dim=1)
    size = before.nan_to_num().norm(dim=1)
    return (gap / size.clamp(min=max(LEAST * size.max().item(), TINY))).nan_to_num(torch.inf).max().item()


def _same(now: Any, before: Any) -> bool:
    if not isinstance(before, Tensor):
        return now is before or (type(now) is type(before) and now == before)
    alike = isinstance(now, Tensor) and now.shape == before.shape
    alike = alike and now.dtype == before.dtype and now.device == before.device
    return alike and torch.allclose(now, before, rtol=0.0, atol=0.0, equal_nan=True)
