"""A trained equilibrium or loop at other tolerances and numbers of steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

import tritondeq as tdeq

from . import contestants as who


def core(body: nn.Module) -> tdeq.DEQ | None:
    """The part of a contestant's body that iterates, an equilibrium or a loop; None in a stack."""
    inner = body.core if isinstance(body, who.Hybrid) else body
    return inner if isinstance(inner, tdeq.DEQ) else None


@contextmanager
def changed(core: tdeq.DEQ, **fields: Any) -> Iterator[None]:
    """With other fields, such as `tol`."""
    old = {name: getattr(core, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(core, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(core, name, value)


def taking(core: tdeq.DEQ, steps: int, tol: float) -> Any:
    """`changed`: a loop takes that many steps, an equilibrium at most, which stops at `tol`."""
    looped = isinstance(core.adjoint, tdeq.Unrolled)
    return changed(core, **({"adjoint": tdeq.Unrolled(steps)} if looped else {"max_steps": steps, "tol": tol}))
