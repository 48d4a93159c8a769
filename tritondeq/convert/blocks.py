"""One block made of a stack of them: are they alike, what becomes of their weights, their dropout and their norms."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dropout import FixedDropout

BATCH_NORM = ("group", "frozen")
_GROUPS, _CHANNELS = 8, 4  # of the GroupNorm that takes a BatchNorm's place: groups at most, channels in one at least
_ATTENTION_DROPOUT = ("attn_drop", "attn_dropout", "attention_dropout")  # read by attention as a number
_PLACE = ("layer_idx", "layer_id", "layer_number")  # what blocks differ in because of where they stand
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def one_block(blocks: list[nn.Module], how: str, first: int, batch_norm: str | None) -> nn.Module:
    """A copy of the first block, with its weights or their means over all, fit to be iterated.

    Args:
        blocks: At least one; they have to be alike.
        how: "mean" or "first".
        first: Index of the first in its stack, for errors.
        batch_norm: What becomes of BatchNorm: "group", "frozen" or None.

    Raises:
        ValueError: the blocks differ in more than their weights; there is a BatchNorm and `batch_norm` is None.
    """
    _require_alike(blocks, first)
    if batch_norm is None:
        refuse_batch_norm(blocks[0], f"block {first}")
    block = copy.deepcopy(blocks[0])
    if how == "mean":
        _average(block, blocks)
    _fix_dropout(block, blocks if how == "mean" else blocks[:1])
    _replace_batch_norm(block, batch_norm, first)
    return block


def refuse_batch_norm(block: nn.Module, name: str) -> None:
    """Raises where statistics of the batch would be part of the map."""
    for path, module in block.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} can't be iterated as it is: its {path or 'block'} is a {type(module).__name__}, which mixes "
                "the samples of a batch and moves its running statistics at every evaluation. With "
                "batch_norm='group' a GroupNorm with its weights takes its place, with batch_norm='frozen' its "
                "running statistics stay as they are"
            )


def convolves(block: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in block.modules())


def leading_dims(block: nn.Module, ndim: int) -> int:
    """How many leading dims of a state of `ndim` dims index samples: 0 where the first one is that of tokens, to
    nn.MultiheadAttention without batch_first, or without a batch."""
    attention = [module for module in block.modules() if isinstance(module, nn.MultiheadAttention)]
    return 0 if any(ndim == 2 or not module.batch_first for module in attention) else 1


def _require_alike(blocks: list[nn.Module], first: int) -> None:
    mine = _description(blocks[0])
    for k, block in enumerate(blocks[1:], first + 1):
        theirs = _description(block)
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            a, b = mine.get(name), theirs.get(name)
            if a != b:
                said = (f"has {name} {b}" if b else f"has no {name}"), (f"has {a}" if a else "has none")
                raise ValueError(
                    f"block {k} can't share one cell with block {first}: it {said[0]}, and block {first} {said[1]}. "
                    "Blocks that change the shape or differ in kind stay explicit, by prelude= and coda=; or give a "
                    "cell= of your own"
                )


def _description(block: nn.Module) -> dict[str, str]:
    """All that blocks have to have in common: kinds of modules, their settings, shapes of tensors."""
    said = {}
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        if _rate(module) is not None:
            continue
        said[path or "kind"] = type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and name not in (*_PLACE, *_ATTENTION_DROPOUT):
                if isinstance(value, bool | int | float | str | tuple):
                    said[prefix + name] = repr(value)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                said[prefix + name] = f"of shape {tuple(tensor.shape)}"
    return said


@torch.no_grad()
def _average(block: nn.Module, blocks: list[nn.Module]) -> None:
    """Parameters and floating-point buffers of `block` become their means over `blocks`."""
    rest = [dict([*other.named_parameters(), *other.named_buffers()]) for other in blocks]
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor.copy_(torch.stack([other[name].to(wide) for other in rest]).mean(0))


def _rate(module: nn.Module) -> float | None:
    """Share that a module drops; None if it does not drop. nn.Identity stands for what drops nothing."""
    if type(module) is nn.Identity:
        return 0.0
    if type(module) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, FixedDropout):
        return float(module.p)
    if type(module).__name__ == "StochasticDepth":
        return float(module.p)
    if type(module).__name__ == "DropPath":
        return float(module.drop_prob or 0.0)
    return None


def _dims(module: nn.Module) -> int | None:
    """How many leading dims share one value of the mask."""
    if type(module).__name__ == "DropPath":
        if not getattr(module, "scale_by_keep", True):
            raise ValueError("DropPath with scale_by_keep=False has no FixedDropout: take scale_by_keep=True")
        return 1
    if type(module).__name__ == "StochasticDepth":
        return 1 if module.mode == "row" else 0
    if isinstance(module, FixedDropout):
        return module.dims
    return None if type(module) is nn.Dropout else 2


def _fix_dropout(block: nn.Module, blocks: list[nn.Module]) -> None:
    """What drops becomes a FixedDropout of the mean share over `blocks`; attention's weights are not dropped."""
    for path, module in list(block.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        for name in _ATTENTION_DROPOUT:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if not path or _rate(module) is None:
            continue
        peers = [other.get_submodule(path) for other in blocks]
        dropping = [peer for peer in peers if type(peer) is not nn.Identity]
        if dropping:
            share = sum(map(_rate, peers)) / len(peers)
            if path.rpartition(".")[2] in _ATTENTION_DROPOUT:
                share = 0.0
            fixed = FixedDropout(share, _dims(dropping[0]))
            _put(block, path, fixed.train(module.training))


def _replace_batch_norm(block: nn.Module, how: str | None, first: int) -> None:
    for path, module in list(block.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if type(module) not in _BATCH_NORMS:
            raise ValueError(
                f"block {first} can't be converted: batch_norm={how!r} knows torch's own BatchNorm, and its "
                f"{path or 'block'} is a {type(module).__name__}"
            )
        made = FrozenBatchNorm(module) if how == "frozen" else _group_norm(module)
        _put(block, path, made.train(module.training))


def _group_norm(norm: nn.modules.batchnorm._BatchNorm) -> nn.GroupNorm:
    channels = norm.num_features
    groups = max(g for g in range(1, _GROUPS + 1) if channels % g == 0 and (g == 1 or channels // g >= _CHANNELS))
    group = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
    group.weight, group.bias = norm.weight, norm.bias
    return group


class FrozenBatchNorm(nn.Module):
    """BatchNorm by its running statistics, in train() too; its weight and bias still train.

    Raises:
        ValueError: it tracks none.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        if norm.running_mean is None:
            raise ValueError("batch_norm='frozen' needs running statistics, and a BatchNorm tracks none")
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}"


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)
