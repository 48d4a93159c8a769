"""One block made of a stack of them: whether they are alike, their weights, their dropout and their norms."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..held import FixedDropout
from .dropout import fixed

_GROUPS, _CHANNELS = 8, 4  # of the GroupNorm that takes a BatchNorm's place: groups at most, channels in one at least
_ATTENTION_DROPOUT = ("attn_drop", "attn_dropout", "attention_dropout")  # read by attention as a number
_PLACE = ("layer_idx", "layer_id", "layer_number")  # what blocks differ in because of where they stand
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def one_block(blocks: list[nn.Module], how: str, first: int, batch_norm: str | None) -> nn.Module:
    """Returns a copy of the first block, with its weights or their means over all, fit to be iterated.

    Options are those of `to_equilibrium`; `first` is the index of the first block in its stack, for errors.
    """
    _require_alike(blocks, first)
    if batch_norm is None:
        refuse_batch_norm(blocks[0], f"block {first}")
    configs = [module.config for module in blocks[0].modules() if hasattr(module, "config")]
    block = copy.deepcopy(blocks[0], {id(config): config for config in configs})  # the model's, which may change it
    if how == "mean":
        _average(block, blocks)
    _fix_dropout(block, blocks if how == "mean" else blocks[:1])
    for path, module in list(block.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) not in _BATCH_NORMS:
                raise ValueError(
                    f"block {first} can't be converted: batch_norm={batch_norm!r} knows torch's BatchNorm only, and "
                    f"its {path or 'block'} is a {type(module).__name__}"
                )
            norm = FrozenBatchNorm(module) if batch_norm == "frozen" else _group_norm(module)
            _put(block, path, norm.train(module.training))
    return block


def refuse_batch_norm(block: nn.Module, name: str) -> None:
    """Raises where statistics of the batch would be part of the map."""
    for path, module in block.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} can't be iterated as it is: its {path or 'block'} is a {type(module).__name__}, which mixes "
                "the samples of a batch and moves its running statistics at every evaluation. batch_norm='group' puts "
                "a GroupNorm with its weights there, batch_norm='frozen' leaves its running statistics as they are"
            )


def _require_alike(blocks: list[nn.Module], first: int) -> None:
    wanted = _description(blocks[0])
    for k, block in enumerate(blocks[1:], first + 1):
        given = _description(block)
        for name in wanted | given:
            a, b = wanted.get(name), given.get(name)
            if a != b:
                difference = f"{f'has {name} {b}' if b else f'has no {name}'}, and block {first} has {a or 'none'}"
                raise ValueError(
                    f"block {k} can't share one cell with block {first}: it {difference}. Blocks that change the shape "
                    "or differ in kind stay explicit, by prelude= and coda=; or pass a module as cell="
                )


def _description(block: nn.Module) -> dict[str, str]:
    """Returns all that blocks have to have in common: kinds of modules, their settings, shapes of tensors."""
    description = {}
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        if fixed(module):
            continue
        description[path or "kind"] = type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and name not in (*_PLACE, *_ATTENTION_DROPOUT):
                if isinstance(value, bool | int | float | str | tuple):
                    description[prefix + name] = repr(value)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                description[prefix + name] = f"of shape {tuple(tensor.shape)}"
    return description


@torch.no_grad()
def _average(block: nn.Module, blocks: list[nn.Module]) -> None:
    """Sets parameters and floating-point buffers of `block` to their means over `blocks`."""
    rest = [dict([*other.named_parameters(), *other.named_buffers()]) for other in blocks]
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor.copy_(torch.stack([other[name].to(wide) for other in rest]).mean(0))


def _fix_dropout(block: nn.Module, blocks: list[nn.Module]) -> None:
    """Replaces what drops by a FixedDropout of the mean share over `blocks`; attention's weights are not dropped."""
    for path, module in list(block.named_modules(remove_duplicate=False)):
        for name in ("dropout",) if isinstance(module, nn.MultiheadAttention) else _ATTENTION_DROPOUT:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        peers = [fixed(other.get_submodule(path)) for other in blocks] if path and fixed(module) else []
        if dropping := [peer for peer in peers if isinstance(peer, FixedDropout)]:
            attention = path.rpartition(".")[2] in _ATTENTION_DROPOUT
            share = 0.0 if attention else sum(peer.p for peer in dropping) / len(peers)
            _put(block, path, FixedDropout(share, dropping[0].dims).train(module.training))


def _group_norm(norm: nn.modules.batchnorm._BatchNorm) -> nn.GroupNorm:
    channels = norm.num_features
    groups = max(g for g in range(1, _GROUPS + 1) if channels % g == 0 and (g == 1 or channels // g >= _CHANNELS))
    group = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
    group.weight, group.bias = norm.weight, norm.bias
    return group


class FrozenBatchNorm(nn.Module):
    """BatchNorm by its running statistics, in train() too; its weight and bias still train."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        if norm.running_mean is None:
            raise ValueError("batch_norm='frozen' needs running statistics, and a BatchNorm tracks none")
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)
