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
    fixed.register_forward_hook(lambda module, args, out: seen.append((out / args[0]).detach()))
    x = torch.randn(64, 3, 6).double()
    assert_as_the_loop(layer, layer, x)
    assert len(seen) == 2, "hooks see one call a solve"
    torch.testing.assert_close(seen[0], seen[1])
    shape = {nn.Dropout: (64, 3, 6), nn.Dropout2d: (64, 3, 1)}.get(type(dropout), (64, 1, 1))
    one = seen[0][tuple(slice(n) for n in shape)]
    torch.testing.assert_close(seen[0], one.expand(64, 3, 6))
    assert set((0.7 * one).round(decimals=6).unique().tolist()) == {0.0, 1.0}
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_dropout_under_two_names_is_replaced_under_both():
    block = MLP(dropout=0.2)
    block.also = block.drop
    cell = to_equilibrium([block]).deq.cell.block
    assert isinstance(cell.drop, FixedDropout) and isinstance(cell.also, FixedDropout)


def test_shares_are_averaged():
    stack = mlps(4)
    stack[0].drop = nn.Identity()
    for share, block in zip((0.1, 0.2, 0.3), stack[1:], strict=True):
        block.drop = DropPath(share)
    assert to_equilibrium(stack).deq.cell.block.drop.p == pytest.approx(0.15)
    assert isinstance(to_equilibrium(stack, cell="first").deq.cell.block.drop, nn.Identity)
    assert to_equilibrium(stack[2:], cell="first").deq.cell.block.drop.p == 0.2
    for drop, dims in ((StochasticDepth(0.2, "batch"), 0), (FixedDropout(0.2, dims=2), 2)):
        stack[2].drop = drop
        assert to_equilibrium(stack[2:3]).deq.cell.block.drop.dims == dims
    stack[2].drop = type("SwinDropPath", (DropPath,), {})(0.2)  # as models of transformers call theirs
    assert to_equilibrium(stack[2:3]).deq.cell.block.drop.dims == 1
    stack[2].drop = DropPath(0.2, scale_by_keep=False)
    with pytest.raises(ValueError, match="scale_by_keep"):
        to_equilibrium(stack[2:3])


def test_attention_drops_nothing():
    net = encoder(dropout=0.2, **TIGHT)
    block = net.layers.deq.cell.block
    assert block.self_attn.dropout == 0 and block.dropout1.p == pytest.approx(0.2)
    assert net.layers[0].self_attn.dropout == 0.2
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


def test_batch_norm_is_refused():
    class BatchNormAct(nn.BatchNorm2d):
        pass

    untracked = Basic(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    for block, options, message in (
        (Basic(), {}, "block 0.*bn1 is a BatchNorm2d.*batch_norm='group'.*'frozen'"),
        (MLP(), {"cell": Basic(), "batch_norm": "group"}, "cell can't be iterated.*bn1"),
        (Basic(norm=BatchNormAct), {"batch_norm": "group"}, "block 0.*torch's BatchNorm only.*BatchNormAct"),
        (untracked, {"batch_norm": "frozen"}, "frozen.*tracks none"),
    ):
        with pytest.raises(ValueError, match=message):
            to_equilibrium(nn.Sequential(block), **options)


def test_batch_norm_is_replaced():
    for channels, groups in ((8, 2), (48, 8), (6, 1)):
        block = to_equilibrium(nn.Sequential(Basic(channels, channels)), batch_norm="group").deq.cell.block
        assert block.bn1.num_groups == groups and block.bn1.eps == 1e-5
    layer, x = images(batch_norm="frozen")
    frozen = layer.deq.cell.block.bn1
    stats = frozen.running_mean.clone()
    layer(x).sum().backward()
    assert torch.equal(stats, frozen.running_mean) and frozen.weight.grad.norm() > 0
    plain = nn.BatchNorm2d(8).double().eval()
    plain.load_state_dict({**plain.state_dict(), **frozen.state_dict()})
    torch.testing.assert_close(frozen(layer[0](x)), plain(layer[0](x)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prelude": 2, "coda": 1}, ValueError, "prelude=2 and coda=1.*3 blocks"),
        ({"prelude": -1}, ValueError, "prelude"),
        ({"coda": 1.0}, TypeError, "coda"),
        ({"cell": "last"}, ValueError, "cell must be 'mean', 'first' or a module.*'last'"),
        ({"cell": cells.Affine(6)}, TypeError, "cell.*signature.*Affine"),
        ({"norm": "rms"}, ValueError, "norm must be 'outer', 'tokens', 'sample', None"),
        ({"injection": None}, ValueError, "injection must be 'add' or a module, got None"),
        ({"gain": 0}, ValueError, "gain"),
        ({"batch_norm": "eval"}, ValueError, "batch_norm must be None, 'group'.*'eval'"),
        ({"unroll": 0}, ValueError, "steps"),
        ({"depth": 3}, TypeError, "depth"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"stack": MLP()}, TypeError, "stack must be a sequence of blocks, .* or a list, got MLP$"),
        ({"stack": nn.ModuleDict({"a": MLP()})}, TypeError, "stack.*got ModuleDict of str$"),
        ({"stack": [MLP(), None, 3]}, TypeError, "stack.*got list of MLP, NoneType, int$"),
        ({"stack": nn.ModuleList()}, ValueError, "stack must have at least one block"),
        ({"stack": []}, ValueError, "stack must have at least one block"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        to_equilibrium(**{"stack": mlps(3), **options})


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Basic(4, 8, 2), Basic()], "block 1 can't share one cell .* 0: it has conv1.in_channels 8, .* 4.*prelude="),
        ([Basic(), Basic(8, 8, 2)], r"block 1 can't share.*it has conv1.stride \(2, 2\), and block 0 has \(1, 1\)"),
        ([MLP(), Causal(6)], "block 1.*kind Causal.*has MLP"),
        ([MLP(), MLP(norm=nn.RMSNorm)], "block 1.*it has norm RMSNorm, and block 0 has LayerNorm"),
        ([MLP(norm=lambda w: nn.Identity()), MLP()], "block 1.*has norm LayerNorm, and block 0 has none"),
        ([nn.Linear(3, 3), nn.Linear(3, 3, bias=False)], r"block 1.*has no bias, and block 0 has of shape \(3,\)"),
    ],
)
def test_blocks_that_differ(blocks, message):
    with pytest.raises(ValueError, match=message):
        to_equilibrium(nn.Sequential(*blocks), batch_norm="group")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("block", "x", "error", "message"),
    [
        (nn.Linear(6, 3), torch.randn(2, 6), ValueError, r"block 0 can't be replaced.*\(2, 6\).*\(2, 3\).*prelude="),
        (nn.ReLU(inplace=True), torch.randn(2, 6), RuntimeError, "block 0 changes its input in place"),
        (MLP(), torch.ones(2, 6).long(), TypeError, "must be a floating-point tensor.*int64"),
        (MLP(), [torch.ones(2, 6), torch.ones(1, 6)], ValueError, "nested.*use_nested_tensor"),
    ],
)
def test_what_can_not_be_solved(block, x, error, message):
    with pytest.raises(error, match=message):
        to_equilibrium(nn.Sequential(block))(torch.nested.nested_tensor(x) if isinstance(x, list) else x)
