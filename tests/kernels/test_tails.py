"""What a cell leaves to the fused steps: sums, gains, norms and damping, against float64 and in every solver."""

from dataclasses import asdict

import close
import pytest
import torch

import tritondeq as tdeq
from tritondeq import Anderson, Broyden, Picard, Status
from tritondeq.kernels import dispatch, launch
from tritondeq.kernels.tails import PARTS, PLAIN, Tail

SOLVERS = [Picard(), Picard(damping=0.8), Anderson(memory=3), Anderson(memory=2, damping=0.7, half=True), Broyden(3)]
SHAPES = [(1, 1), (3, 7), (5, 16), (9, 129), (17, 128), (2, 4096)]  # several programs a sample in the last three
EPS = 1e-6
LAST = torch.channels_last
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


def vectors(features, device, dtype=torch.float32):
    return tuple(torch.linspace(0.4, 1.6, features, device=device).roll(i).to(dtype) for i in range(3))


def tails(features, device, dtype=torch.float32):
    """(how many parts, tail) of every kind."""
    b, c, weight = vectors(features, device, dtype)
    yield 1, Tail("rms", weight=weight, eps=EPS)
    yield 2, Tail("rms", weight=weight, eps=EPS, mix=0.6)
    yield 2, PLAIN
    yield 3, Tail(gains=(b, c))
    yield 3, Tail("rms", gains=(None, c), weight=weight, eps=EPS)
    yield 2, Tail("tanh", gains=(b,), mix=0.9)
    yield 3, Tail("gelu", gains=(b, None))


def wide(tail):
    """The same in float64."""
    gains = tuple(None if g is None else g.double() for g in tail.gains)
    weight = None if tail.weight is None else tail.weight.double()
    return Tail(tail.act, gains, weight, tail.eps, tail.mix)


def image(tail, z, *parts):
    """y of [B, T, D] as the first step of Picard's kernel makes it."""
    flat = z.flatten(1)
    steps = dispatch.load("steps.picard").start(flat, None, 1e-9, 9, tail, **asdict(Picard()))
    steps.take(*(part.flatten(1) for part in parts))
    return steps.onward().view(z.shape), steps.rel


@pytest.mark.parametrize("tokens, features", SHAPES)
def test_values_and_residuals(tokens, features, device):
    for number, tail in tails(features, device):
        z, *parts = torch.randn(1 + number, 2, tokens, features, device=device)
        y, rel = image(tail, z, *parts)
        exact = wide(tail)(z.double(), *(p.double() for p in parts))
        close.assert_as_eager(y, tail(z, *parts), exact)
        true = (exact - z.double()).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        torch.testing.assert_close(rel.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_parts_of_any_dtype_and_stride(narrow, device):
    for number, tail in tails(24, device, narrow):
        z, *parts = torch.randn(1 + number, 3, 5, 24, device=device)
        parts = [p.to(narrow if i else torch.float32) for i, p in enumerate(parts)]
        parts[-1] = parts[-1].transpose(1, 2).contiguous().transpose(1, 2)
        y, _ = image(tail, z, *parts)
        close.assert_as_eager(y, y, wide(tail)(z.double(), *(p.double() for p in parts)))


def test_float64(device):
    for number, tail in tails(24, device, torch.float64):
        z, *parts = torch.randn(1 + number, 2, 5, 24, device=device, dtype=torch.float64)
        if tail.act in ("tanh", "gelu"):
            assert not tail.fits("steps.picard", z.flatten(1))
            continue
        y, _ = image(tail, z, *parts)
        torch.testing.assert_close(y, tail(z, *parts), rtol=1e-7, atol=1e-7)  # eps and mix reach a kernel in float32


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_large_and_tiny(scale, device):
    """The norm of tiny rows is that of the eps."""
    weight = vectors(20, device)[2]
    for eps in (EPS, 0.0):
        tail = Tail("rms", weight=weight, eps=eps)
        z, a, b = scale * torch.randn(3, 2, 3, 20, device=device)
        y, _ = image(tail, z, a, b)
        close.assert_as_eager(y, tail(z, a, b), wide(tail)(z.double(), a.double(), b.double()))


@nonfinite
def test_nan_stays_in_its_sample(device):
    tail = Tail("rms", weight=vectors(20, device)[2], eps=0.0)
    z, a, b = torch.randn(3, 3, 70, 20, device=device)
    a[1, 69, 3] = float("nan")
    y, rel = image(tail, z, a, b)
    assert y[1, 69].isnan().all() and rel.isnan().tolist() == [False, True, False]
    assert y[[0, 2]].isfinite().all()


class Ended(tdeq.cells.Cell):
    """The cell that ends the parts that a function of (z, u) makes with a tail; `calls` counts the others."""

    def __init__(self, parts, tail):
        super().__init__()
        self.parts, self.end, self.calls = parts, tail, 0

    def forward(self, z, u):
        self.calls += 1
        return self.end(z, *self.parts(z, u))

    def tail(self, u):
        return self.parts, self.end


@torch.no_grad()
@pytest.mark.parametrize("tokens, features", [(3, 7), pytest.param(9, 129, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers(solver, tokens, features, device):
    """The same solutions, masked and not, without a call of f itself."""
    b, c, weight = vectors(features, device)
    matrix = torch.randn(features, features, device=device) * 0.1 / features**0.5
    mask = torch.rand(2, tokens, features, device=device) > 0.3 if isinstance(solver, Picard) else None
    for tail in (Tail("rms", gains=(b, c), weight=weight, eps=EPS, mix=0.9), Tail(gains=(None, c)), PLAIN):
        u, found = torch.randn(2, tokens, features, device=device), []
        f = Ended(lambda z, u: (u + z @ matrix, 0.3 * torch.sin(z), 0.2 * z.roll(1, -1)), tail)
        for name in ("torch", "triton"):
            f.calls = 0
            with tdeq.backend(name):
                found.append(tdeq.DEQ(f, solver=solver, tol=1e-5, max_steps=80).solve(u, mask=mask))
            assert bool(f.calls) == (name == "torch"), "the cell itself was called"
        eager, fused = found
        assert "launch" in fused.why and (eager.status == Status.CONVERGED).all()
        assert fused.status.tolist() == eager.status.tolist() and (fused.steps - eager.steps).abs().max() <= 1
        torch.testing.assert_close(fused.value, eager.value, rtol=5e-5, atol=5e-5)


def test_a_samples_bits_do_not_depend_on_its_batch(device):
    b, c, weight = vectors(129, device)
    tail = Tail("rms", gains=(b, c), weight=weight, eps=EPS)
    z, *parts = torch.randn(4, 3, 33, 129, device=device)
    together, _ = image(tail, z, *parts)
    alone, _ = image(tail, z[1:2], *(p[1:2] for p in parts))
    assert torch.equal(together[1:2], alone)


@torch.no_grad()
@pytest.mark.parametrize("state, layout", [((2, 3, 8), None), ((2, 24), None), ((2, 8, 3), None), ((2, 3, 4, 8), LAST)])
def test_rows_that_the_state_has_not(state, layout, device):
    """A tail for rows of 8 is taken where 8 elements of the last dim lie together in memory, else f is called."""

    class Ones(Ended):
        def forward(self, z, u):
            self.calls += 1
            return torch.ones_like(z)

        def tail(self, u):
            return super().tail(u)

    cell = Ones(lambda z, u: (torch.ones_like(z),), Tail("rms", weight=torch.ones(8, device=device), eps=0.0))
    z0 = torch.zeros(state, device=device).contiguous(memory_format=layout or torch.contiguous_format)
    with tdeq.backend("triton"):
        solution = tdeq.DEQ(cell).solve(z0)
    assert torch.equal(solution.value, torch.ones_like(z0))
    assert bool(cell.calls) == (state[-1] != 8 or layout is LAST)


def test_what_does_not_fit(device):
    def fits(tail, width, dtype=torch.float32):
        return tail.fits("steps.picard", torch.zeros(1, width, dtype=dtype, device=device))

    def rms(features):
        return Tail("rms", weight=torch.ones(features, device=device), eps=EPS)

    assert fits(rms(4096), 8192) and not fits(rms(4097), 8194)
    assert fits(rms(1024), 4096, torch.float64) and not fits(rms(1025), 4100, torch.float64)
    assert fits(rms(8), 24) and not fits(rms(8), 20)
    apart = Tail("rms", weight=torch.ones(16, device=device)[::2], eps=EPS)
    assert not fits(apart, 24), "a kernel reads them side by side"
    assert fits(PLAIN, 7) and fits(PLAIN, 7, torch.float64)


@pytest.mark.parametrize("parts, got", [(0, "0"), (4, "4"), (1, "1"), (None, "Tensor")], ids=str)
def test_bad_parts(parts, got, device):
    """Too few for the gains, too many for a tail, or no tuple."""
    z0 = torch.zeros(2, 3, device=device)
    made = z0 if parts is None else (z0,) * parts

    cell = Ended(lambda z, u: made, Tail(gains=(None, None) if parts == 1 else ()))
    with tdeq.backend("triton"), pytest.raises(ValueError, match=f"a tail takes a tuple of .* parts, got {got}"):
        tdeq.DEQ(cell)(z0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"act": "rms"}, "weight is for act='rms'"),
        ({"act": "tanh", "weight": torch.ones(3)}, "weight is for act='rms'"),
        ({"act": "norm"}, "act must be one of .*'rms'.* got 'norm'"),
        ({"gains": (None, None, torch.ones(3))}, f"at most {PARTS - 1} gains, got 3"),
        ({"act": "rms", "gains": (torch.ones(3),), "weight": torch.ones(4)}, "one length, got 3 and 4"),
    ],
)
def test_bad_tails(options, message):
    with pytest.raises(ValueError, match=message):
        Tail(**options)


@pytest.mark.parametrize("features", [1, 7, 64, 129, 768, 4096])
@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_programs_have_whole_rows(tokens, features, itemsize):
    shape = {"width": tokens * features, "itemsize": itemsize, "features": features}
    row = 1 << (features - 1).bit_length()
    if row > {4: 4096, 8: 1024}[itemsize]:
        assert launch.parameters("steps.picard", **shape) is None and launch.candidates("steps.picard", **shape) == []
        return
    for choice in launch.candidates("steps.picard", **shape):
        config = launch.steps(**shape, **choice)
        rows = config["BLOCK_N"] // row
        assert rows * row == config["BLOCK_N"]
        assert (config["SPLITS"] - 1) * rows < tokens <= config["SPLITS"] * rows
        assert 1 <= config["num_warps"] <= 16
