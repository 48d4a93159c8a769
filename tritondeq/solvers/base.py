"""What a solver is: a frozen dataclass of options that proposes the next iterate. It knows nothing of gradients."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ..kernels.rules import Rules


class Solver(ABC):
    """Proposes iterates for a batch of independent samples, each a row of a [B, N] matrix.

    Attributes:
        fused_steps: Name of the op whose kernels take the same steps, told the fields; None if there is none.
    """

    fused_steps: ClassVar[str | None] = None

    def __init_subclass__(cls, **options: Any):
        """A subclass with a `step` of its own inherits no kernels: they would take its parent's."""
        super().__init_subclass__(**options)
        if "step" in vars(cls):
            if "fused_steps" not in vars(cls):
                cls.fused_steps = None
            if "fused" not in vars(cls):
                cls.fused = Solver.fused

    @abstractmethod
    def init(self, z: Tensor, mask: Tensor | None) -> Any:
        """Working memory for a solve that starts at `z` [B, N]; `mask` [B, N] bool marks the elements that count."""

    @abstractmethod
    def step(self, memory: Any, z: Tensor, y: Tensor, g: Tensor, seen: Tensor, rules: Rules) -> Tensor:
        """The next iterate [B, N], a tensor of its own or `y`.

        Args:
            memory: What `init` returned; updated in place.
            z: The iterate.
            y: f(z); not to be written to.
            g: y - z.
            seen: g, zero where the mask is False; what norms and inner products are made of.
            rules: Stop rules after this evaluation; `rules.rel` and `rules.best` say how it went.
        """

    def estimate(self, memory: Any) -> Any:
        """What working memory knows of the inverse Jacobian after a solve, for `resume`; None if nothing."""
        return None

    def resume(self, memory: Any, estimate: Any) -> None:
        """Lets a solve of the transposed problem begin with that."""
        raise NotImplementedError(f"{type(self).__name__} makes no estimate")

    def fused(self) -> dict[str, float] | None:
        """The whole-solve kernels' arguments for this solver, or None if no kernel has it."""
        return None
