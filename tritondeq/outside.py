"""What a compiler leaves to Python; imported while one traces, for this import brings torch's compiler with it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .guards import NO_GRAPH

_known = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.7 on


def _call(work: Callable, *args: Any) -> Any:
    return work(*args)


outside = torch.compiler.disable(_call, **({"reason": NO_GRAPH} if _known else {}))  # with fullgraph=True, says why
