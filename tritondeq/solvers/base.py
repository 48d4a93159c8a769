"""What a solver is: a frozen dataclass of options that proposes the next iterate. Gradients are no part of it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ..kernels.rules import Rules


class Solver(ABC):
    """Proposes iterates for a batch of independent samples, each a row of a [B, N] matrix.

    The solvers of this package raise TypeError or ValueError for an option of the wrong kind or out of range.

    Attributes:
        fused_steps: Name of the op whose kernels take the same steps, given the dataclass's fields, or None.
    """

    fused_steps: ClassVar[str | None] = None

    def __init_subclass__(cls, **options: Any):
        """Gives a subclass that defines `step` no inherited kernels: they would take its parent's steps."""
        super().__init_subclass__(**options)
        if "step" in vars(cls):
            for name in ("fused_steps", "fused"):
                if name not in vars(cls):
                    setattr(cls, name, vars(Solver)[name])

    @abstractmethod
    def init(self, z: Tensor, mask: Tensor | None) -> Any:
        """Returns the history of a solve that starts at `z` [B, N]; `mask` [B, N] bool marks elements that count."""

    @abstractmethod
    def step(self, history: Any, z: Tensor, y: Tensor, g: Tensor, counted: Tensor, rules: Rules) -> Tensor:
        """Returns the next iterate [B, N], a new tensor or `y`.

        Args:
            history: What `init` returned; updated in place.
            z: The iterate.
            y: f(z); not to be written to.
            g: y - z.
            counted: g with zeros where the mask is False; norms and inner products are taken of it.
            rules: Stop rules after this evaluation; `rules.rel` and `rules.best` are its residual and the best one.
        """

    def estimate(self, history: Any) -> Any:
        """Returns what the history holds of the inverse Jacobian after a solve, for `resume`, or None."""
        return None

    def resume(self, history: Any, estimate: Any) -> None:
        """Lets a solve of the transposed problem begin with an estimate."""
        raise NotImplementedError(f"{type(self).__name__} makes no estimate")

    def fused(self) -> dict[str, float] | None:
        """Returns the whole-solve kernels' arguments for this solver, or None if no kernel takes its steps."""
        return None
