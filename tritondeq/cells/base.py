"""What a cell is. Any nn.Module with `forward(z, x)` is one; `Cell` adds the hooks by which a cell describes itself."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..held import hooked
from ..kernels.dispatch import WholeSolve
from ..kernels.rules import EPS
from ..kernels.tails import Tail
from ..layout import Layout, pytree
from ..solvers import Picard, Solver
from ..solvers.splitting import Splitting


class Cell(nn.Module):
    """f(z, u) with u = inject(x): one evaluation of the map whose fixed point a DEQ returns.

    A subclass defines `forward`. Every other hook has a default, which its docstring gives:

        inject, padded, initial, counts  what a solve needs of x: once per solve
        extend, remember               for `DEQ.step`, which solves token by token: once per step
        default_solver, default_tol    of a `DEQ` that is given none
        whole_solve, tail, splitting   for kernels and for splitting solvers; for a subclass that overrides `forward`
                                       they count only where it overrides them too

    The cells of this package raise TypeError or ValueError for an option that is of the wrong kind or out of range, and
    for an x that does not fit.

    Attributes:
        batch_dims: Leading dims of the state that index samples; -1 where each row is a sample.
    """

    batch_dims = 1

    def inject(self, x: Any) -> Any:
        """Returns all that does not depend on z, a tensor or any nesting of them; by default x."""
        return x

    def padded(self, x: Any, mask: Any) -> tuple[Any, Any]:
        """Returns (x for `inject`, mask of norms) where a layer is called with a mask; by default as they are."""
        return x, mask

    def initial(self, x: Any, injection: Any) -> Any:
        """Returns the state where a solve without `z0` starts; by default zeros like x."""
        return torch.zeros_like(x)

    def counts(self, injection: Any) -> Any:
        """Returns the mask of a solve without one, as `DEQ.solve` takes it; by default None: all elements count."""
        return None

    def forward(self, z: Any, injection: Any) -> Any:
        """Returns f(z, u), of the structure, shapes and device of z."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z, injection)")

    def extend(self, x: Any, past: Any) -> Any:
        """Returns the injection of tokens x that follow those in `past`, which is None if x are the first.

        Tokens must not depend on later ones. By default a cell can not be solved token by token.
        """
        raise NotImplementedError(f"{type(self).__name__} must define extend(x, past) to be solved token by token")

    def remember(self, z: Any, injection: Any) -> Any:
        """Returns the `past` of tokens to come, such as keys and values at the solution z; it may serve again."""
        raise NotImplementedError(f"{type(self).__name__} must define remember(z, injection), as extend(x, past)")

    def default_solver(self) -> Solver:
        """Returns the solver of a DEQ that is given none; by default Picard()."""
        return Picard()

    def default_tol(self) -> float | None:
        """Returns the tolerance of a DEQ that is given none; by default None: by the dtype of the state."""
        return None

    def whole_solve(self, injection: Any) -> WholeSolve | None:
        """Returns the op whose kernels hold this cell and solve it in one launch or one a step; by default None."""
        return None

    def tail(self, injection: Any) -> tuple[Callable[[Any, Any], tuple[Any, ...]], Tail] | None:
        """Returns a function g and a Tail t with f(z, u) = t(z, *g(z, u)); by default None.

        A fused step applies the tail (sums, LayerScale, the RMS norm, an activation, damping) as it reads.
        """
        return None

    def splitting(self, injection: Any) -> Splitting | None:
        """Returns a monotone cell as solvers that split operators need it; by default None."""
        return None

    @torch.no_grad()
    def residuals(self, z: Any, injection: Any) -> Any:
        """Returns ||f(z) - z|| / ||f(z)|| over the last dim of each tensor of the state, by one evaluation.

        It is [B, T] for a state [B, T, D], in float32 (float64 in float64). Elements outside the mask of `counts` do
        not count, so padding gets 0. Call it as `cell.residuals(z, cell.inject(x))`, in eval() if there is dropout.
        """
        images, counts = self(z, injection), self.counts(injection)
        leaves, spec = pytree.tree_flatten(z)
        masks = pytree.tree_leaves(counts) if isinstance(counts, tuple | list | dict) else [counts] * len(leaves)
        residuals = []
        for leaf, image, mask in zip(leaves, pytree.tree_leaves(images), masks, strict=True):
            layout = Layout(leaf, -1, "z")
            counted = layout.mask(mask)
            y = layout.pack(image)
            defect = y - layout.pack(leaf, "z")
            if counted is not None:
                defect, y = torch.where(counted, defect, 0.0), torch.where(counted, y, 0.0)
            relative = torch.linalg.vector_norm(defect, dim=1) / (torch.linalg.vector_norm(y, dim=1) + EPS)
            residuals.append(layout.per_sample(relative))
        return pytree.tree_unflatten(residuals, spec)

    def extra_repr(self) -> str:
        values = {name: vars(self).get(name) for name in inspect.signature(type(self).__init__).parameters}
        return ", ".join(f"{k}={v!r}" for k, v in values.items() if isinstance(v, bool | int | float | str | tuple))


def floating(x: Any, cell: nn.Module) -> None:
    """Raises TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype).removeprefix("torch.") + " tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor for {type(cell).__name__}, got {got}")


def features_of(x: Any, features: int, cell: nn.Module) -> None:
    """Raises unless x is a floating-point tensor [..., features]."""
    floating(x, cell)
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(
            f"x must have {features} features in its last dim for {type(cell).__name__}, got shape {tuple(x.shape)}"
        )


def one_of(name: str, value: str, options: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def is_linear(layer: nn.Module) -> bool:
    """Returns whether the layer is its weight and bias and nothing else, so that a cell may read these."""
    return type(layer).forward is nn.Linear.forward and "forward" not in vars(layer) and not hooked(layer)
