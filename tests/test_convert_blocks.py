"""What blocks may bring along, dropout and BatchNorm, and what can't be converted or solved."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stacks import MLP, TIGHT, Basic, Causal, DropPath, StochasticDepth, assert_as_the_loop, encoder, images, mlps
from torch import nn

from tritondeq import FixedDropout, cells, to_equilibrium


@pytest.mark.parametrize("dropout", [nn.Dropout(0.3), nn.Dropout2d(0.3), DropPath(0.3), StochasticDepth(0.3, "row")])
def test_dropout_has_one_mask_a_solve(dropout):
    stack = mlps()
    for block in stack:
        block.drop = copy.deepcopy(dropout)
    layer = to_equilibrium(stack, **TIGHT)
    fixed, seen = layer.deq.cell.block.drop, []
    fixed.register_forward_hook(lambda module, args, out: seen.append(module.mask))
    x = torch.randn(64, 3, 6).double()
    assert_as_the_loop(layer, layer, x)
    assert len({id(mask) for mask in seen}) == 2  # one a solve
    whole = {nn.Dropout: (64, 3, 6), nn.Dropout2d: (64, 3, 1)}.get(type(dropout), (64, 1, 1))
    assert seen[0].shape == whole and set(seen[0].unique().tolist()) == {0.0, 1 / 0.7}
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_shares_are_averaged_and_attention_drops_nothing():
    stack = mlps(4)
    stack[0].drop = nn.Identity()
    for share, block in zip((0.1, 0.2, 0.3), stack[1:], strict=True):
        block.drop = DropPath(share)
    assert to_equilibrium(stack).deq.cell.block.drop.p == pytest.approx(0.15)
    assert isinstance(to_equilibrium(stack, cell="first").deq.cell.block.drop, nn.Identity)
    assert to_equilibrium(stack[2:], cell="first").deq.cell.block.drop.p == 0.2
    stack[2].drop = StochasticDepth(0.2, "batch")
    assert to_equilibrium(stack[2:3]).deq.cell.block.drop.dims == 0
    stack[2].drop = FixedDropout(0.2, dims=2)
    assert to_equilibrium(stack[2:3]).deq.cell.block.drop.dims == 2
    stack[2].drop = DropPath(0.2, scale_by_keep=False)
    with pytest.raises(ValueError, match="scale_by_keep"):
        to_equilibrium(stack[2:3])

    net = encoder(dropout=0.2, **TIGHT)
    block = net.layers.deq.cell.block
    assert (
        block.self_attn.dropout == 0
        and block.dropout1.p == pytest.approx(0.2)
        and net.layers[0].self_attn.dropout == 0.2
    )
    net.layers[0].eval(), net.layers[2].eval()
    assert_as_the_loop(net, net.layers, torch.randn(3, 7, 8).double())
    stack = nn.ModuleList([Causal()])
    stack[0].attention_dropout, stack[0].attn_drop = 0.1, nn.Dropout(0.1)
    block = to_equilibrium(stack).deq.cell.block
    assert block.attention_dropout == 0 and block.attn_drop.p == 0 and stack[0].attention_dropout == 0.1


@pytest.mark.parametrize("how", ["dropout", "scaled_dot_product_attention"])
def test_masks_that_no_module_shows_are_refused(how):
    class Hiding(MLP):
        share = 0.2

        def forward(self, h):
            if how == "dropout":
                return super().forward(F.dropout(h, self.share, self.training))
            return super().forward(F.scaled_dot_product_attention(h, h, h, None, self.share * self.training))

    layer = to_equilibrium(nn.Sequential(Hiding(dropout=0.1)))
    x = torch.randn(4, 3, 6)
    with pytest.raises(RuntimeError, match=f"{how} with a dropout of 0.2"):
        layer(x)
    assert layer.eval()(x).isfinite().all()
    layer.deq.cell.block.share = 0.0
    layer.train()(x)
    layer.deq.cell.block.share = 0.2
    with pytest.raises(RuntimeError, match=how):  # each train() looks anew
        layer.train()(x)
    given = to_equilibrium(mlps(), cell=MLP(dropout=0.1).double())
    with pytest.raises(RuntimeError, match="Dropout 'block.drop'.*FixedDropout"):
        given(torch.randn(2, 6).double())


def test_batch_norm_is_refused_or_replaced():
    stage = nn.Sequential(*(Basic() for _ in range(3)))
    with pytest.raises(ValueError, match="block 1.*bn1 is a BatchNorm2d.*batch_norm='group'.*'frozen'"):
        to_equilibrium(stage, prelude=1)
    with pytest.raises(ValueError, match="cell can't be iterated.*bn1"):
        to_equilibrium(stage, cell=Basic(), batch_norm="group")

    class BatchNormAct(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="block 0.*torch's BatchNorm only.*BatchNormAct"):
        to_equilibrium(nn.Sequential(Basic(norm=BatchNormAct)), batch_norm="group")
    untracked = nn.Sequential(Basic(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)))
    with pytest.raises(ValueError, match="frozen.*tracks none"):
        to_equilibrium(untracked, batch_norm="frozen")
    for channels, groups in ((8, 2), (48, 8), (6, 1)):
        block = to_equilibrium(nn.Sequential(Basic(channels, channels)), batch_norm="group").deq.cell.block
        assert block.bn1.num_groups == groups and block.bn1.eps == 1e-5

    layer, x = images(batch_norm="frozen")
    block = layer.deq.cell.block
    stats = block.bn1.running_mean.clone()
    for p in layer(x).sum(), layer(2 * x).sum():
        p.backward()
    assert torch.equal(stats, block.bn1.running_mean) and block.bn1.weight.grad.norm() > 0
    plain = nn.BatchNorm2d(8).double().eval()
    plain.load_state_dict({**plain.state_dict(), **block.bn1.state_dict()})
    torch.testing.assert_close(block.bn1(layer[0](x)), plain(layer[0](x)))


@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda: to_equilibrium(MLP()), TypeError, "stack must be an nn.Sequential or nn.ModuleList.*MLP"),
        (lambda: to_equilibrium([MLP()]), TypeError, "stack.*list"),
        (lambda: to_equilibrium(mlps(3), prelude=2, coda=1), ValueError, "prelude=2 and coda=1.*3 blocks"),
        (lambda: to_equilibrium(mlps(3), prelude=-1), ValueError, "prelude"),
        (lambda: to_equilibrium(mlps(3), coda=1.0), TypeError, "coda"),
        (lambda: to_equilibrium(mlps(3), cell="last"), ValueError, "cell must be 'mean', 'first' or a module.*'last'"),
        (lambda: to_equilibrium(mlps(3), cell=cells.Affine(6)), TypeError, "cell.*signature.*Affine"),
        (lambda: to_equilibrium(mlps(3), norm="rms"), ValueError, "norm must be 'outer', 'tokens', 'sample', None"),
        (lambda: to_equilibrium(mlps(3), injection=None), ValueError, "injection must be 'add' or a module, got None"),
        (lambda: to_equilibrium(mlps(3), gain=0), ValueError, "gain"),
        (lambda: to_equilibrium(mlps(3), batch_norm="eval"), ValueError, "batch_norm must be None, 'group'.*'eval'"),
        (lambda: to_equilibrium(mlps(3), unroll=0), ValueError, "steps"),
        (lambda: to_equilibrium(mlps(3), depth=3), TypeError, "depth"),
        (lambda: to_equilibrium(mlps(3), tol=-1.0), ValueError, "tol"),
        (
            lambda: to_equilibrium(nn.Sequential(Basic(4, 8, 2), Basic()), batch_norm="group"),
            ValueError,
            r"block 1 can't share one cell with block 0: it has conv1.in_channels 8, and block 0 has 4.*prelude=",
        ),
        (
            lambda: to_equilibrium(nn.Sequential(Basic(), Basic(), Basic(8, 8, 2)), prelude=1, batch_norm="group"),
            ValueError,
            r"block 2 can't share.*block 1: it has conv1.stride \(2, 2\), and block 1 has \(1, 1\)",
        ),
        (lambda: to_equilibrium(nn.Sequential(MLP(), Causal(6))), ValueError, "block 1.*kind Causal.*has MLP"),
        (
            lambda: to_equilibrium(nn.Sequential(MLP(), MLP(norm=nn.RMSNorm))),
            ValueError,
            "block 1.*it has norm RMSNorm, and block 0 has LayerNorm",
        ),
        (
            lambda: to_equilibrium(nn.Sequential(MLP(norm=lambda w: nn.Identity()), MLP())),
            ValueError,
            "block 1.*has norm LayerNorm, and block 0 has none",
        ),
        (
            lambda: to_equilibrium(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))),
            ValueError,
            r"block 1.*has no bias, and block 0 has of shape \(3,\)",
        ),
    ],
)
def test_what_can_not_be_converted(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_can_not_be_solved():
    with pytest.raises(ValueError, match=r"block 1 can't be replaced.*\(2, 6\).*\(2, 3\).*prelude="):
        to_equilibrium(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), prelude=1)(torch.randn(2, 6))
    layer = to_equilibrium(nn.Sequential(MLP()))
    with pytest.raises(TypeError, match="must be a floating-point tensor.*int64"):
        layer(torch.ones(2, 6).long())
    with pytest.raises(ValueError, match="nested.*use_nested_tensor"):
        layer(torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(1, 6)]))

    class InPlace(nn.Module):
        def forward(self, h):
            return h.relu_()

    with pytest.raises(RuntimeError, match="block 0 changes its input in place"):
        to_equilibrium(nn.Sequential(InPlace()))(torch.randn(2, 6))
