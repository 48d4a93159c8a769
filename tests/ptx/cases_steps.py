"""Cases of the fused steps of each solver, and of what ends a solve: steps/{picard,anderson,broyden}.py."""

from contextlib import nullcontext

import torch

from tritondeq import Anderson, Broyden, Picard, backend
from tritondeq.kernels import launch
from tritondeq.kernels.tails import Tail
from tritondeq.loop import Estimate, Settings, iterate

from .cases import Outcome, case, solved

SOLVERS = {
    "picard": Picard(),
    "damped": Picard(damping=0.7),
    "anderson1": Anderson(memory=1),
    "anderson3": Anderson(memory=3),
    "anderson8": Anderson(memory=8),
    "half": Anderson(memory=3, half=True),
    "half1": Anderson(memory=1, half=True, damping=0.8),
    "broyden1": Broyden(memory=1),
    "broyden3": Broyden(memory=3),
    "broyden8": Broyden(memory=8),
}
EACH = {name: {"solver": solver} for name, solver in SOLVERS.items()}
FEW = {name: EACH[name] for name in ("picard", "anderson3", "half", "broyden3")}
LONG = ("anderson8", "broyden8")  # rare but where programs share a sample
MOST = FEW | {name: EACH[name] for name in ("anderson8", "broyden8")}


def both(solver, parts, z, tail=None, *, choice=None, mask=None, rings=(), late=0, slack=0.0, **options) -> Outcome:
    """Solves by fused steps and by the solver in torch, and judges them by it in float64.

    Args:
        solver: The solver.
        parts: Returns, for a dtype of the state, the function that makes the parts of y from z.
        z: Where to start, [B, N].
        tail: Returns the Tail for a dtype of the state.
        choice: Launch parameters that replace those of the pure function.
        mask: Elements that count, or None.
        rings: The estimate of the inverse Jacobian with which the solve begins.
        late, slack: As of `solved`.
        options: Of the solve.
    """
    options = {"tol": 1e-4, "max_steps": 10} | options
    rest = {name: options.pop(name) for name in ("relative", "scale") if name in options}
    tail = tail or (lambda dtype: Tail())

    def run(z, *rings, where="torch", tol, max_steps):
        made, end, estimate = parts(z.dtype), tail(z.dtype), Estimate() if rings else None
        if rings:
            estimate.rings = rings
        with backend(where):
            settings = Settings(solver, tol, max_steps, mask, trace=True, estimate=estimate, **rest)
            outcome = iterate(lambda z: end(z, *made(z)), z, settings, (made, end))
        assert ("emulated" in outcome.why) == (where == "triton"), outcome.why
        return outcome.value, outcome.steps, outcome.residual, outcome.status, len(outcome.trace)

    with launch.override(solver.fused_steps, choice) if choice else nullcontext():
        got = run(z, *rings, where="triton", **options)
    outcome = solved(got, run, (z, *rings), options, late=late, slack=slack)
    if got[4] != got[1].max():
        outcome.wrong.append(f"{got[4]} evaluations, of which a sample took {got[1].max()} at most")
    return outcome


def mapped(batch, width, *, spread=0.0):
    """Returns `parts` of z = c + a sin(z), and a start; by this spread a row takes fewer steps than the one before."""
    a = torch.linspace(-0.9, 0.8, width) * (1 - spread * torch.linspace(0, 1, batch)[:, None])
    c = torch.randn(batch, width)

    def parts(dtype):
        return lambda z: (c.to(dtype) + a.to(dtype) * torch.sin(z),)

    return parts, 0.3 * torch.randn(batch, width)


def simple(solver, batch, width, *, dtype=torch.float32, masked=False, spread=0.0, **options):
    parts, z = mapped(batch, width, spread=spread)
    mask = torch.rand(batch, width) > 0.2 if masked else None
    return both(solver, parts, z.to(dtype), mask=mask, **options)


@case(rare=LONG, **EACH)
def steps_one_warp(solver):
    return simple(solver, 3, 100, masked=True)


@case(rare=LONG, smoke="broyden3", **EACH)
def steps_two_warps(solver):
    return simple(solver, 3, 400, choice={"num_warps": 2}, spread=0.8)


@case(**FEW)
def steps_eight_warps(solver):
    return simple(solver, 2, 1500, max_steps=5)


@case(smoke="half", **MOST)
def steps_split(solver):
    """Programs of two warps share a sample; samples stop at different steps."""
    return simple(solver, 3, 1100, choice={"BLOCK_N": 512}, spread=0.8, tol=1e-2, masked=True)


@case(**FEW)
def steps_shipped_split(solver):
    return simple(solver, 1, 2049, max_steps=4)


@case(rare=LONG, **MOST)
def steps_float64(solver):
    return simple(solver, 3, 200, dtype=torch.float64, choice={"num_warps": 2}, tol=1e-6, spread=0.8, masked=True)


@case(**FEW)
def steps_float64_split(solver):
    return simple(solver, 2, 700, dtype=torch.float64, choice={"BLOCK_N": 256}, max_steps=6, spread=0.8)


@case(rare=LONG, **EACH)
def steps_one_number(solver):
    """A batch of one with a state of one number: both become constants of the kernel."""
    return simple(solver, 1, 1)


@case(**FEW)
def steps_batch_of_one_split(solver):
    return simple(solver, 1, 300, choice={"BLOCK_N": 128}, max_steps=6)


@case(linear={"relative": 0.0, "scale": 3.0}, scale={"scale": 5.0}, plateau={"max_steps": 50, "tol": 1e-6})
def steps_rules(**options):
    if "max_steps" not in options:
        return simple(SOLVERS["picard"], 3, 100, spread=0.8, tol=1e-3, **options)

    def turning(dtype):
        c = torch.cat([torch.ones(3, 99), torch.full((3, 1), 2.0**-6)], 1).to(dtype)
        return lambda z: (torch.cat([c[:, :-1], c[:, -1:] - z[:, -1:]], 1),)

    return both(SOLVERS["picard"], turning, torch.zeros(3, 100), **options)


def failing(solver, dtype=torch.float32, **options):
    """Samples of which one solves, one grows, one is NaN from the start, one gets there, and one is infinite."""
    a = torch.tensor([0.5, 3.0, 0.5, 0.5, 0.5])[:, None] * torch.linspace(0.5, 1.0, 300)
    c = torch.randn(5, 300)
    c[2, 7] = float("nan")
    c[4, 100] = float("inf")

    def parts(dtype):
        def f(z):
            y = c.to(dtype) + a.to(dtype) * z
            y[3] = y[3] + (y[3].square().sum().detach() > at) * float("inf")
            return (y,)

        return f

    at = 1.5 * c[3].square().sum().item()
    return both(solver, parts, torch.zeros(5, 300, dtype=dtype), **options)


@case(**FEW)
def steps_failing(solver):
    return failing(solver, choice={"BLOCK_N": 512, "num_warps": 2}, max_steps=5)


@case(**FEW)
def steps_failing_split(solver):
    return failing(solver, choice={"BLOCK_N": 128}, max_steps=5)


def restless(solver, width, dtype=torch.float32, place=lambda k, image: image, **options):
    """Images that do not depend on z, whose residuals rise and fall in every way: the best is any of the iterates."""
    sizes = 10.0 ** (-3 * torch.rand(7, 6, 1))
    fixed = torch.randn(6, width)
    images = fixed + sizes * torch.randn(7, 6, width)

    def parts(dtype):
        left = iter([place(k, image) for k, image in enumerate(images.to(dtype))])
        return lambda z: (next(left),)

    return both(solver, parts, fixed.to(dtype), tol=1e-8, max_steps=7, **options)


@case(rare=LONG, smoke="picard", **EACH)
def steps_restless(solver):
    return restless(solver, 200, choice={"num_warps": 2})


@case(smoke="picard", **FEW)
def steps_off_alignment(solver):
    """Every other image lies an element off the alignment of the others, which what was compiled for them relies on."""
    return restless(solver, 256, choice={"num_warps": 2}, place=off_alignment)


def off_alignment(k, image):
    """Returns the image as it is, or for odd k where its storage has one element before it."""
    return image if k % 2 == 0 else torch.cat([image.new_zeros(1), image.flatten()])[1:].view(image.shape)


@case(**FEW)
def steps_restless_split(solver):
    return restless(solver, 300, choice={"BLOCK_N": 128})


@case(one={}, split={"choice": {"BLOCK_N": 128}})
def steps_resumed(choice=None):
    """Broyden begins with the transpose of another solve's estimate."""
    solver = Broyden(memory=3)
    parts, z = mapped(3, 300, spread=0.5)
    leaves = Estimate()
    with backend("torch"):
        iterate(lambda z: parts(z.dtype)(z)[0], z, Settings(solver, 1e-4, 6, leaves=leaves))
    return both(solver, parts, z, choice=choice, rings=leaves.rings, max_steps=6)
