"""Both backends through one switch: the same layer, the same values, the same gradients."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, Picard, Unrolled
from tritondeq.cells import Affine, Monotone
from tritondeq.kernels import devices, dispatch

pytest.importorskip("triton")


def run(layer, x, name):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with tdeq.backend(name):
        z = layer(x)
        z.sin().sum().backward()
    return z.detach(), [x.grad, *(p.grad for p in layer.parameters())], layer.last


@pytest.mark.parametrize("solver", [Picard(), Picard(0.8), Anderson(1), Anderson(4)], ids=repr)
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "sin", "identity"])
def test_triton_and_torch_agree(solver, activation, device):
    layer = DEQ(Affine(24, 10, activation=activation), solver=solver, tol=1e-5, max_steps=100).to(device)
    x = torch.randn(3, 7, 10, device=device)
    with torch.no_grad():
        layer.cell.weight.mul_(0.8)
    z, grads, last = run(layer, x, "torch")
    kz, kgrads, klast = run(layer, x, "triton")
    assert last.route is not tdeq.Route.KERNEL and klast.route is tdeq.Route.KERNEL
    assert klast.adjoint.route is tdeq.Route.KERNEL
    assert (klast.steps - last.steps).abs().max() <= 1
    assert (klast.residual <= 1e-5).all() and torch.equal(klast.status, last.status)
    torch.testing.assert_close(kz, z, rtol=2e-4, atol=2e-5)
    for a, b in zip(kgrads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_a_solver_with_steps_of_its_own_inherits_no_kernel(device):
    class Halved(Picard):
        def step(self, memory, z, y, g, seen, rules):
            return z + 0.5 * g

    class Renamed(Picard):
        pass

    cell, x = Affine(8).to(device), torch.randn(3, 8, device=device)
    injection = cell.inject(x)
    solvers = Halved(), Picard(damping=0.5), Renamed(damping=0.5)
    options = {"tol": 1e-5, "max_steps": 200}
    with tdeq.backend("triton"):
        whole = [DEQ(cell, solver=solver, **options).solve(x) for solver in solvers]
        stepwise = [tdeq.fixed_point(lambda z: cell(z, injection), x, solver=solver, **options) for solver in solvers]
    for halved, picard, renamed in (whole, stepwise):
        assert "launch" not in halved.why and "launch" in picard.why and "launch" in renamed.why
        assert (halved.steps - picard.steps).abs().max() <= 1 and torch.equal(renamed.steps, picard.steps)


def test_second_derivatives_through_the_kernel(device):
    layer = DEQ(Affine(8), tol=1e-6, max_steps=100).to(device)
    x = torch.randn(4, 8, device=device, requires_grad=True)

    def second(name):
        with tdeq.backend(name):
            (g,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
            return torch.autograd.grad(g.pow(2).sum(), list(layer.parameters()))

    for a, b in zip(second("triton"), second("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_and_bf16_operands_take_one_term(device):
    layer = DEQ(Affine(16, operands="bf16")).to(device)
    x = torch.randn(5, 16, device=device)
    z, _, last = run(layer, x, "torch")
    kz, _, klast = run(layer, x, "triton")
    assert (klast.steps - last.steps).abs().max() <= 1
    torch.testing.assert_close(kz, z, rtol=2e-2, atol=1e-2)
    with tdeq.backend("triton"), torch.autocast(device.type, dtype=torch.bfloat16):
        y = DEQ(Affine(16)).to(device)(x)
    assert y.dtype == torch.float32


@pytest.mark.parametrize(
    "layer,x,why",
    [
        (lambda: DEQ(Affine(257), solver=Anderson(1)), torch.ones(2, 257), "are Picard's"),
        (lambda: DEQ(Affine(8).double()), torch.ones(2, 8, dtype=torch.float64), "float64"),
        (lambda: DEQ(Affine(8), solver=Broyden()), torch.ones(2, 8), "Broyden"),
        (lambda: DEQ(Affine(8), solver=Anderson(5)), torch.ones(2, 8), "5"),
        (lambda: DEQ(Affine(8), trace=True), torch.ones(2, 8), "trace"),
        (lambda: DEQ(torch.nn.Bilinear(8, 8, 8)), torch.zeros(2, 8), "names no whole-solve"),
    ],
    ids=["wide", "float64", "broyden", "long-memory", "trace", "user-cell"],
)
def test_what_no_kernel_takes_goes_through_the_loop_and_says_why(layer, x, why, device):
    layer = layer().to(device)
    with tdeq.backend("triton"):
        layer(x.to(device)).sum().backward()
    assert layer.last.route is not tdeq.Route.KERNEL and why in layer.last.why


def test_a_backward_solver_of_its_own_goes_its_own_way(device):
    layer = DEQ(Affine(8), adjoint=Implicit(solver=Broyden(), tol=1e-5), tol=1e-5).to(device)
    x = torch.randn(3, 8, device=device)
    _, grads, _ = run(layer, x, "torch")
    _, kgrads, last = run(layer, x, "triton")
    assert last.route is tdeq.Route.KERNEL and "Broyden" in last.adjoint.why
    for a, b in zip(kgrads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Nested(torch.nn.Module):
    """A cell around a layer, whose solves belong to each of its evaluations."""

    def __init__(self, width):
        super().__init__()
        self.inner = DEQ(Affine(width, contraction=0.5), tol=1e-4)

    def forward(self, z, x):
        return 0.3 * self.inner(z) + x


IN_BACKWARD = {
    "kernels": lambda: DEQ(Affine(6)),
    "steps": lambda: DEQ(Affine(6), solver=Broyden(), tol=0.1),
    "splitting": lambda: DEQ(Monotone(6)),
    "nested": lambda: DEQ(Nested(6), tol=0.1),
    "unrolled": lambda: DEQ(Nested(6), adjoint=Unrolled(3)),
    "checkpoints": lambda: DEQ(Nested(6), adjoint=Unrolled(3, checkpoint=True)),
}


@pytest.mark.kernels
@pytest.mark.parametrize(
    "threads", [pytest.param(True, marks=pytest.mark.slow), False], ids=["device threads", "one thread"]
)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("steps", "nested", "checkpoints"))) for n in IN_BACKWARD],
)
def test_a_with_block_holds_in_backward_passes_of_other_threads(monkeypatch, device, name, threads):
    """Of first and second derivatives: a thread that takes them has no block, and on CUDA autograd has its own."""
    layer, picks, real = IN_BACKWARD[name]().to(device), [], dispatch.pick
    monkeypatch.setattr(dispatch, "pick", lambda *a, **k: picks.append(dispatch.chosen()) or real(*a, **k))
    x = torch.randn(3, 6, device=device, requires_grad=True)

    def differentiate(*arguments, **options):
        with torch.autograd.set_multithreading_enabled(threads):
            return torch.autograd.grad(*arguments, **options)

    def elsewhere(*arguments, **options):
        picks.clear()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(differentiate, *arguments, **options).result()
        assert set(picks) == {"triton"}
        return done

    with tdeq.backend("triton"):
        z = layer(x)
        (g,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
        wanted = torch.autograd.grad(g.square().sum(), list(layer.parameters()))
        z = layer(x)
    (g,) = elsewhere(z.sin().sum(), x, create_graph=True)
    got = elsewhere(g.square().sum(), list(layer.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_switch():
    assert dispatch.chosen() == "auto"
    tdeq.set_backend("torch")
    try:
        with tdeq.backend("auto"):
            assert dispatch.chosen() == "auto"
            other = []
            thread = threading.Thread(target=lambda: other.append(dispatch.chosen()))
            thread.start()
            thread.join()
            assert other == ["torch"], "a with block is its thread's; the default is the process's"
        with pytest.raises(ZeroDivisionError), tdeq.backend("triton"):
            raise ZeroDivisionError
        assert dispatch.chosen() == "torch"
    finally:
        tdeq.set_backend("auto")
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'"):
        tdeq.set_backend("cuda")
    with pytest.raises(ValueError, match="'jax'"), tdeq.backend("jax"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_torch_and_triton_needs_the_interpreter(monkeypatch):
    layer, x = DEQ(Affine(8)), torch.randn(2, 8)
    layer(x)
    assert layer.last.why == "tensors are on cpu, and Triton is for CUDA"
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with tdeq.backend("triton"), pytest.raises(RuntimeError, match="can't run on cpu tensors.*TRITON_INTERPRET=1"):
        layer(x)


@pytest.fixture
def capability(monkeypatch):
    """Sets that of a GPU, for there may be none."""
    devices._chip.cache_clear()
    yield lambda *version: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    devices._chip.cache_clear()


def pick():
    return dispatch.pick("steps.picard", torch.device("cuda"), width=3, dtype=torch.float32)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert pick() == (None, "triton is not installed")
    with pytest.raises(ValueError, match="backend 'triton' needs the triton package, which is not installed"):
        tdeq.set_backend("triton")


def test_a_triton_that_is_too_old(monkeypatch, device):
    """Torch 2.6 brings Triton 3.2, in which the kernels do not run."""
    monkeypatch.setattr("triton.__version__", "3.2.0")
    dispatch.triton_version.cache_clear()
    try:
        assert pick() == (None, "triton 3.2.0 is installed, and the kernels need 3.4 or later")
        with tdeq.backend("triton"), pytest.raises(RuntimeError, match="can't run: triton 3.2.0.*need 3.4"):
            DEQ(Affine(4).to(device))(torch.zeros(2, 4, device=device))
        monkeypatch.setattr("triton.__version__", "3.10.1+git1")
        dispatch.triton_version.cache_clear()
        assert dispatch.too_old() is None
    finally:
        dispatch.triton_version.cache_clear()


@pytest.mark.kernels
@pytest.mark.parametrize("rocm", [False, True], ids=["capability", "ROCm"])
def test_a_gpu_that_the_kernels_do_not_fit(monkeypatch, capability, rocm):
    """Torch solves, with the reason in `why`; backend "triton" raises it. The tensors pass for those of a GPU."""
    capability(7 + 2 * rocm, 5)
    monkeypatch.setattr(torch.version, "hip", "6.2" if rocm else None)
    why = "this torch is built for ROCm, and the kernels are for CUDA"
    why = why if rocm else "the GPU is of capability 7.5, and the kernels need 8.0 or later"
    assert pick() == (None, why)
    real = dispatch.pick
    monkeypatch.setattr(dispatch, "pick", lambda name, device, **problem: real(name, torch.device("cuda"), **problem))
    for layer in (DEQ(Affine(4)), DEQ(torch.nn.Bilinear(4, 4, 4))):
        x = torch.zeros(2, 4)
        layer(x).sum().backward()
        for solution in (layer.last, layer.last.adjoint):
            assert solution.route is tdeq.Route.TORCH and why in solution.why
        with tdeq.backend("triton"), pytest.raises(RuntimeError, match=f"backend 'triton' can't run: {why}"):
            layer(x)


@pytest.mark.kernels
@pytest.mark.parametrize("version, why", [((7, 9), "is of capability 7.9"), ((8, 0), "launch"), ((12, 1), "launch")])
def test_the_least_capability(capability, version, why):
    capability(*version)
    op, how = pick()
    assert (op is None) == (version < (8, 0)) and why in how


def test_whole_solve_ops_hear_of_the_device(monkeypatch, capability):
    """Whose shared memory decides what fits."""
    capability(9, 0)
    asked = {}
    op = dispatch.Op(None, None, None, None, lambda **problem: asked.update(problem) or "no")
    monkeypatch.setitem(dispatch._ops, "probe", op)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "too_old", lambda: None)
    assert dispatch.pick("probe", torch.device("cuda", 1), width=3) == (None, "no")
    assert asked == {"device": torch.device("cuda", 1), "width": 3}


@pytest.mark.parametrize("kind", ["forward", "pre"])
@pytest.mark.parametrize("cell", [Affine, tdeq.cells.Gated, tdeq.cells.MLP], ids=lambda cell: cell.__name__)
def test_a_hook_that_changes_what_a_cell_takes_or_returns_holds_by_every_backend(cell, kind, device):
    """Kernels that hold the cell would leave it out: they are taken only where there is none."""
    layer = DEQ(cell(8), tol=1e-6, max_steps=200).to(device)
    x, plain = torch.randn(3, 8, device=device), []
    for name in ("torch", "triton"):
        plain.append(run(layer, x, name)[0])
    if kind == "forward":
        layer.cell.register_forward_hook(lambda module, given, z: 0.5 * z)
    else:
        layer.cell.register_forward_pre_hook(lambda module, given: (0.5 * given[0], *given[1:]))
    z, grads, _ = run(layer, x, "torch")
    kz, kgrads, last = run(layer, x, "triton")
    assert last.route is not tdeq.Route.KERNEL and (z - plain[0]).abs().max() > 0.01
    torch.testing.assert_close(kz, z, rtol=1e-4, atol=1e-5)
    for a, b in zip(kgrads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_solver_that_splits_a_cell_refuses_one_with_hooks():
    layer = DEQ(Monotone(8))
    layer.cell.register_forward_hook(lambda module, given, z: 0.5 * z)
    with pytest.raises(ValueError, match="no hooks"):
        layer(torch.randn(2, 8))
