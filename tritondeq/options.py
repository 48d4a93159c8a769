"""The options of a solve, checked, and what the forward and the backward solve need of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .adjoints import Adjoint, Implicit, Unrolled
from .checks import boolean, integer, number
from .layout import Layout, Ragged
from .loop import Estimate, Settings
from .solvers import Broyden, Picard, Solver
from .solvers.splitting import SplittingSolver


@dataclass(frozen=True)
class Options:
    """Arguments of `fixed_point`."""

    solver: Solver
    adjoint: Adjoint
    tol: float | None = None
    atol: float = 0.0
    max_steps: int = 50
    mask: Any = None
    trace: bool = False
    group: Any = None
    throw: bool = False
    at: tuple[int, ...] = ()
    callback: Callable[[int, Any, Tensor], None] | None = None
    sample_of: Tensor | None = None

    def check(self) -> None:
        """Raises TypeError or ValueError unless these are what `fixed_point` takes."""
        solver, adjoint = self.solver, self.adjoint
        if not isinstance(solver, Solver):
            raise TypeError(f"solver must be a Solver such as Picard(), got {solver!r}")
        if not isinstance(adjoint, Adjoint):
            raise TypeError(f"adjoint must be an Adjoint such as Implicit(), got {adjoint!r}")
        if isinstance(adjoint, Unrolled) and not isinstance(solver, Picard):
            raise ValueError(f"adjoint Unrolled differentiates Picard steps only, got solver {solver!r}")
        if isinstance(adjoint, Implicit) and adjoint.reuse and not isinstance(solver, Broyden):
            raise ValueError(
                f"adjoint Implicit(reuse=True) needs the inverse estimate of Broyden, got solver {solver!r}"
            )
        if self.tol is not None:
            number("tol", self.tol, 0)
        number("atol", self.atol, 0, closed=True)
        integer("max_steps", self.max_steps)
        boolean("throw", self.throw)
        if self.at or self.callback is not None:
            self._check_on_the_way()

    def _check_on_the_way(self) -> None:
        """Checks `at` and `callback`."""
        if isinstance(self.solver, SplittingSolver):
            raise ValueError(f"at and callback are for Picard, Anderson and Broyden, got solver {self.solver!r}")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable, got {self.callback!r}")
        most, of = self.max_steps, "max_steps"
        if isinstance(self.adjoint, Unrolled):
            most, of = self.adjoint.steps, "the steps of Unrolled"
        for number_of in self.at:
            integer("at", number_of)
            if number_of > most:
                raise ValueError(f"at must be numbers of evaluations up to {of}, {most}, got {self.at}")

    def layout(self, z0: Any, batch_dims: int) -> Layout:
        """Returns how the state lies in memory; raises TypeError or ValueError where the two do not fit."""
        return Layout(z0, batch_dims) if self.sample_of is None else Ragged(z0, self.sample_of)

    def forward(self, layout: Layout, modules: tuple) -> Settings:
        """Returns what the forward solve needs."""
        tol = self.tol
        if tol is None:
            narrow = any(d.itemsize < 4 for d in layout.dtypes) or torch.is_autocast_enabled(layout.device.type)
            tol = 1e-2 if narrow else 1e-3
        reuse = isinstance(self.adjoint, Implicit) and self.adjoint.reuse and torch.is_grad_enabled()
        group = sharding_group(modules) if self.group is None else self.group
        return Settings(
            *(self.solver, float(tol), self.max_steps, layout.mask(self.mask), group, self.trace),
            scale=self.atol / tol,
            at=self.at,
            callback=self._unpacking(layout),
            leaves=Estimate() if reuse else None,
        )

    def _unpacking(self, layout: Layout) -> Callable[[int, Tensor, Tensor], None] | None:
        """Returns `callback` as a function of the flat state."""
        callback = self.callback
        return callback and (lambda k, z, rel: callback(k, layout.unpack(z.detach()), layout.per_sample(rel)))

    def backward(self, settings: Settings) -> Settings:
        """Returns what the linear systems of the exact adjoint need, which may have other options."""
        names = ("solver", "tol", "max_steps")
        chosen = [getattr(self.adjoint, name, None) for name in names]
        solver, tol, most = [getattr(settings, n) if c is None else c for n, c in zip(names, chosen, strict=True)]
        kept = settings.mask, settings.group
        return Settings(solver, tol, most, *kept, relative=0.0, scale=1.0, estimate=settings.leaves)


def sharding_group(modules: tuple) -> Any:
    """Returns the group over which parameters are sharded as DTensors (FSDP2), or None.

    Raises:
        ValueError: They are sharded over a mesh of several dims.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for module in modules:
        for parameter in module.parameters():
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                if mesh.ndim > 1:
                    raise ValueError(
                        "parameters are sharded over a mesh of several dims: pass group=, the ranks that stop together"
                    )
                return mesh.get_group()
    return None
