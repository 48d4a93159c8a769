"""A stack of residual blocks as an equilibrium of one of them."""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from ..cells import Cell
from ..checks import integer, number
from ..deq import DEQ
from ..solution import Solution
from .blocks import one_block, refuse_batch_norm
from .midpoint import Call, ImplicitMidpoint


def to_equilibrium(
    stack: Iterable[nn.Module],
    *,
    cell: str | nn.Module = "mean",
    prelude: int = 0,
    coda: int = 0,
    injection: str | nn.Module = "add",
    norm: str | nn.Module | None = "outer",
    gain: float = 1.0,
    batch_norm: str | None = None,
    unroll: int | None = None,
    **options: Any,
) -> "EquilibriumStack":
    """Replaces all but the first and last few of a stack of residual blocks of one shape by one equilibrium layer.

    With F one block, x what enters the layer, r = rms(x) for each token (for an image: for each sample):

        z* = N(x + gain (F(y) - y)),   y = (x + z*) / 2,   N(v) = r v / rms(v)

    This is the implicit midpoint rule for the residual flow dh/dt = F(h) - h that the stack takes n explicit steps of;
    `gain` is the step, in blocks. A block alone has no fixed point, for z + g(z) only grows. Here z enters through the
    block's increment alone, and N bounds the state: whatever continuous F is, N maps a ball into itself, so an
    equilibrium exists (Brouwer), and the output has the scale of the input, which the blocks behind expect. Iteration
    starts at x, by `Picard(0.8)` by default: what a block erases comes back with a slope of -gain/2, which that damps.

    With random weights it takes 2 to 15 undamped evaluations to 1e-3 (`python -m tritondeq.bench.wirings`). With
    weights four times as large, encoders may not converge: watch `last.steps` as it trains, lower `gain`, or take
    Anderson. The layer does not compute what the stack did: a converted net has to be trained.

    The returned container takes the stack's place, called or looped over. Where the stack is a slice, it is added to
    the blocks around, of an nn.ModuleList or nn.Sequential: `blocks[:2] + to_equilibrium(blocks[2:10]) + blocks[10:]`.
    Further arguments of a call (masks, positions) go to the block unchanged at every evaluation; their tensors get
    gradients. Further outputs of the block are those at z*. A `DynamicCache` of transformers is filled with keys and
    values at z*, so that generation token by token is right; other caches raise. A sample is an index of the first dim;
    nn.MultiheadAttention without batch_first makes one of the whole batch. Forward hooks in the block see one call, at
    z*, and those of the block itself see it go from x to z*, as the layer does; a hook that returns a value is part of
    F. In the cell, dropout and stochastic depth become `FixedDropout`, and weights of attention are not dropped. A
    state dict is loaded by a model that was converted alike; that of a plain stack raises, strict or not.

    Args:
        stack: Blocks `forward(x, ...)` that return x's successor, or a tuple that begins with it, in any iterable. It
            stays as it is, and the blocks before and behind are not copied.
        cell: "mean": F's parameters and floating-point buffers are the means over the blocks replaced; "first": those
            of the first of them. Or a module with a block's signature, taken as it is.
        prelude: How many blocks stay before the layer.
        coda: How many blocks stay behind it.
        injection: "add": y = (x + z) / 2; or a module that returns y for (z, x), of x's shape.
        norm: N. "outer" is "sample" where x has four dims or more and the block a convolution, else "tokens": rms over
            the last dim. "sample": rms over all dims but the first. A module is called in place of N. None: no N; an
            equilibrium then needs a block that bounds its increments.
        gain: Scale of the block's increment, above 0.
        batch_norm: BatchNorm in a cell would mix samples and count evaluations, so it raises by default. With "group" a
            GroupNorm with its weight and bias takes its place (to train from scratch); with "frozen" its running
            statistics stay as they are (to keep trained features).
        unroll: Begin as the weight-tied explicit net of so many evaluations; `unrolled(None)` ends it.
        **options: Of `DEQ`: solver, adjoint, tol, max_steps, ...

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range, or blocks to be replaced differ in shape, kind or settings.
    """
    blocks = _blocks(stack)
    for name, value in (("prelude", prelude), ("coda", coda)):
        integer(name, value, least=0)
    if prelude + coda >= len(blocks):
        raise ValueError(f"prelude={prelude} and coda={coda} leave nothing to replace of {len(blocks)} blocks")
    if batch_norm not in (None, "group", "frozen"):
        raise ValueError(f"batch_norm must be None, 'group' or 'frozen', got {batch_norm!r}")
    number("gain", gain, 0)
    _choice("norm", norm, "outer", "tokens", "sample", None)
    _choice("injection", injection, "add")
    _choice("cell", cell, "mean", "first")
    if isinstance(cell, Cell):
        raise TypeError(f"cell must have the blocks' signature forward(x, ...), got the cell {type(cell).__name__}")
    if isinstance(cell, nn.Module):
        refuse_batch_norm(cell, "cell")
    else:
        cell = one_block(blocks[prelude : len(blocks) - coda], cell, prelude, batch_norm)
    layer = EquilibriumLayer(ImplicitMidpoint(cell, injection, norm, gain, prelude), **options)
    layer.train(blocks[prelude].training)  # a slice of a container forgets its mode
    converted = EquilibriumStack(*blocks[:prelude], layer.unrolled(unroll), *blocks[len(blocks) - coda :])
    converted.training = layer.training
    return converted


def _blocks(stack: Any) -> list[nn.Module]:
    """Returns the blocks of any iterable of them."""
    blocks = list(stack) if isinstance(stack, Iterable) else None
    if blocks is None or not all(isinstance(block, nn.Module) for block in blocks):
        of = " of " + ", ".join(sorted({type(block).__name__ for block in blocks})) if blocks else ""
        raise TypeError(
            "stack must be a sequence of blocks, such as an nn.Sequential, an nn.ModuleList, a slice of one or a list, "
            f"got {type(stack).__name__}{of}"
        )
    if not blocks:
        raise ValueError("stack must have at least one block, got none")
    return blocks


def _choice(name: str, value: Any, *names: str | None) -> None:
    if not isinstance(value, nn.Module) and value not in names:
        raise ValueError(f"{name} must be {', '.join(map(repr, names))} or a module, got {value!r}")


class EquilibriumStack(nn.Sequential):
    """Blocks, one `DEQ`, blocks: called with the arguments of a block, or looped over by the model."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        out = x
        for block in self:
            out = block(out[0] if isinstance(out, tuple) else out, *args, **kwargs)
        return out

    @property
    def deq(self) -> DEQ:
        """The layer."""
        return next(block for block in self if isinstance(block, DEQ))

    @property
    def last(self) -> Any:
        """`last` of the layer: status, steps and residual of its last call."""
        return self.deq.last

    def unrolled(self, steps: int | None, checkpoint: bool = False, last: int | None = None) -> "EquilibriumStack":
        """Calls `DEQ.unrolled` of the layer; returns self."""
        self.deq.unrolled(steps, checkpoint, last)
        return self


class EquilibriumLayer(DEQ):
    """A `DEQ` that is called as the blocks it stands for: `layer(x, *args, **kwargs)`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = Call(x, args, kwargs)
        if call.cached and self.graph:
            raise ValueError("graph=True takes no cache, which a replay would not fill: pass use_cache=False")
        z = self.solve(call).value
        return z if call.further is None else (z, *call.further)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        names = [name for name in state_dict if name.startswith(prefix)]
        if names and not any(name.startswith(f"{prefix}cell.") for name in names):
            *_, errors = args  # they raise, whether strict or not
            errors.append(
                f"{prefix.rstrip('.') or 'the layer'} is an equilibrium, and the state dict has an explicit block "
                "there: load a plain stack before to_equilibrium, a converted one with its prelude= and coda="
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _solve(self, f: Any, x: Any, z0: Any, mask: Any, graphs: Any = None, **way: Any) -> Solution:
        solution, notes = super()._solve(f, x, z0, mask, graphs, **way), f.injection.notes
        call = x if isinstance(x, Call) else Call(x)
        if notes.more is not False or notes.watched or call.cached:
            with f.held.on(f.held.weights):
                out = cast(ImplicitMidpoint, self.cell).at_solution(solution.value, f.injection)
            if out is None:  # a hook is part of the equation, and known to be from now on
                if graphs is not None:
                    graphs.solves.clear()
                return self._solve(f, x, z0, mask, graphs, **way)
            call.further = out[1:] if isinstance(out, tuple) else None
        return solution
