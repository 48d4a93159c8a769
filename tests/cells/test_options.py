"""Options and inputs that do not fit are named: in the message stand the name, what fits, and what was given."""

import pytest
import torch

from tritondeq import DEQ, ForwardBackward, PeacemanRachford, fixed_point
from tritondeq.cells import MLP, Affine, Conv, Gated, Monotone, MultiScale, Transformer

KINDS = {
    Affine: {"features": 4},
    Monotone: {"features": 4},
    MLP: {"features": 4},
    Gated: {"features": 4},
    Conv: {"channels": 8},
    MultiScale: {"channels": (8, 8)},
    Transformer: {"features": 12, "heads": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_widths_and_unknown_options(kind):
    first = "channels" if "channels" in KINDS[kind] else "features"
    for value, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        for name in (first, "inputs"):
            given = (value, 8) if kind is MultiScale and name == first else value
            with pytest.raises(error, match=name):
                kind(**(KINDS[kind] | {name: given}))
    with pytest.raises(TypeError, match="layers"):
        kind(**KINDS[kind], layers=2)


@pytest.mark.parametrize("kind", [Affine, Monotone, MLP, Gated])
def test_operands(kind):
    with pytest.raises(ValueError, match="operands.*fp32, bf16.*'fp8'"):
        kind(4, operands="fp8")


@pytest.mark.parametrize(
    "kind, options, error, message",
    [
        (Affine, {"activation": "swish"}, ValueError, "activation.*tanh.*'swish'"),
        (Affine, {"contraction": 0}, ValueError, "contraction"),
        (Monotone, {"margin": 0}, ValueError, "margin must be above 0, got 0"),
        (Monotone, {"margin": -0.5}, ValueError, "margin must be above 0, got -0.5"),
        (Monotone, {"activation": "gelu"}, ValueError, "activation.*relu, tanh.*'gelu'"),
        (Monotone, {"contraction": 0.5}, TypeError, "contraction"),
        (MLP, {"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        (MLP, {"form": "both"}, ValueError, "form.*post, pre.*'both'"),
        (MLP, {"activation": "elu"}, ValueError, "activation.*swiglu.*'elu'"),
        (Gated, {"contraction": -1}, ValueError, "contraction must be above 0, got -1"),
        (Conv, {"channels": 12}, ValueError, "groups=8 must divide.*12"),
        (Conv, {"groups": 16}, ValueError, "groups=16 must divide.*8"),
        (Conv, {"groups": 0}, ValueError, "groups"),
        (Conv, {"kernel_size": 2}, ValueError, "kernel_size must be odd.*2"),
        (Conv, {"expansion": 0.5}, TypeError, "expansion"),
        (Conv, {"dims": 3}, ValueError, "dims must be 1 or 2, got 3"),
        (Conv, {"dropout": 1.0}, ValueError, "p must be"),
        (MultiScale, {"channels": (8,)}, ValueError, r"2 to 4 resolutions, got 1: \(8,\)"),
        (MultiScale, {"channels": (8,) * 5}, ValueError, "2 to 4 resolutions, got 5"),
        (MultiScale, {"channels": (8, 12)}, ValueError, "groups=8 must divide.*12"),
        (MultiScale, {"channels": (8, 0)}, ValueError, r"channels\[1\]"),
        (MultiScale, {"expansion": 0}, ValueError, "expansion"),
        (MultiScale, {"groups": 2.0}, TypeError, "groups"),
        (MultiScale, {"dropout": -1}, ValueError, "p must be"),
        (Transformer, {"heads": 5}, ValueError, "heads=5.*features=12"),
        (Transformer, {"heads": 4, "kv_heads": 3}, ValueError, "kv_heads=3.*heads=4"),
        (Transformer, {"heads": 0}, ValueError, "heads"),
        (Transformer, {"heads": 4, "rotary": 1e4}, ValueError, "even width, got features=12 and heads=4"),
        (Transformer, {"rotary": 0}, ValueError, "rotary"),
        (Transformer, {"rotary": True}, TypeError, "rotary"),
        (Transformer, {"hidden": 0}, ValueError, "hidden"),
        (Transformer, {"wiring": "pre"}, ValueError, "wiring.*outer, damped, head.*'pre'"),
        (Transformer, {"activation": "tanh"}, ValueError, "activation.*swiglu.*'tanh'"),
        (Transformer, {"causal": 1}, TypeError, "causal"),
        (Transformer, {"wiring": "damped", "damping": 1.5}, ValueError, "damping.*1.5"),
        (Transformer, {"wiring": "damped", "damping": 0}, ValueError, "damping"),
        (Transformer, {"damping": 0.5}, ValueError, "damping is for wiring='damped'.*'outer'"),
        (Transformer, {"wiring": "damped", "gamma_max": 0.5}, ValueError, "gamma_max is for wiring='head'.*'damped'"),
        (Transformer, {"wiring": "head", "gamma_max": -1}, ValueError, "gamma_max"),
        (Transformer, {"dropout": 1.0}, ValueError, "p must be"),
    ],
)
def test_options_of_one_cell(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**(KINDS[kind] | options))


@pytest.mark.parametrize(
    "cell, x, error, message",
    [
        (Gated(4, 3), torch.zeros(2, 4), ValueError, "3 features"),
        (MLP(4), torch.zeros(2, 4).long(), TypeError, "floating-point"),
        (Conv(8, 3), torch.zeros(2, 4, 5, 5), ValueError, r"\[B, 3, H, W\] for Conv.*\(2, 4, 5, 5\)"),
        (Conv(8, 3, dims=1), torch.zeros(2, 3, 5, 5), ValueError, r"\[B, 3, L\] for Conv"),
        (Conv(8, 3), torch.zeros(2, 3, 5, 5).long(), TypeError, "x must be a floating-point.*int64"),
        (Conv(8, 3), [1.0], TypeError, "x must be a floating-point.*list"),
        (Conv(8, 3), torch.zeros(2, 3, 1, 1), ValueError, "groups=8 of 8 channels.*1 x 1 image"),
        (MultiScale((8, 8), 3), torch.zeros(2, 4, 5, 5), ValueError, r"\[B, 3, H, W\].*\(2, 4, 5, 5\)"),
        (MultiScale((8, 8), 3), torch.zeros(2, 3, 5), ValueError, r"\[B, 3, H, W\] for MultiScale"),
        (MultiScale((16, 8), 3), torch.zeros(2, 3, 2, 2), ValueError, "groups=8 of 8 chan.*1 x 1 image"),
        (Transformer(12, heads=2), torch.zeros(2, 3, 5), ValueError, r"12 features.*\(2, 3, 5\)"),
        (Transformer(12, heads=2), torch.zeros(3, 12), ValueError, r"\[batch, tokens, 12\].*\(3, 12\)"),
        (Transformer(12, heads=2), torch.zeros(2, 3, 12).long(), TypeError, "int64"),
        (Transformer(12, heads=2), (torch.zeros(1, 3, 12), torch.ones(1, 4).bool()), ValueError, r"\(1, 3\).*\(1, 4\)"),
        (Transformer(12, heads=2), (torch.zeros(2, 3, 12), torch.ones(2, 3)), TypeError, "mask.*float32"),
        (Transformer(12, heads=2), (torch.zeros(2, 3, 12),) * 3, TypeError, "tuple"),
    ],
    ids=str,
)
def test_inputs(cell, x, error, message):
    with pytest.raises(error, match=message):
        DEQ(cell)(x)


def test_splittings():
    for alpha, error in ((0, ValueError), (-1, ValueError), ("1", TypeError)):
        for solver in (PeacemanRachford, ForwardBackward):
            with pytest.raises(error, match="alpha must be"):
                solver(alpha)
    with pytest.raises(ValueError, match="splitting"):
        DEQ(Affine(4), solver=PeacemanRachford())(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="splitting"):
        fixed_point(torch.cos, torch.zeros(1, 1), solver=ForwardBackward())
