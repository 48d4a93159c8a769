"""What every cell promises: gradients, shapes, formats in memory, dtypes, backends, captured and compiled solves."""

import copy

import pytest
import torch
from replays import Recorder
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Picard, Status, Unrolled, cells, cuda_graphs
from tritondeq.cells import MLP, Affine, Conv, Gated, Monotone, MultiScale, Transformer
from tritondeq.kernels import launch
from tritondeq.layout import pytree

# Of each: how it is made, and the shape of one sample of x.
CASES = {
    "affine": (lambda **o: Affine(6, 4, contraction=0.8, **o), (4,)),
    "monotone": (lambda **o: Monotone(6, 4, **o), (4,)),
    "mlp, post": (lambda **o: MLP(6, 4, hidden=5, **o), (4,)),
    "mlp, pre": (lambda **o: MLP(6, 4, form="pre", activation="swiglu", bias=False, **o), (4,)),
    "gated": (lambda **o: Gated(6, 4, **o), (4,)),
    "conv": (lambda **o: Conv(8, 3, groups=2, **o), (3, 4, 5)),
    "conv, 1 dim": (lambda **o: Conv(8, 3, groups=2, dims=1, weight_norm=True, **o), (3, 7)),
    "multiscale": (lambda **o: MultiScale((8, 8), 3, groups=2, weight_norm=True, **o), (3, 4, 5)),
    "outer": (lambda **o: Transformer(12, 7, heads=2, rotary=100.0, causal=True, bias=True, **o), (3, 7)),
    "damped": (lambda **o: Transformer(12, 7, heads=6, kv_heads=2, wiring="damped", decay=True, **o), (3, 7)),
    "head": (lambda **o: Transformer(12, 7, heads=2, wiring="head", activation="gelu", decay=True, **o), (3, 7)),
}
ROWS = ["affine", "monotone", "mlp, post", "mlp, pre", "gated"]
NARROW = [name for name in CASES if name != "monotone"]  # torch inverts no bfloat16 matrix
every = pytest.mark.parametrize("name", CASES)


def made(name, dtype=torch.float32, **options):
    """A cell none of whose scales and biases are all alike."""
    cell = CASES[name][0](**options)
    with torch.no_grad():
        for path, p in cell.named_parameters():
            if p.ndim == 1 or path == "scales":
                p += 0.05 * torch.randn_like(p)
    return cell.to(dtype)


def inputs(name, *batch, dtype=torch.float32):
    return torch.randn(*batch, *CASES[name][1], dtype=dtype)


def tensors(state):
    return pytree.tree_leaves(state)


def graded(layer, x):
    """The solution, and the gradients of the sum of its sines by the parameters."""
    z = tensors(layer(x))
    return [*z, *torch.autograd.grad(sum(t.sin().sum() for t in z), list(layer.parameters()))]


def assert_all_close(a, b, **tolerances):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


def test_every_cell_is_here():
    classes = {value for name, value in vars(cells).items() if name[0].isupper()} - {cells.Cell}
    assert {kind for kind in classes if any(isinstance(made(name), kind) for name in CASES)} == classes


@every
def test_gradients_are_those_of_many_unrolled_steps(name):
    """In float64, through a plain loop; for every kind of solver."""
    cell, x = made(name, torch.float64), inputs(name, 2, dtype=torch.float64).requires_grad_()
    far = graded(DEQ(cell, adjoint=Unrolled(120)), x)
    for solver in (None, Picard(0.8), Anderson(memory=3), Broyden(memory=4)):
        layer = DEQ(cell, solver=solver, tol=1e-12, max_steps=500)
        assert_all_close(graded(layer, x), far, rtol=1e-7, atol=1e-8)
        assert layer.last.converged.all() and layer.last.adjoint.converged.all()


@every
def test_finite_differences(name):
    """By x and by every parameter."""
    layer, x = DEQ(made(name, torch.float64), tol=1e-13, max_steps=500), inputs(name, 1, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def solved(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(solved, (x.requires_grad_(), *values), fast_mode=True)


@every
def test_second_derivatives(name):
    """With attention that has them."""
    cell, x = made(name, torch.float64), inputs(name, 1, dtype=torch.float64).requires_grad_()
    second = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for layer in (DEQ(cell, tol=1e-13, max_steps=500), DEQ(cell, adjoint=Unrolled(100))):
            loss = sum(t.sin().sum() for t in tensors(layer(x)))
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            second.append(torch.autograd.grad(first.sin().sum(), (x, *cell.parameters()), materialize_grads=True))
    assert_all_close(*second, rtol=1e-6, atol=1e-7)


@every
@pytest.mark.parametrize("batch", [(0,), (1,), (7,), (2, 3)], ids=str)
def test_shapes(name, batch):
    """Batches of one, of a prime and of none; any leading dims where rows are samples."""
    if len(batch) > 1 and name not in ROWS:
        batch = (5,)
    layer, x = DEQ(made(name)), inputs(name, *batch).requires_grad_()
    z = tensors(layer(x))
    sum(t.sum() for t in z).backward()
    assert all(t.shape[: len(batch)] == batch and t.isfinite().all() for t in z)
    assert layer.last.converged.all() and layer.last.steps.shape == batch and x.grad.isfinite().all()


@every
def test_inputs_that_are_not_contiguous(name):
    layer, x = DEQ(made(name, torch.float64), tol=1e-10, max_steps=200), inputs(name, 4, dtype=torch.float64)
    z = layer(x)
    for strided in (x.mT.contiguous().mT, x.repeat_interleave(2, dim=-1)[..., ::2]):
        assert not strided.is_contiguous()
        start = pytree.tree_map(lambda t: torch.zeros_like(t).repeat_interleave(2, dim=-1)[..., ::2], z)
        assert_all_close(tensors(layer(strided)), tensors(z), rtol=0, atol=1e-8)
        assert_all_close(tensors(layer(strided, z0=start)), tensors(z), rtol=0, atol=1e-8)


@every
@torch.no_grad()
def test_batch_mates_do_not_matter(name):
    """Neither values nor steps; nor does a sample that is not finite."""
    layer, x = DEQ(made(name, torch.float64), tol=1e-6, max_steps=200), inputs(name, 4, dtype=torch.float64)
    x[1], x[2] = 10 * x[1], 0.01 * x[2]
    together = layer.solve(x)
    for i in range(4):
        alone = layer.solve(x[i : i + 1])
        assert abs(alone.steps[0] - together.steps[i]) <= 1
        for a, b in zip(tensors(alone.value), tensors(together.value), strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=0, atol=1e-5)
    x[1] = torch.nan
    spoilt, others = layer.solve(x), [0, 2, 3]
    assert spoilt.status[1] == Status.NONFINITE
    for a, b in zip(tensors(spoilt.value), tensors(together.value), strict=True):
        torch.testing.assert_close(a[others], b[others], rtol=0, atol=1e-9)


@every
@torch.no_grad()
def test_a_mask_counts_only_its_samples_elements(name):
    """Elements outside may be wrong: the residual reported is that of the others."""
    cell, x = made(name, torch.float64), inputs(name, 3, dtype=torch.float64)
    layer = DEQ(cell, solver=Picard(), tol=1e-5, max_steps=200)
    z = layer(x)
    mask = pytree.tree_map(lambda t: torch.rand_like(t) > 0.3, z)
    if isinstance(cell, Transformer):
        return  # a mask of tokens is padding: see test_transformer_cell.py
    solution = layer.solve(x, mask=mask)
    images = tensors(cell(solution.value, cell.inject(x)))
    off = [(y - z) * m for y, z, m in zip(images, tensors(solution.value), tensors(mask), strict=True)]
    size = [y * m for y, m in zip(images, tensors(mask), strict=True)]
    off, size = (torch.cat([t.flatten(1) for t in ts], 1).norm(dim=1) for ts in (off, size))
    torch.testing.assert_close(solution.residual, off / (size + 1e-30), rtol=1e-6, atol=1e-12)


@every
def test_autocast_leaves_the_state_wide(name):
    cell, x, dtypes = made(name), inputs(name, 4), set()
    layer = DEQ(cell)
    wide = layer(x)
    for module in cell.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
        sum(t.square().sum() for t in tensors(z)).backward()
    assert dtypes == {torch.bfloat16} and layer.last.converged.all() and layer.last.residual.max() <= 1e-2
    for a, b in zip(tensors(z), tensors(wide), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 0.05 * b.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in cell.parameters())


@pytest.mark.parametrize("name", NARROW)
@torch.no_grad()
def test_a_cell_of_bfloat16(name):
    layer, x = DEQ(made(name, torch.bfloat16)), inputs(name, 3, dtype=torch.bfloat16)
    z = tensors(layer(x))
    assert layer.last.converged.all() and {t.dtype for t in z} == {torch.bfloat16}
    for a, b in zip(z, tensors(layer.float()(x.float())), strict=True):
        assert (a.float() - b).norm() <= 0.05 * b.norm()


@pytest.mark.parametrize("name", ["affine", "mlp, post", "mlp, pre", "gated"])
def test_bf16_operands_round_weights_and_nothing_else(name):
    rounded, exact, x = made(name, operands="bf16"), made(name), inputs(name, 5)
    with torch.no_grad():
        for key, p in rounded.named_parameters():
            if key.startswith(("parametrizations", "weight", "up.w", "down.w", "gate.w")):
                p.copy_(p.bfloat16().float())
    exact.load_state_dict(rounded.state_dict())
    a, b = (DEQ(cell, tol=1e-6)(x) for cell in (rounded, exact))
    assert torch.equal(a, b) or (name == "affine" and (a - b).norm() < 0.01 * b.norm())  # its weight is scaled
    assert rounded.default_tol() == 1e-2 and exact.default_tol() is None


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name, solver",
    [
        *((name, Picard()) for name in CASES if name != "multiscale"),
        pytest.param("multiscale", Picard(), marks=pytest.mark.slow),
        *((name, Picard(damping=0.8)) for name in ROWS),
        *((name, Anderson(memory=2)) for name in [*ROWS, "outer", "damped", "head"]),
        *((name, Broyden(memory=3)) for name in ["affine", "mlp, post", "outer", "damped", "head"]),
    ],
    ids=repr,
)
def test_backends_agree(name, solver):
    """Whole solves and fused steps in Triton's interpreter, against torch and against float64."""
    cell, x, results = made(name), inputs(name, 3), []
    exact = tensors(DEQ(copy.deepcopy(cell).double(), tol=1e-12, max_steps=300)(x.double()))
    for backend in ("torch", "triton"):
        with tdeq.backend(backend):
            layer = DEQ(cell, solver=solver, tol=2e-6, max_steps=200)
            results.append(graded(layer, x))
        assert layer.last.converged.all() and layer.last.adjoint.converged.all()
        values = [t.double() for t in results[-1][: len(exact)]]
        assert_all_close(values, exact, rtol=1e-4, atol=1e-4)
    assert_all_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name",
    ["affine", "mlp, post"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("mlp, pre", "outer", "damped", "head")],
)
def test_captured(monkeypatch, name):
    """The work itself in place of a replay: other inputs, other weights, nothing captured anew."""
    monkeypatch.setattr(launch, "too_large", lambda *_: "too wide here")  # all take the loop
    monkeypatch.setattr(cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    cell = made(name)
    layers = [DEQ(cell, solver=Picard(), tol=1e-4, max_steps=50, graph=graph) for graph in (True, False)]
    for scale in (1.0, 0.5):
        x = scale * inputs(name, 2)
        with tdeq.backend("triton"):
            assert_all_close(*(graded(layer, x) for layer in layers), rtol=1e-3, atol=1e-3)
        assert [layer.last.route is tdeq.Route.GRAPH for layer in layers] == [True, False]
        with torch.no_grad():
            for p in cell.parameters():
                if p.ndim == 1:
                    p += 0.2 * torch.randn_like(p)
    assert len(layers[0]._graphs.solves) == 1


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["mlp, pre", "conv", "outer", "head"])
def test_compiled(name):
    torch.compiler.reset()
    x, results = inputs(name, 2), []
    cell = made(name, **({} if name == "mlp, pre" else {"dropout": 0.2}))
    for compile in (False, {"backend": "aot_eager"}):
        torch.manual_seed(1)
        results.append(graded(DEQ(cell, compile=compile, tol=1e-6, max_steps=100), x))
    assert_all_close(*results, rtol=1e-3, atol=1e-4)


@every
def test_copies_are_the_same_layer(name):
    first, second, x = DEQ(made(name)), DEQ(made(name)), inputs(name, 2)
    assert not torch.equal(tensors(first(x))[0], tensors(second(x))[0])
    second.load_state_dict(first.state_dict())
    for other in (second, copy.deepcopy(first)):
        assert all(torch.equal(a, b) for a, b in zip(tensors(first(x)), tensors(other(x)), strict=True))


@pytest.mark.parametrize("name", ["conv", "multiscale", "outer", "head"])
def test_dropout_is_one_mask_a_solve_and_gone_in_eval(name):
    dropping, plain, x = made(name, dropout=0.5), made(name), inputs(name, 3)
    plain.load_state_dict(dropping.state_dict())
    layer = DEQ(dropping, tol=1e-5, max_steps=100)
    a, b = tensors(layer(x))[0], tensors(layer(x))[0]
    assert layer.last.converged.all() and not torch.allclose(a, b, atol=1e-3)
    assert torch.equal(tensors(layer.eval()(x))[0], tensors(DEQ(plain, tol=1e-5, max_steps=100)(x))[0])


@pytest.mark.parametrize("name", ["affine", "gated", "outer", "head"])
def test_reset_parameters(name):
    cell, x = made(name), inputs(name, 2)
    with torch.no_grad():
        for p in cell.parameters():
            p.fill_(7.0)
    cell.reset_parameters()
    layer = DEQ(cell)
    assert not any((p == 7).any() for p in cell.parameters()) and layer(x) is not None
    assert layer.last.converged.all()


@pytest.mark.parametrize("name, linear", [("mlp, post", "up"), ("outer", "qkv"), ("conv", "block.conv1")])
def test_weights_that_are_parametrized_are_computed_once_a_solve(name, linear):
    cell, calls = made(name), []
    layer = nn.utils.parametrizations.spectral_norm(cell.get_submodule(linear))
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(None))
    sum(t.square().sum() for t in tensors(DEQ(cell)(inputs(name, 2)))).backward()
    assert len(calls) == 1 and layer.parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, shown",
    [
        ("affine", "features=6, inputs=4, activation='tanh', operands='fp32'"),
        ("affine", "bound=0.8"),
        ("monotone", "margin=1.0"),
        ("mlp, pre", "form='pre', activation='swiglu'"),
        ("conv", "channels=8, inputs=3, groups=2, dims=2"),
        ("multiscale", "channels=(8, 8), inputs=3, groups=2"),
        ("damped", "wiring='damped'"),
        ("damped", "damping=0.95"),
    ],
)
def test_repr_names_the_options(name, shown):
    assert shown in repr(CASES[name][0]())
