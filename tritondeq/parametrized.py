"""Parametrized tensors of a cell (torch.nn.utils.parametrize): computed once a solve, as its weights are."""

import contextlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Parametrized:
    """The parametrized tensors of a module, such as those of spectral_norm or weight_norm.

    `values` are made when this is, under the grad mode of then; while they are `held` the module finds them in place of
    computing its own. A caller hands them to f as an argument, so that they are differentiated and captured as any
    other is. (parametrize.cached() would keep what the solve made under no_grad, without a gradient.)
    """

    def __init__(self, module: nn.Module):
        found = [m for m in module.modules() if parametrize.is_parametrized(m)]
        pairs = [(m, name) for m in found for name in m.parametrizations]
        self.lists = [m.parametrizations[name] for m, name in pairs]
        self.values = tuple(getattr(m, name) for m, name in pairs)

    @contextlib.contextmanager
    def held(self, values: tuple[Tensor, ...]) -> Iterator[None]:
        """For one evaluation of the module."""
        givens = [_GIVEN.setdefault(made_of, _Given()) for made_of in self.lists]
        before = [given.value for given in givens]  # a DEQ within a DEQ finds what the outer one holds
        for made_of, given, value in zip(self.lists, givens, values, strict=True):
            made_of.forward, given.value = given, value
        try:
            yield
        finally:
            for made_of, given, value in zip(self.lists, givens, before, strict=True):
                given.value = value
                if value is None:
                    del made_of.forward


class _Given:
    """What a ParametrizationList calls while its value is held."""

    value: Tensor | None = None

    def __call__(self) -> Tensor:
        return self.value


_GIVEN: WeakKeyDictionary[nn.Module, _Given] = WeakKeyDictionary()  # kept: a compiler guards on who they are
