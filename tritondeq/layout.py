"""How a state, any nesting of tensors that share their first dims, lies in one [B, N] matrix."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # torch has no public name for it: the rest of the library takes this one


def describe(x: Any) -> str:
    """Returns what `x` is, for an error message."""
    if isinstance(x, Tensor):
        return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"[:120]


def transformed() -> bool:
    """Returns whether a transform of torch.func is at work in this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Layout:
    """Packs states of one structure into [B, N] matrices and back; differentiable both ways.

    A leaf of the example that is channels_last (or channels_last_3d) lies in the matrix as in storage, channels last: f
    gets that format, and packing what it returns in that format copies nothing.

    Args:
        state: The example: a floating-point tensor, or a tuple / list / dict of them in any nesting.
        batch_dims: How many leading dims index samples; negative counts from the end of the first tensor's dims.
        name: What errors call the state.

    Raises:
        TypeError: A leaf is not a floating-point tensor.
        ValueError: No leaf, leaves on different devices or with different batch shapes, `batch_dims` out of range.
    """

    def __init__(self, state: Any, batch_dims: int = 1, name: str = "z0"):
        self.single = isinstance(state, Tensor)
        leaves, self.spec = ([state], _LEAF) if self.single else pytree.tree_flatten(state)
        if not leaves:
            raise ValueError(f"{name} must hold at least one tensor, got {describe(state)}")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise TypeError(f"{name} must be made of floating-point tensors, got {describe(leaf)}")
        first = leaves[0]
        dims = batch_dims + first.ndim if batch_dims < 0 else batch_dims
        if not 0 <= dims <= min(leaf.ndim for leaf in leaves):
            raise ValueError(f"batch_dims={batch_dims} does not fit {name}: {', '.join(map(describe, leaves))}")
        self.batch_shape, self.device = first.shape[:dims], first.device
        for leaf in leaves[1:]:
            if leaf.shape[:dims] != self.batch_shape or leaf.device != self.device:
                raise ValueError(
                    f"{name} must share device and first {dims} dims: got {describe(first)} and {describe(leaf)}"
                )
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.dtype = torch.float64 if torch.float64 in self.dtypes else torch.float32
        self.batch = math.prod(self.batch_shape)
        self.sizes = [math.prod(shape[dims:]) for shape in self.shapes]
        self.width = sum(self.sizes)
        self.channels_last = [dims == 1 and leaf.ndim > 3 and _channels_last(leaf) for leaf in leaves]
        self.flat = self.single and first.shape == (self.batch, self.width) and first.dtype == self.dtype

    def pack(self, state: Any, name: str = "f(z)", cast: bool = True) -> Tensor:
        """Returns the state as [B, N] in float32, or float64 if any leaf is; a view where that is possible.

        Without `cast` a state of one tensor keeps its dtype.

        Raises:
            TypeError, ValueError: Its structure, shapes, device or kind differ from the example's.
        """
        if self.single:
            if self.flat and type(state) is Tensor and state.shape == self.shapes[0]:
                if state.dtype is self.dtype and state.device == self.device:
                    return state
            self._check(state, 0, name)
            rows = state if self.flat else self._rows(state, 0)
            return rows.to(self.dtype) if cast else rows
        leaves, spec = pytree.tree_flatten(state)
        if spec != self.spec:
            raise ValueError(f"{name} must have the structure of z0: wanted {self.spec}, got {spec}")
        for i, leaf in enumerate(leaves):
            self._check(leaf, i, name)
        return torch.cat([self._rows(leaf, i).to(self.dtype) for i, leaf in enumerate(leaves)], dim=1)

    def unpack(self, flat: Tensor) -> Any:
        """Returns the state that `flat` [B, N] holds, each leaf in its dtype."""
        if self.single:
            return flat.view_as(flat) if self.flat else self._unflatten(flat, 0)
        parts = flat.split(self.sizes, dim=1)
        return pytree.tree_unflatten([self._unflatten(part, i) for i, part in enumerate(parts)], self.spec)

    def has_rows(self, features: int) -> bool:
        """Returns whether [B, N] is made of rows of `features` elements, the only tensor's last dim; 0: any will do."""
        if not features:
            return True
        last = len(self.batch_shape) < len(self.shapes[0]) and self.shapes[0][-1] == features
        return self.single and last and not self.channels_last[0]

    def per_sample(self, vector: Tensor) -> Tensor:
        """Returns `vector` [..., B] as [..., *batch shape]."""
        if len(self.batch_shape) == 1:
            return vector
        return vector.reshape(vector.shape[:-1] + self.batch_shape)

    def mask(self, mask: Any) -> Tensor | None:
        """Returns `mask` as [B, N] bool: one tensor for every leaf, aligned with its first dims, or a nesting as z0's.

        Raises:
            TypeError, ValueError: It is not boolean, or does not broadcast to a leaf.
        """
        if mask is None:
            return None
        masks = [mask] * len(self.shapes)
        if not isinstance(mask, Tensor):
            masks, spec = pytree.tree_flatten(mask)
            if spec != self.spec:
                raise ValueError(f"mask must be a tensor or have the structure of z0: wanted {self.spec}, got {spec}")
        flat = []
        for i, (m, shape) in enumerate(zip(masks, self.shapes, strict=True)):
            if not isinstance(m, Tensor) or m.dtype != torch.bool:
                raise TypeError(f"mask must be made of bool tensors (True: counts), got {describe(m)}")
            wide = m.reshape(m.shape + (1,) * max(0, len(shape) - m.ndim))
            if len(wide.shape) > len(shape) or any(a not in (1, b) for a, b in zip(wide.shape, shape, strict=True)):
                raise ValueError(f"mask of shape {tuple(m.shape)} must broadcast, first dims first, to {tuple(shape)}")
            flat.append(self._rows(wide.to(self.device).expand(shape), i))
        return torch.cat(flat, dim=1)

    def _unflatten(self, rows: Tensor, i: int) -> Tensor:
        shape = self.shapes[i]
        if not self.channels_last[i]:
            return rows.reshape(shape).to(self.dtypes[i])
        return rows.reshape(shape[:1] + shape[2:] + shape[1:2]).movedim(-1, 1).to(self.dtypes[i])

    def _rows(self, leaf: Tensor, i: int) -> Tensor:
        return (leaf.movedim(1, -1) if self.channels_last[i] else leaf).reshape(self.batch, self.sizes[i])

    def _check(self, leaf: Any, i: int, name: str) -> None:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(f"{name} must return floating-point tensors, got {describe(leaf)}")
        if leaf.shape != self.shapes[i] or leaf.device != self.device:
            raise ValueError(
                f"{name} must keep the shape and device of z0: wanted {tuple(self.shapes[i])} on {self.device}, "
                f"got {describe(leaf)}"
            )


class Ragged(Layout):
    """A layout whose samples are disjoint sets of rows, such as the graphs of a batch: each is padded with zero rows.

    Args:
        state: The example, each leaf [rows, ...].
        sample_of: The number of the sample that each row belongs to, [rows], in any order.
        name: What errors call the state.

    Raises:
        TypeError: `sample_of` is not a tensor of integers.
        ValueError: It has another number of entries than the state has rows, or is negative somewhere.
    """

    def __init__(self, state: Any, sample_of: Tensor, name: str = "z0"):
        super().__init__(state, 1, name)
        if not isinstance(sample_of, Tensor) or sample_of.is_floating_point() or sample_of.dtype == torch.bool:
            raise TypeError(f"sample_of must be a tensor of integers, got {describe(sample_of)}")
        if sample_of.shape != self.batch_shape:
            raise ValueError(
                f"sample_of has shape {tuple(sample_of.shape)}, and {name} has {self.batch} rows, each of which needs "
                "the number of its sample; a state of features by nodes has to be transposed"
            )
        index = sample_of.to(self.device, torch.long)
        if index.numel() and index.min() < 0:
            raise ValueError("sample_of must not be negative")
        counts = torch.bincount(index)
        self._rows_of = list(self.sizes)
        self._longest = int(counts.max()) if len(counts) else 0
        self.batch = len(counts)
        self.batch_shape = counts.shape
        order = torch.argsort(index, stable=True)
        begin = (counts.cumsum(0) - counts)[index[order]]
        place = torch.empty_like(index)
        place[order] = torch.arange(len(index), device=self.device) - begin
        self._slots = index * self._longest + place
        self.sizes = [size * self._longest for size in self._rows_of]
        self.width = sum(self.sizes)
        self.flat = False

    def _rows(self, leaf: Tensor, i: int) -> Tensor:
        rows = (leaf.movedim(1, -1) if self.channels_last[i] else leaf).reshape(len(self._slots), self._rows_of[i])
        padded = rows.new_zeros(self.batch * self._longest, self._rows_of[i])
        return padded.index_copy(0, self._slots, rows).view(self.batch, self.sizes[i])

    def _unflatten(self, rows: Tensor, i: int) -> Tensor:
        rows = rows.reshape(self.batch * self._longest, self._rows_of[i])
        return super()._unflatten(rows.index_select(0, self._slots), i)


_LEAF = pytree.tree_structure(0)
_FORMS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _channels_last(leaf: Tensor) -> bool:
    """Returns whether each sample is channels last and not in the plain format too; samples may lie apart."""
    form = None if transformed() else _FORMS.get(leaf.ndim)  # vmap can't ask for the format
    return form is not None and leaf[:1].is_contiguous(memory_format=form) and not leaf[:1].is_contiguous()
