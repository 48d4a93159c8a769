"""What torchdeq has around its layer: norms, dropout and losses."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from ..checks import number
from ..held import FixedDropout, _thread
from ..layout import describe
from .torchdeq_options import config

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTS: dict[type, tuple[str, int]] = dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), ("weight", 0))
_WEIGHTS |= dict.fromkeys(_TRANSPOSED, ("weight", 1))
_NORMED: dict[str, dict[type, Any]] = {"weight_norm": {**_WEIGHTS}, "spectral_norm": {**_WEIGHTS}}
_OF_NORMS = "names dims learn_scale target_norm clip clip_value n_power_iterations eps".split()


class _Gain(nn.Module):
    """The gain of each row of a weight of spectral norm 1."""

    def __init__(self, gain: Tensor, learn: bool):
        super().__init__()
        self.gain = nn.Parameter(gain, requires_grad=learn)

    def forward(self, w: Tensor) -> Tensor:
        return self.gain * w


def apply_norm(
    model: nn.Module,
    norm_type: str = "weight_norm",
    prefix_filter_out: str | list[str] | None = None,
    filter_out: str | list[str] | None = None,
    args: Any = None,
    **norm_kwargs: Any,
) -> None:
    """Parametrizes the weights of linear and convolution layers by torch.nn.utils.parametrizations.

    Args:
        model: Its modules of these very types, or registered by `register_norm_module`, are parametrized in place.
        norm_type: "weight_norm", "spectral_norm" or "none".
        prefix_filter_out: Modules whose names begin with one of these stay as they are.
        filter_out: Modules whose names contain one of these stay as they are.
        args: Options, as in `get_deq`.
        **norm_kwargs: names, dims, learn_scale, target_norm, n_power_iterations, eps: torchdeq's options.

    Raises:
        TypeError, ValueError: An option is unknown or not mapped; the message names it.
    """
    given = config(args, norm_kwargs, *_OF_NORMS)
    norm_type = given.get("norm_type", norm_type)
    if norm_type not in (*_NORMED, "none"):
        raise ValueError(f"norm_type must be weight_norm, spectral_norm or none, got {norm_type!r}")
    if given.get("norm_clip", given.get("clip", False)):
        raise ValueError(
            "norm_clip and clip are not mapped, as no parametrization of torch clips: leave them out, or bound the "
            "norm by tritondeq.cells.Affine(contraction=...)"
        )
    learn = not given.get("norm_no_scale", not given.get("learn_scale", True))
    target = float(given.get("norm_target_norm", given.get("target_norm", 1.0)))
    power = {"n_power_iterations": given.get("sn_n_power_iters", given.get("n_power_iterations", 1))}
    power |= {"eps": given.get("eps", 1e-12)}
    prefixes, parts = ([x] if isinstance(x, str) else x or () for x in (prefix_filter_out, filter_out))
    for path, module in list(model.named_modules()):
        found = _NORMED.get(norm_type, {}).get(type(module))
        if found is None or path.startswith(tuple(prefixes)) or any(part in path for part in parts):
            continue
        asked: Any = given.get("names"), given.get("dims")
        names, dims = ([x] if isinstance(x, str | int) else list(x) for x in (found if None in asked else asked))
        for name, dim in zip(names, dims, strict=True):
            if norm_type == "weight_norm":
                parametrizations.weight_norm(module, name, dim)
                if not learn:
                    gain = module.parametrizations[name].original0  # type: ignore[union-attr, index]
                    gain.requires_grad_(False).fill_(target)  # type: ignore[union-attr, operator]
            else:
                parametrizations.spectral_norm(module, name, dim=dim, **power)
                weight = getattr(module, name)
                shape = [size if i == dim else 1 for i, size in enumerate(weight.shape)]
                parametrize.register_parametrization(module, name, _Gain(weight.new_full(shape, target), learn))
        vars(module)["_deq_normed"] = names


def reset_norm(model: nn.Module) -> None:
    """Does nothing: a solve computes parametrized weights once, from the parameters as they then are.

    Raises:
        TypeError: The model holds a module that torchdeq itself made, which nothing would reset.
    """
    for path, module in model.named_modules():
        if hasattr(module, "_deq_norm") or type(module).__module__.startswith("torchdeq."):
            raise TypeError(f"{path or 'the model'} holds dropout or a norm of torchdeq itself: import them from here")


reset_dropout = reset_deq = reset_norm  # masks are drawn anew by each solve


def remove_norm(model: nn.Module) -> None:
    """Removes what `apply_norm` has added, and leaves the weights as they now are."""
    for module in list(model.modules()):
        for name in vars(module).pop("_deq_normed", ()):
            parametrize.remove_parametrizations(module, name)


def register_norm_module(module_class: type, norm_type: str, names: Any = "weight", dims: Any = 0) -> None:
    """Lets `apply_norm` parametrize these weights of another kind of module, along these dims."""
    _NORMED[norm_type][module_class] = (names, dims)


class VariationalDropout(FixedDropout):
    """`tritondeq.FixedDropout(dropout)`: a mask of the input's shape, drawn once a solve."""

    def __init__(self, dropout: float = 0.5):
        number("dropout", dropout, 0, 1, closed=True)
        super().__init__(dropout)


class _Shared(FixedDropout):
    """One mask value for all tokens of a channel, or for all channels of a token, of states of `ndim` dims.

    Args:
        dropout: Share of channels, or of tokens, that become zero.
        token_first: Whether channels are the last dim, and not the second.
    """

    ndim: ClassVar[int]
    tokens: ClassVar[bool] = False

    def __init__(self, dropout: float = 0.5, token_first: bool = True):
        number("dropout", dropout, 0, 1, closed=True)
        super().__init__(dropout, self.ndim - 1 if self.tokens else 2)
        self.token_first = token_first

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.ndim:
            raise ValueError(f"x must have {self.ndim} dims, got {describe(x)}")
        if self.token_first == self.tokens:  # dims that share a mask value are the last ones already
            return super().forward(x)
        here, there = (1, -1) if self.tokens else (-1, 1)
        return super().forward(x.movedim(here, there)).movedim(there, here)


class VariationalDropout1d(_Shared):
    """Drops channels of [B, L, D], or of [B, D, L] with token_first=False; one mask a solve."""

    ndim = 3


class VariationalDropout2d(_Shared):
    """Drops channels of [B, H, W, D], or of [B, D, H, W] with token_first=False; one mask a solve."""

    ndim = 4


class VariationalDropout3d(_Shared):
    """Drops channels of [B, T, H, W, D], or of [B, D, T, H, W] with token_first=False; one mask a solve."""

    ndim = 5


class VariationalDropToken1d(VariationalDropout1d):
    """Drops tokens of [B, L, D], or of [B, D, L] with token_first=False; one mask a solve."""

    tokens = True


class VariationalDropToken2d(VariationalDropout2d):
    """Drops tokens of [B, H, W, D], or of [B, D, H, W] with token_first=False; one mask a solve."""

    tokens = True


class VariationalDropToken3d(VariationalDropout3d):
    """Drops tokens of [B, T, H, W, D], or of [B, D, T, H, W] with token_first=False; one mask a solve."""

    tokens = True


_WEIGHTINGS: dict[str, Callable[..., float]] = {
    "exp": lambda n, k, gamma=0.8, **_: gamma ** (n - k - 1),
    "linear": lambda n, k, gamma=0.9, bias=0.0, **_: 1 - (n - k - 1) / n * gamma + bias,
    "const": lambda n, k, c=1.0, **_: c,
}


def fp_correction(
    crit: Callable[..., Tensor],
    args: Any,
    weight_func: str | Callable[..., float] = "exp",
    return_loss_values: bool = False,
    **kwargs: Any,
) -> Any:
    """Returns the weighted sum of crit over the states of a solve, and with `return_loss_values` the list of losses.

    Args:
        crit: The loss of one state.
        args: Arguments of crit, each a list with one entry for each state, or one for all.
        weight_func: "exp", "linear", "const", or a function of (number of states, index, **kwargs).
        return_loss_values: Whether to return (loss, list of floats).
        **kwargs: Options of weight_func, such as gamma.
    """
    weigh = _WEIGHTINGS[weight_func] if isinstance(weight_func, str) else weight_func
    lists = [x if isinstance(x, list | tuple) else [x] for x in args]
    n = max(map(len, lists))
    losses = [crit(*(x[k % len(x)] for x in lists)) for k in range(n)]
    total = sum(weigh(n, k, **kwargs) * loss for k, loss in enumerate(losses))
    return (total, [loss.item() for loss in losses]) if return_loss_values else total


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """Estimates ||J||_F^2 / numel of the map whose value at z0 is f0, as torchdeq does: a scalar.

    `tritondeq.jacobian_penalty` needs no graph of one evaluation, and returns one value a sample.
    """
    total = z0.new_zeros(())
    for _ in range(vecs):
        v = torch.randn_like(z0)
        (product,) = torch.autograd.grad(f0, z0, v, retain_graph=True, create_graph=create_graph)
        total = total + product.square().sum()
    return total / vecs / z0.numel()


def mixed_init(z_shape: Any, device: Any = None) -> Tensor:
    """Returns normal numbers of which a random half is zero (Anil et al. 2022)."""
    return torch.randn(*z_shape, device=device) * torch.empty(*z_shape, device=device).bernoulli_(0.5)


def mem_gc(func: Callable[..., Any], in_args: tuple = ()) -> Any:
    """Returns func(*in_args), recomputed in the backward pass with the masks and weights of the solve around it."""
    held = getattr(_thread, "held", None)

    def again(*args: Any) -> Any:
        before, _thread.held = getattr(_thread, "held", None), held
        try:
            return func(*args)
        finally:
            _thread.held = before

    return checkpoint(again, *in_args, use_reentrant=False)
