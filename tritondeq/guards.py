"""What the library notices of a map that is not what a fixed-point problem needs, and how it reports it."""

import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .held import parts_of
from .kernels import devices, dispatch, rules
from .layout import Layout, pytree, transformed
from .loop import Settings
from .problem import Parts
from .solution import Outcome, Route, Status

FAR = 10.0  # times the tolerance or the reported residual: a residual of another evaluation that is worth a warning
NEAR = 1.1  # the same, where both are of torch operations
ULPS = 16.0  # of the narrowest dtype, in which both are blurred


class Watched:
    """The first evaluations of a solve.

    The first evaluation is made with autograd's graph where gradients are wanted, so that what f computes once and
    stores (a table, an orthogonal weight) can be differentiated. By the second, everything that may draw random numbers
    once has drawn: RuntimeError where that one draws by a function that drops.

    Attributes:
        draws: Whether the second evaluation drew random numbers.
    """

    def __init__(self, graph: bool):
        self.graph, self.draws = graph, False

    def early(self, k: int, parts: Parts, z: Tensor) -> tuple[Tensor, ...]:
        """Returns what f's parts are at z, in evaluation k <= loop.WATCHED."""
        if k == 1:
            with torch.set_grad_enabled(self.graph):
                made = parts(z)
            refuse_tangents(made)
            return tuple(part.detach() for part in made)
        before = generator_state(z.device)
        made = parts(z)
        self.draws = not torch.equal(before, generator_state(z.device))
        if self.draws:
            with _NoDropout():
                parts(z)
        return made

    def report(self, outcome: Outcome, settings: Settings, layout: Layout) -> None:
        """Warns where f draws random numbers and samples did not converge, or where samples depend on one another."""
        if self.draws:
            warn_if(outcome.status != Status.CONVERGED, _DRAWS)
        compare_last(outcome, settings, layout)


_DRAWS = (
    "f draws random numbers at every evaluation (dropout, noise), so it is not a function of its state and has no "
    "fixed point: draw them once, outside of f, or use FixedDropout"
)


def generator_state(device: torch.device) -> Tensor:
    """Returns what changes when random numbers are drawn on a device; the host does not wait."""
    if device.type == "cuda":
        return torch.tensor(torch.cuda.default_generators[device.index or 0].get_offset(), device="cpu")
    return torch.default_generator.get_state()


# Functions that drop, with their default for `training`.
_DROPOUTS = {**dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), True), F.alpha_dropout: False}
_DROPOUTS[F.feature_alpha_dropout] = False


class _NoDropout(TorchFunctionMode):
    """Raises where a map drops by a function that it calls, which no module shows."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        share = 0.0
        if func is F.scaled_dot_product_attention:
            share = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        elif func in _DROPOUTS and kwargs.get("training", args[2] if len(args) > 2 else _DROPOUTS[func]):
            share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        if share > 0:
            raise RuntimeError(
                f"the cell calls {func.__name__} with a dropout of {share}, which draws another mask at every step, "
                "so that there is no fixed point: set it to 0 (in attention: attn_drop, attn_pdrop, attention_dropout) "
                "or use tritondeq.FixedDropout"
            )
        return func(*args, **kwargs)


def refuse_export() -> None:
    """Raises RuntimeError where this thread traces for torch.export."""
    if torch.compiler.is_compiling():  # here or in another thread
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        if get_proxy_mode() is not None:
            raise RuntimeError(NO_GRAPH)


TRACEABLE = torch.__version__ >= "2.14"  # whether torch's compiler can follow an unrolled net
NO_GRAPH = (
    "the solve of a DEQ takes as many steps as its residuals ask for, which no single graph holds: export or compile "
    "layer.unrolled(steps), or fixed_point with adjoint=Unrolled(steps), and throw=False (torch 2.14); or compile "
    "without fullgraph=True, which leaves the solve outside, and its cell by DEQ(compile=True)"
)


def refuse_transforms() -> None:
    """Raises RuntimeError inside a transform of torch.func."""
    if transformed():
        raise RuntimeError(
            "transforms of torch.func (grad, vmap, vjp, jvp, ...) around a fixed point are not supported: take "
            "layer.unrolled(steps) or adjoint=Unrolled(steps), which they transform, or torch.autograd and batches"
        )


def refuse_tangents(tree: Any) -> None:
    """Raises RuntimeError where forward-mode differentiation is on and one of these tensors has a tangent."""
    if forward_ad._current_level < 0:
        return
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None:
            raise RuntimeError(
                "forward-mode differentiation (a dual tensor, torch.func.jvp) of a fixed point is not supported: its "
                "tangent would be that of the last steps. Differentiate backward, or use Unrolled(steps)"
            )


_OF_MODULES = vars(nn.Module()).keys() - {"_buffers"}


def leaves_something(modules: tuple[nn.Module, ...]) -> bool:
    """Returns whether modules may have handed out tensors of an evaluation beside what it returned.

    That is, by a forward hook, or in an attribute or a buffer that has a graph. Hooks of FSDP do not count, nor does
    the weight that the old weight_norm and spectral_norm compute.
    """
    for part in parts_of(modules):
        if part._forward_hooks and not any(c.__name__ == "FSDPModule" for c in type(part).__mro__):
            return True
        for name, value in vars(part).items():
            if name in _OF_MODULES or not _has_graph(value):
                continue
            if name not in {getattr(hook, "name", None) for hook in part._forward_pre_hooks.values()}:
                return True
    return False


def _has_graph(value: Any, depth: int = 4) -> bool:
    """Returns whether a tensor, or one in containers up to this depth, has been computed from what requires grad."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    if not isinstance(value, list | tuple | dict | deque) or not depth:
        return False
    return any(_has_graph(leaf, depth - 1) for leaf in (value.values() if isinstance(value, dict) else value))


def compare(image: Tensor, outcome: Outcome, settings: Settings, start: Tensor, layout: Layout) -> None:
    """Warns where the residual of the evaluation at the solution, `image` [B, N], is far above the reported one."""
    y, z, base, mask = image.detach(), outcome.value, outcome.base, settings.mask
    op, _ = dispatch.pick("norms.residual", y.device, y=y)
    if op is None:
        _warn_above(rules.residual(y, z, base, start, mask, settings.scale), outcome, settings, layout)
    else:
        factor, least = _far(outcome, settings, layout)
        limits: dict[str, float] = {"scale": settings.scale, "factor": factor, "least": least}
        warn_if(op.run(y, z, base, start, mask, outcome.residual, **limits), _NOT_A_FUNCTION)  # type: ignore[union-attr]


def compare_last(outcome: Outcome, settings: Settings, layout: Layout) -> None:
    """Warns where a sample that had converged has another residual in the last evaluation, which is of all samples.

    Then it depends on samples that went on; of a backward solve, too.
    """
    last = outcome.last
    if last is None or len(last) == 1 or (last.device.type == "cpu" and torch.equal(last, outcome.residual)):
        return
    last = torch.where(outcome.status == Status.CONVERGED, last, 0.0)
    _warn_above(last, outcome, settings, layout)


def _warn_above(residual: Tensor, outcome: Outcome, settings: Settings, layout: Layout) -> None:
    factor, least = _far(outcome, settings, layout)
    if residual.device.type == "cpu" and residual.numel() and residual.max() <= least:
        return
    warn_if(residual > (factor * outcome.residual).clamp_(min=least), _NOT_A_FUNCTION)


def _far(outcome: Outcome, settings: Settings, layout: Layout) -> tuple[float, float]:
    """Returns (factor, least): a residual above factor times the reported one, and above least, is worth a warning."""
    factor = NEAR if outcome.route in (Route.TORCH, Route.FUSED) else FAR
    return factor, factor * settings.tol + blur(layout)


def blur(layout: Layout) -> float:
    """Returns the relative residual that rounding explains, in the narrowest dtype in which f may compute."""
    kind = layout.device.type
    dtypes = [*layout.dtypes, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
    tf32 = kind == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return ULPS * max(2.0**-10 if tf32 else 0.0, *(torch.finfo(dtype).eps for dtype in dtypes))


_NOT_A_FUNCTION = (
    "the residual at the solution is above the one that the solve reported: either the map is not a function of its "
    "state (dropout, noise, a counter: two evaluations at one state differ), or samples of the batch depend on one "
    "another (BatchNorm, rows that are nodes of a graph: batch_dims=0), so value and gradient are wrong. "
    "tritondeq.diagnose(layer, x) names the cause"
)
_later: deque[tuple[torch.cuda.Event, Tensor, str]] = deque()


def warn_if(bad: Tensor, text: str) -> None:
    """Warns with the text where an element of `bad` is true; without numbers, so that Python shows it once.

    On a GPU the host does not wait: `flush`, in a later solve or backward pass, warns when the answer has arrived.
    """
    if bad.device.type != "cuda":
        if bad.any():
            warnings.warn(text, stacklevel=2)
    elif bad.numel() and not devices.capturing(bad.device):
        host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        host.copy_(bad.any(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(bad.device))
        _later.append((event, host, text))


def flush(wait: bool = False) -> None:
    """Warns of what `warn_if` had to put off and what is known by now; not during a capture, which a query ends.

    With `wait` it waits for the rest.
    """
    while not torch.compiler.is_dynamo_compiling() and _later and not torch.cuda.is_current_stream_capturing():
        try:
            event, host, text = _later.popleft()
        except IndexError:  # another thread took it
            return
        if wait:
            event.synchronize()
        elif not event.query():
            _later.appendleft((event, host, text))
            return
        if host:
            warnings.warn(text, stacklevel=2)
