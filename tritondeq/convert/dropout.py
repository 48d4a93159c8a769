"""Dropout that draws one mask a solve, in the place of what draws another at each evaluation."""

from typing import Any

from torch import nn

from ..held import FixedDropout, draws

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, FixedDropout)


def fix_dropout(model: nn.Module) -> nn.Module:
    """Replaces each dropout of a cell, or of a model with cells, by a `FixedDropout`, in place, and returns the model.

    Replaced are nn.Dropout (also that of LoRA adapters, once peft has added them), nn.Dropout1d to 3d with one value
    for each sample and channel, and stochastic depth (DropPath of timm and transformers, StochasticDepth of
    torchvision) with one for each sample. Shares and modes, train() or eval(), stay; hooks on what is replaced go. Each
    name under which a dropout is registered gets a `FixedDropout` of its own. A module that one evaluation calls twice
    applies one mask in both calls, and raises where their shapes differ. Outside of a solve each call draws, as before.

    What a forward drops by a function (F.dropout, or attention that reads a number) no module shows: a solve that
    trains raises there.

    Args:
        model: Any module; a dropout itself is not changed, and its `FixedDropout` is returned.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: A module drops as no `FixedDropout` can: nn.MultiheadAttention and recurrent nets within their
            forward, nn.AlphaDropout to other values than 0, a DropPath that does not scale, or all of its input. Then
            nothing has been replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if left := [f"{type(m).__name__} {path!r}" for path, m in model.named_modules() if draws(m) and fixed(m) is None]:
        raise ValueError(f"no FixedDropout can take the place of {', '.join(left)}: set the dropout there to 0")
    places = [(parent, name, part) for parent in model.modules() for name, part in parent._modules.items()]
    replaced = [(parent, name, new) for parent, name, part in places if (new := _replacement(part))]
    for parent, name, new in replaced:
        setattr(parent, name, new)
    return _replacement(model) or model


def fixed(module: Any) -> FixedDropout | nn.Identity | None:
    """Returns the FixedDropout for what drops; nn.Identity, which stands for what drops nothing; else None."""
    kind = type(module).__name__  # those of timm, transformers and torchvision are known by name
    if kind.endswith("DropPath") and hasattr(module, "drop_prob"):
        if module.drop_prob and not getattr(module, "scale_by_keep", True):
            raise ValueError("DropPath with scale_by_keep=False has no FixedDropout: take scale_by_keep=True")
        return FixedDropout(module.drop_prob or 0.0, 1)
    if kind == "StochasticDepth":
        return FixedDropout(module.p, 0 if module.mode == "batch" else 1)
    if type(module) in _DROPOUTS:
        return FixedDropout(module.p, getattr(module, "dims", None if type(module) is nn.Dropout else 2))
    return module if type(module) is nn.Identity else None


def _replacement(module: nn.Module | None) -> FixedDropout | None:
    new = None if isinstance(module, FixedDropout) else fixed(module)
    return new.train(module.training) if isinstance(new, FixedDropout) else None  # type: ignore[union-attr]
