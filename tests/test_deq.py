"""The layer: an ordinary nn.Module in every mode."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, OneStep, Picard, Unrolled


class Block(nn.Module):
    """A user's cell: nothing to inherit."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, z, x):
        return self.norm(x + torch.tanh(self.linear(z)) + 0.5 * z)


@pytest.fixture
def x():
    return torch.randn(6, 8)


def test_five_lines(x):
    layer = DEQ(tdeq.cells.Affine(8))
    z = layer(x)
    z.sum().backward()
    assert z.shape == x.shape and layer.cell.weight.grad.norm() > 0
    assert layer.last.steps.shape == (6,) and (layer.last.residual <= 1e-3).all() and layer.last.converged.all()
    assert layer.last.value is None


def test_solve_carries_the_gradient_and_what_became_of_it(x):
    layer = DEQ(Block(), solver=Anderson(3), tol=1e-4, trace=True)
    solution = layer.solve(x)
    solution.value.sum().backward()
    assert layer.cell.linear.weight.grad is not None
    assert solution.trace.shape == (solution.steps.max(), 6)
    assert layer.last.adjoint is solution.adjoint and solution.adjoint.converged.all()
    last = [layer.last.status, layer.last.steps, layer.last.residual, layer.last.adjoint.residual]
    assert all(not t.requires_grad and t.numel() == 6 for t in last), "no state and no graph"
    torch.testing.assert_close(layer.cell(solution.value, x), solution.value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("penalty", [False, True])
def test_differentiable_once_and_twice_in_train_and_eval(x, mode, penalty):
    """The second derivative in use: a penalty on the norm of the input gradient."""
    layer = getattr(DEQ(Block(), tol=1e-6), mode)()
    grads, x = [], x.requires_grad_()
    for deq in (layer, DEQ(layer.cell, adjoint=Unrolled(200))):
        loss = deq(x).sin().sum()
        if penalty:
            loss = torch.autograd.grad(loss, x, create_graph=True)[0].pow(2).sum()
        grads.append(torch.autograd.grad(loss, list(deq.parameters()), allow_unused=True, materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_row_local_cell_stops_token_by_token():
    layer = DEQ(tdeq.cells.Affine(8))
    tokens = torch.randn(3, 5, 8)
    layer(tokens)
    assert layer.last.steps.shape == (3, 5) and layer.last.steps.unique().numel() > 1


def test_state_dicts_copies_and_pickles_after_a_call(x):
    layer, two = (DEQ(Block(), solver=Anderson(), adjoint=Implicit(tol=1e-3)) for _ in range(2))
    z = layer(x)
    two.load_state_dict(pickle.loads(pickle.dumps(layer.state_dict())))
    assert torch.equal(two(x), z)
    assert list(two.state_dict()) == ["cell.norm.weight", "cell.norm.bias", "cell.linear.weight", "cell.linear.bias"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), z) and other.solver == layer.solver and other.adjoint == layer.adjoint


class Ranks:
    """As a process group: it can be neither copied nor pickled."""

    def __reduce__(self):
        raise TypeError("cannot pickle")


def test_a_copy_has_the_same_ranks_and_other_weights(x):
    layer = DEQ(Block(), group=Ranks())
    averaged = torch.optim.swa_utils.AveragedModel(layer).module
    assert averaged.group is layer.group and averaged.cell.linear.weight is not layer.cell.linear.weight
    averaged.group = layer.group = None
    assert torch.equal(averaged(x), layer(x))


@pytest.mark.parametrize("dtype, inner", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_to_moves_dtype(x, dtype, inner):
    layer = DEQ(Block()).to(dtype)
    assert layer(x.to(dtype)).dtype == dtype and layer.last.residual.dtype == inner


def test_warm_start_and_mask(x):
    layer = DEQ(Block(), tol=1e-4)
    cold = layer(x)
    layer(x, z0=cold.detach())
    assert (layer.last.steps == 1).all()
    mask = torch.ones(6, 8, dtype=torch.bool)
    assert torch.equal(layer(x, mask=mask), cold)


def test_an_output_can_be_changed_in_place(x):
    DEQ(Block())(x).mul_(2).add_(1).sum().backward()


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_gradients_in_bfloat16_and_under_autocast(x, solver):
    exact = DEQ(Block(), tol=1e-6)
    exact(x).sin().sum().backward()
    half = DEQ(copy.deepcopy(exact.cell), solver=solver)
    half.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = half(x).sin().sum()
    loss.backward()
    for a, b in zip(half.parameters(), exact.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() <= 5e-2 * b.grad.norm() + 1e-3


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_layer_is_the_layer(x):
    layer = DEQ(Block())
    z = torch.compile(layer, backend="aot_eager")(x)
    assert torch.equal(z, layer(x))
    z.sum().backward()
    assert layer.cell.linear.weight.grad is not None


@pytest.mark.filterwarnings("ignore:a backward solve")  # of weights that grow beyond a radius of 1
def test_training_makes_the_loss_fall(x):
    target = torch.randn(6, 8)
    for adjoint in (Implicit(), OneStep(), tdeq.Phantom(4, 0.8), tdeq.Neumann(3), Unrolled(6)):
        torch.manual_seed(1)
        layer, losses = DEQ(Block(), adjoint=adjoint), []
        opt = torch.optim.Adam(layer.parameters(), lr=3e-2)
        for _ in range(60):
            losses.append((layer(x) - target).pow(2).mean())
            opt.zero_grad()
            losses[-1].backward()
            opt.step()
        assert losses[-1] < 0.5 * losses[0], adjoint


def test_inject_runs_once_per_solve(x):
    calls = []

    class Counting(tdeq.cells.Affine):
        def inject(self, x):
            calls.append(1)
            return super().inject(x)

    layer = DEQ(Counting(8))
    layer(x).sum().backward()
    assert len(calls) == 1 and layer.last.steps.max() > 3


@pytest.mark.parametrize("solver", [Picard(0.7), Anderson(3)], ids=repr)
def test_unrolled_and_back(x, solver):
    layer = DEQ(Block(), solver=solver, tol=1e-5)
    solved = layer(x)
    plain = solver if isinstance(solver, Picard) else Picard()
    other = DEQ(layer.cell, solver=plain, adjoint=Unrolled(4))
    want = torch.autograd.grad(other(x).sin().sum(), layer.cell.parameters())
    assert layer.unrolled(4) is layer and "unrolled=4" in repr(layer)
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.eval(), layer.train()):
        z = copied(x)
        assert torch.equal(z, other(x)) and (copied.last.steps == 4).all()
        grads = torch.autograd.grad(z.sin().sum(), copied.cell.parameters())
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
    assert list(layer.state_dict()) == [f"cell.{name}" for name in layer.cell.state_dict()]
    calls = []
    handle = layer.cell.register_forward_pre_hook(lambda *_: calls.append(1))
    layer.unrolled(4, checkpoint=True)(x).sin().sum().backward()
    assert len(calls) == 8  # each once more, in the backward pass
    handle.remove()
    assert torch.equal(layer.unrolled(None)(x), solved) and layer.solver == solver and "unrolled" not in repr(layer)
    with pytest.raises(ValueError, match="steps"):
        layer.unrolled(0)
    assert torch.equal(layer(x), solved)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda _: DEQ(lambda z, x: z), TypeError, "cell must be an nn.Module.*fixed_point"),
        (lambda _: DEQ(Block(), solver="anderson"), TypeError, "solver.*'anderson'"),
        (lambda _: DEQ(Block(), tol=0.0), ValueError, "tol"),
        (lambda _: DEQ(Block(), max_steps=1.5), TypeError, "max_steps"),
        (lambda _: DEQ(Block(), solver=Broyden(), adjoint=Unrolled(4)), ValueError, "Unrolled.*Broyden"),
        (lambda _: DEQ(Block())({"a": torch.ones(2)}), TypeError, "z0 must be given.*dict"),
        (lambda layer: layer(torch.ones(2, 7)), ValueError, r"x.*8 features.*\(2, 7\)"),
        (lambda layer: layer(torch.ones(2, 8).long()), TypeError, "x.*floating-point.*int64"),
        (lambda layer: layer([1.0]), TypeError, "x.*floating-point.*list"),
        (lambda layer: layer(torch.tensor(1.0)), ValueError, "x.*8 features"),
        (lambda _: DEQ(tdeq.cells.Cell())(torch.ones(2, 2)), NotImplementedError, "forward"),
    ],
)
def test_bad_input_is_named(call, error, words):
    layer, x = DEQ(tdeq.cells.Affine(8)), torch.randn(2, 8)
    z = layer(x)
    with pytest.raises(error, match=words):
        call(layer)
    assert torch.equal(layer(x), z)  # an error leaves nothing behind


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
        lambda layer, x: torch.vmap(layer)(torch.stack([x, x])),
    ],
    ids=["grad", "jvp", "vmap"],
)
def test_functional_transforms_raise(x, transform):
    with pytest.raises(RuntimeError):
        transform(DEQ(Block()), x)
