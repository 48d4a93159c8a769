"""Cases of the ops on whole rows and groups: norms/*.py."""

from contextlib import nullcontext

import torch

from tritondeq.kernels import dispatch, launch, rules

from .cases import Outcome, case, off

DTYPES = (torch.float32, torch.float64)


def compared(op, inputs, rest, choice=None, sharp=False) -> Outcome:
    """Runs an op on tensors and other arguments, and compares what it returns with its reference.

    Where that loses digits in float32 and the op does not, it is `sharp`: the reference's error does not count.
    """
    run = dispatch.load(op)
    with launch.override(op, choice) if choice else nullcontext():
        got = run.run(*inputs, *rest)
    single, wide = ([x if x is None or x.dtype == torch.bool else x.to(d) for x in inputs] for d in DTYPES)
    eager, exact = run.ref(*single, *rest), run.ref(*wide, *rest)
    eager = exact if sharp else eager
    pairs = [(got, eager, exact)] if isinstance(got, torch.Tensor) else zip(got, eager, exact, strict=True)
    outcome = Outcome(())
    for one, near, true in pairs:
        if one is not None:
            outcome.bits += (one,)
            one, near, true = (x.reshape(-1, x.shape[-1]) if x.dim() == 2 else x for x in (one, near, true))
            outcome.compare(one, off(near, true), true)
        elif near is not None:
            outcome.wrong.append("a result is missing")
    return outcome


def group_norm(batch, channels, size, groups, *, sum=False, relu=None, dtype=torch.float32, offset=0.0, choice=None):
    """Normalises an image, or a sum of two."""
    a, b = (torch.randn(batch, *size, channels).movedim(-1, 1) for _ in range(2))
    a = (a + offset).to(dtype)
    weight, bias = torch.randn(channels), torch.randn(channels)
    inputs = a, b.to(dtype) if sum else None, weight, bias
    return compared("norms.group_norm", inputs, (groups, 1e-5, relu), choice, sharp=offset > 0)


@case(
    smoke="whole",
    one_pixel={"size": (1, 1)},
    one_pixel_each={"size": (1, 1), "batch": 1, "channels": 4, "groups": 2},
    one_channel={"channels": 1, "groups": 1, "size": (3, 3)},
    whole={"sum": True, "relu": "before"},
    after={"relu": "after"},
    plain={"batch": 1, "size": (40,)},
    bf16={"sum": True, "dtype": torch.bfloat16, "relu": "after"},
    fp16={"dtype": torch.float16},
    offset={"offset": 1000.0},
    warps={"size": (30, 5), "choice": {"num_warps": 4}},
    shipped={"channels": 4, "groups": 1, "size": (1000,), "batch": 1},
)
def group_norm_whole(batch=2, channels=15, size=(7, 5), groups=5, **options):
    return group_norm(batch, channels, size, groups, **options)


@case(
    smoke="before",
    before={"sum": True, "relu": "before"},
    after={"relu": "after"},
    bf16={"dtype": torch.bfloat16},
    offset={"offset": 1000.0},
    warps={"choice": {"BLOCK_P": 32, "num_warps": 2}, "size": (90,), "channels": 60},
    shipped={"choice": None, "channels": 3, "groups": 1, "size": (1, 2049), "batch": 1},
)
def group_norm_split(batch=2, channels=15, size=(7, 11), groups=3, **options):
    choice = {"BLOCK_P": 32} if size == (7, 11) else None
    return group_norm(batch, channels, size, groups, **{"choice": choice} | options)


@case(
    smoke="some",
    one={"features": 1},
    some={},
    sum_unkept={"keep": False},
    no_gamma={"gamma": False},
    no_weight={"weight": False, "gamma": False, "keep": False},
    one_row={"rows": 1},
    bf16={"b_dtype": torch.bfloat16},
    both_bf16={"dtype": torch.bfloat16, "b_dtype": torch.bfloat16},
    warps={"choice": {"BLOCK_R": 8, "num_warps": 4}},
    wide={"features": 1025, "rows": 2},
    widest={"features": 8192, "rows": 2},
)
def residual_rms(
    rows=37,
    features=100,
    *,
    gamma=True,
    weight=True,
    keep=True,
    dtype=torch.float32,
    b_dtype=torch.float32,
    choice=None,
):
    a, b = torch.randn(rows, features).to(dtype), torch.randn(rows, features).to(b_dtype)
    vectors = [torch.randn(features).to(dtype) if there else None for there in (gamma, weight)]
    return compared("norms.residual_rms", (a, b, *vectors), (1e-6, keep), choice)


@case(
    smoke="masked",
    one={"width": 1, "batch": 1},
    some={},
    masked={"masked": True},
    warps={"choice": {"BLOCK_R": 8, "num_warps": 4}},
    wide={"width": 1025, "batch": 2},
    widest={"width": 8192, "batch": 2, "masked": True},
)
def unit(batch=37, width=100, *, masked=False, choice=None):
    """Samples of all sizes that float32 has; one is zero."""
    g = torch.randn(batch, width).clamp(-4, 4) * 10.0 ** torch.linspace(-37, 37, batch)[:, None]
    g[batch // 2] = 0.0 if batch > 2 else 1.0
    return compared("norms.unit", (g, torch.rand(batch, width) > 0.3 if masked else None), (), choice)


@case(
    smoke="masked",
    one={"width": 1, "batch": 1},
    based={"based": True},
    masked={"masked": True},
    warps={"choice": {"BLOCK_R": 8, "num_warps": 4}},
    wide={"width": 1025, "batch": 2},
    widest={"width": 8192, "batch": 2, "masked": True, "based": True},
)
def residual_far(batch=37, width=100, *, masked=False, based=False, choice=None):
    """Residuals that are reported as half of what they are, or twice; some samples are small beside their start."""
    op = dispatch.load("norms.residual")
    y, start = (torch.randn(batch, width) for _ in range(2))
    y[: batch // 3] *= 1e-6
    z, mask = y + 1e-2 * torch.randn(batch, width), torch.rand(batch, width) > 0.3 if masked else None
    base = torch.rand(batch) if based else None
    far = torch.arange(batch) % 2 == 0
    reported = rules.residual(y, z, base, start, mask, 1e-13) * torch.where(far, 0.5, 2.0) / 3
    with launch.override("norms.residual", choice) if choice else nullcontext():
        got = op.run(y, z, base, start, mask, reported, scale=1e-13, factor=3.0, least=0.0)
    outcome = Outcome((got,))
    outcome.expect(got == far, "whether the residual is far", got, far)
    return outcome
