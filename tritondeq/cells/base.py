"""What a cell is. Any nn.Module with `forward(z, x)` is one; this class adds what a cell may tell about itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import integer
from ..kernels.dispatch import WholeSolve
from ..kernels.rules import EPS
from ..kernels.tails import Tail
from ..layout import Layout, pytree
from ..solvers import Picard, Solver
from ..solvers.splitting import Splitting


class Cell(nn.Module):
    """f(z, u) with u = inject(x): one evaluation of the map whose fixed point a DEQ returns.

    A cell whose tokens never look at later ones can be solved token by token, by `DEQ.step`, if it defines two more
    methods: `extend(x, past)`, which is `inject` for tokens that follow others, and `remember(z, injection)`, which
    returns the `past` of those to come: keys and values at the solution z, say.

    Attributes:
        batch_dims: Leading dims of the state that index samples; -1 where each row is a sample of its own.
    """

    batch_dims = 1

    def inject(self, x: Any) -> Any:
        """All that does not depend on z, computed once per solve: a tensor or any nesting of them."""
        return x

    def initial(self, x: Any, injection: Any) -> Any:
        """Where a solve starts unless it is told: zeros like x."""
        return torch.zeros_like(x)

    def counts(self, injection: Any) -> Any:
        """The mask of a solve that is given none: bool, True where an element of the state counts in norms, as
        `DEQ.solve` takes it. None: all do.
        """
        return None

    def forward(self, z: Any, injection: Any) -> Any:
        """f(z, injection), of the structure, shapes and device of z."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z, injection)")

    def extend(self, x: Any, past: Any) -> Any:
        """The injection of tokens x that follow those `past` remembers, None if they are the first."""
        raise NotImplementedError(f"{type(self).__name__} must define extend(x, past) to be solved token by token")

    def remember(self, z: Any, injection: Any) -> Any:
        """What later tokens need of these and those before, z being the solution; `past` may be used again."""
        raise NotImplementedError(f"{type(self).__name__} must define remember(z, injection), as extend(x, past)")

    @torch.no_grad()
    def residuals(self, z: Any, injection: Any) -> Any:
        """||f(z) - z|| / ||f(z)|| over the last dim of each tensor of the state, by one evaluation: [B, T] for a state
        [B, T, D], in float32 (float64 in float64). Elements that `counts` leaves out do not count, so padding gets 0.

        Call it as `cell.residuals(z, cell.inject(x))`, and in eval() if there is dropout.
        """
        images, counts = self(z, injection), self.counts(injection)
        leaves, spec = pytree.tree_flatten(z)
        masks = pytree.tree_leaves(counts) if isinstance(counts, tuple | list | dict) else [counts] * len(leaves)
        found = []
        for leaf, image, mask in zip(leaves, pytree.tree_leaves(images), masks, strict=True):
            layout = Layout(leaf, -1, "z")
            keep = layout.mask(mask)
            start, y = layout.pack(leaf, "z"), layout.pack(image)
            defect = y - start
            if keep is not None:
                defect, y = torch.where(keep, defect, 0.0), torch.where(keep, y, 0.0)
            relative = torch.linalg.vector_norm(defect, dim=1) / (torch.linalg.vector_norm(y, dim=1) + EPS)
            found.append(layout.per_sample(relative))
        return pytree.tree_unflatten(found, spec)

    def whole_solve(self, injection: Any) -> WholeSolve | None:
        """The op whose kernels hold this cell, if there is one: they solve it in one launch, or in one a step."""
        return None

    def tail(self, injection: Any) -> tuple[Callable[[Any, Any], tuple[Any, ...]], Tail] | None:
        """(g, tail) if forward(z, injection) is what `tail` makes of the tuple g(z, injection): sums, LayerScale, the
        RMS norm, an activation, damping. A fused step does it as it reads.
        """
        return None

    def splitting(self, injection: Any) -> Splitting | None:
        """What solvers that split operators are told of a monotone cell."""
        return None

    def default_solver(self) -> Solver:
        """Solver of a DEQ that is given none."""
        return Picard()

    def default_tol(self) -> float | None:
        """Tolerance of a DEQ that is given none; None leaves it to the dtype of the state."""
        return None


def features_of(x: Any, features: int, cell: nn.Module) -> None:
    """Raises unless x is a floating-point tensor [..., features]."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype).removeprefix("torch.") + " tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor for {type(cell).__name__}, got {got}")
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(
            f"x must have {features} features in its last dim for {type(cell).__name__}, got shape {tuple(x.shape)}"
        )


def row_options(features: int, inputs: int | None, operands: str) -> int:
    """`inputs`, or `features` if None, of a cell that treats rows one by one; raises unless all fit."""
    inputs = features if inputs is None else inputs
    integer("features", features)
    integer("inputs", inputs)
    if operands not in ("fp32", "bf16"):
        raise ValueError(f"operands must be 'fp32' or 'bf16', got {operands!r}")
    return inputs
