"""A converted stack as a module: its weights, training, precision, unrolling, copies, the compiler."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from stacks import MLP, Basic, Causal, mlps, rms
from torch import nn

from tritondeq import DEQ, Anderson, Picard, to_equilibrium


def test_weights_come_from_the_stack_which_stays_as_it_is():
    stack = nn.ModuleList(Basic() for _ in range(5))
    for module in stack.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.weight.data.normal_(), module.num_batches_tracked.add_(3)
    before = copy.deepcopy(stack.state_dict())
    layer = to_equilibrium(stack, prelude=1, coda=1, batch_norm="frozen")
    assert len(layer) == 3 and layer[0] is stack[0] and layer[2] is stack[4] and isinstance(layer[1], DEQ)
    for name in ("conv1.weight", "bn1.weight", "bn2.bias", "bn1.running_mean", "bn2.running_var"):
        mean = torch.stack([stack[i].state_dict()[name] for i in (1, 2, 3)]).mean(0)
        torch.testing.assert_close(layer.deq.cell.block.state_dict()[name], mean)
    first = to_equilibrium(stack, cell="first", prelude=1, coda=1, batch_norm="group").deq.cell.block
    for name in ("conv1.weight", "bn1.weight", "bn2.bias"):
        assert torch.equal(first.state_dict()[name], before[f"1.{name}"])
    assert not {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in stack.parameters()}
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())
    half = nn.Sequential(*(nn.Linear(2, 2, dtype=torch.bfloat16) for _ in range(3)))
    assert to_equilibrium(half).deq.cell.block.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("of", [list, tuple, nn.ModuleList, iter, lambda stack: dict(stack.named_children()).values()])
def test_any_sequence_of_blocks(of):
    stack, x = mlps(5), torch.randn(4, 6).double()
    want, layer = to_equilibrium(stack, prelude=1), to_equilibrium(of(stack), prelude=1)
    assert layer[0] is stack[0] and len(layer) == 2
    assert torch.equal(layer(x), want(x))


@pytest.mark.parametrize("container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
@pytest.mark.parametrize("start", [0, 2])
def test_a_slice_is_added_to_the_blocks_around_it(container, start):
    blocks, x = container(mlps(6)), torch.randn(4, 6).double().requires_grad_()
    whole = to_equilibrium(blocks, prelude=start, coda=1)
    parts = blocks[:start] + to_equilibrium(blocks[start:5]) + blocks[5:]
    assert type(parts) is type(blocks) and len(parts) == start + 2 and parts[-1] is blocks[5]
    assert parts.state_dict().keys() == whole.state_dict().keys()
    z = x
    for block in parts:
        z = block(z)
    assert torch.equal(z, whole(x))
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], torch.autograd.grad(whole(x).sum(), x)[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of", [nn.ModuleList, list, lambda stack: stack[1:]])
def test_the_mode_is_that_of_the_blocks(of, training):
    stack = mlps(4, dropout=0.5).train(training)
    layer, x = to_equilibrium(of(stack)), torch.randn(3, 6).double()
    assert all(module.training is training for module in layer.modules())
    assert torch.equal(layer(x), layer(x)) is not training


def test_a_module_as_cell_is_taken_as_it_is():
    cell = MLP().double()
    assert to_equilibrium(mlps(), cell=cell, prelude=2).deq.cell.block is cell


def test_unroll_is_the_weight_tied_loop_from_x():
    layer = to_equilibrium(mlps(4), prelude=1, unroll=3)
    x = torch.randn(5, 6).double()
    h = z = layer[0](x)
    for _ in range(3):
        y = (h + z) / 2
        v = h + layer.deq.cell.block(y) - y
        z = z.lerp(v * rms(h) / rms(v), 0.8)
    assert layer.deq.solver == Picard(0.8)
    torch.testing.assert_close(layer(x), z)
    assert (layer.last.steps == 3).all() and "unrolled=3" in repr(layer)
    assert layer.unrolled(None) is layer and not torch.equal(layer(x), z)
    layer.unrolled(3, checkpoint=True)
    torch.testing.assert_close(layer(x), z)


def test_an_ordinary_module():
    stack, x = mlps(5), torch.randn(4, 6).double()
    layer = to_equilibrium(stack, prelude=1, coda=1, solver=Anderson(3), tol=1e-6).unrolled(2)
    z = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), z) and twin.deq.solver == Anderson(3)
    other = to_equilibrium(mlps(5), prelude=1, coda=1)
    assert not [name for name in layer.state_dict() if "unrolled" in name or "twin" in name]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.unrolled(2)(x), z)  # whatever solves it, the loop is the cell's
    assert len(layer[:2]) == 2 and layer[:2].deq is layer.deq
    assert "injection='add', norm='outer', gain=1.0" in repr(layer)
    assert not to_equilibrium(stack.eval()).deq.cell.block.training
    assert layer.deq.solve(layer[0](x), z0=torch.zeros_like(x)).value.shape == x.shape


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_that_was_saved_of_another_stack_raises(strict):
    saved = mlps(6).state_dict()
    plain = "1 is an equilibrium, and the state dict has an explicit block there.*before to_equilibrium.*prelude="
    for stack in (to_equilibrium(mlps(6), prelude=1, coda=1), mlps(6)[:1] + to_equilibrium(mlps(5))):
        with pytest.raises(RuntimeError, match=plain):
            stack.load_state_dict(saved, strict=strict)
        with pytest.raises(RuntimeError, match=plain):
            stack.load_state_dict(to_equilibrium(mlps(6), prelude=2).state_dict(), strict=strict)
        model = nn.ModuleDict({"blocks": stack})
        with pytest.raises(RuntimeError, match=r"blocks\.1 is an equilibrium"):
            model.load_state_dict({f"blocks.{name}": value for name, value in saved.items()}, strict=strict)
    with pytest.raises(RuntimeError, match="the layer is an equilibrium"):
        to_equilibrium(mlps(6)).deq.load_state_dict(mlps(6)[0].state_dict(), strict=strict)


def test_a_part_of_a_state_dict_loads_where_it_is_not_strict():
    layer = to_equilibrium(mlps(6), prelude=1, coda=1)
    new, state = torch.randn(12, 6).double(), layer.state_dict()
    assert layer.load_state_dict({"1.cell.block.up.weight": new}, strict=False).unexpected_keys == []
    assert torch.equal(layer.deq.cell.block.up.weight, new)
    layer.load_state_dict({name: value for name, value in state.items() if name.startswith("0")}, strict=False)


def test_trains():
    stack, x, target = mlps(6, 16).float(), torch.randn(32, 16), torch.randn(32, 16)
    layer = to_equilibrium(stack, prelude=1, coda=1)
    opt, losses = torch.optim.Adam(layer.parameters(), 1e-2), []
    for step in range(40):
        layer.unrolled(2 if step < 10 else None)
        loss = F.mse_loss(layer(x), target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < losses[10] and layer.last.converged.all()


def test_low_precision():
    exact = to_equilibrium(mlps(6, 16).float(), prelude=1, tol=1e-6)
    x = torch.randn(8, 16)
    want = torch.autograd.grad(exact(x).sin().sum(), exact.parameters())
    half = copy.deepcopy(exact)
    half.deq.tol = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = half(x)
        grads = torch.autograd.grad(out.sin().sum(), half.parameters())
    narrow = copy.deepcopy(half).bfloat16()
    narrow_out = narrow(x.bfloat16())
    assert narrow_out.dtype == torch.bfloat16 and half.last.converged.all() and narrow.last.converged.all()
    for z in (out, narrow_out):
        assert (z - exact(x)).norm() <= 2e-2 * exact(x).norm()
    for a, b in zip(grads, want, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 5e-2 * b.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled():
    layer = to_equilibrium(nn.ModuleList(Causal(layer_idx=i) for i in range(3)), prelude=1)
    x, bias = torch.randn(2, 5, 8), torch.randn(5, 5)
    z = layer(x, bias)
    w = torch.compile(layer, backend="aot_eager")(x, bias)
    torch.testing.assert_close(w, z, rtol=1e-5, atol=1e-6)
    cell = to_equilibrium(nn.ModuleList([Causal()]), compile={"backend": "aot_eager"}, solver=Picard())
    torch.testing.assert_close(cell(x, bias), cell.deq.cell(cell(x, bias), cell.deq.cell.inject(x)), rtol=1, atol=1)
