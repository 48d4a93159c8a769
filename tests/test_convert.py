"""Stacks of residual blocks as equilibria: the equation, its gradients, and what blocks may bring along."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritondeq import DEQ, Anderson, FixedDropout, Implicit, Picard, cells, to_equilibrium

TIGHT = {"tol": 1e-12, "max_steps": 400}


class MLP(nn.Module):
    def __init__(self, width=6, norm=nn.LayerNorm, dropout=0.0):
        super().__init__()
        self.norm, self.up, self.down = norm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, h):
        return h + self.drop(self.down(F.gelu(self.up(self.norm(h)))))


class Basic(nn.Module):
    """The basic block of a ResNet, as torchvision writes it."""

    def __init__(self, inputs=8, channels=8, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1, self.relu = norm(channels), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), norm(channels)
        self.downsample = None
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Causal(nn.Module):
    """Attention with a bias handed in and a cache, as the decoders of transformers have them; a tuple on demand."""

    def __init__(self, width=8, heads=2, layer_idx=0):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.layer_idx, self.attention_dropout = heads, layer_idx, 0.0

    def forward(self, h, bias=None, *, cache=None, weights=False):
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        new, all_ = q.shape[2], k.shape[2]
        mask = torch.ones(new, all_, dtype=torch.bool).tril(all_ - new)
        score = (q @ k.mT / q.shape[-1] ** 0.5 + (0 if bias is None else bias)).masked_fill(~mask, float("-inf"))
        a = F.dropout(score.softmax(-1), self.attention_dropout, self.training)
        h = h + self.out((a @ v).transpose(1, 2).flatten(2))
        return (h, a) if weights else h


class DynamicLayer:
    """That of transformers, by name: it replaces its tensors."""

    keys = values = None

    def update(self, k, v):
        self.keys = k if self.keys is None else torch.cat([self.keys, k], 2)
        self.values = v if self.values is None else torch.cat([self.values, v], 2)
        return self.keys, self.values


class DynamicCache:
    def __init__(self, layers=4, kind=DynamicLayer):
        self.layers = [kind() for _ in range(layers)]

    def update(self, k, v, layer_idx):
        return self.layers[layer_idx].update(k, v)

    def get_seq_length(self):
        return 0 if self.layers[0].keys is None else self.layers[0].keys.shape[2]


class DropPath(nn.Module):
    """That of timm, by name."""

    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        raise AssertionError("it is replaced")


class StochasticDepth(nn.Module):
    """That of torchvision, by name."""

    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode = p, mode


def mlps(n=6, width=6, **options) -> nn.Sequential:
    return nn.Sequential(*(MLP(width, **options) for _ in range(n))).double()


def images(n=4, batch_norm="group", **options):
    """(converted stage of a ResNet, a batch of images behind its first block)."""
    stage = nn.Sequential(Basic(4, 8, 2), *(Basic() for _ in range(n - 1))).double()
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    return to_equilibrium(stage, prelude=1, batch_norm=batch_norm, **options), torch.randn(2, 4, 6, 6).double()


def encoder(norm_first=True, batch_first=True, dropout=0.0, layers=5, **options):
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout, norm_first=norm_first, batch_first=batch_first)
    net = nn.TransformerEncoder(block, layers, enable_nested_tensor=False).double()
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.xavier_uniform_(p)
    net.layers = to_equilibrium(net.layers, **{"prelude": 1, "coda": 1, **options})
    return net


def assert_as_the_loop(net, layer, *inputs, **kwargs):
    """Values and gradients are those of the weight-tied explicit net, run long, differentiated by autograd."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    wanted = [*inputs, *net.parameters()]
    found = []
    for steps in (None, 100):
        torch.manual_seed(3)
        layer.unrolled(steps)
        out = net(*inputs, **kwargs)
        found.append((out, *torch.autograd.grad(out.sin().sum(), wanted)))
        if steps is None:
            assert layer.last.converged.all() and layer.last.steps.max() > 2
    layer.unrolled(None)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert all(g.norm() > 0 for g in found[0][1:])


def rms(x, dims=-1):
    return x.square().mean(dims, keepdim=True).sqrt()


@pytest.mark.parametrize("cell", ["mean", "first"])
@pytest.mark.parametrize("kind", ["MLP", "Identity"])
def test_rows(cell, kind):
    stack = mlps(norm={"MLP": nn.LayerNorm, "Identity": lambda width: nn.Identity()}[kind])
    layer = to_equilibrium(stack, cell=cell, prelude=1, coda=1, gain=0.8, **TIGHT)
    x = torch.randn(5, 3, 6).double()
    assert_as_the_loop(layer, layer, x)
    h = layer[0](x)
    z, block = layer[1](h), layer.deq.cell.block
    y = (h + z) / 2
    v = h + 0.8 * (block(y) - y)
    torch.testing.assert_close(z, v * rms(h) / rms(v), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(layer(x), stack[-1](z), rtol=1e-12, atol=1e-12)
    w = y + 0.4 * (block(y) - y)  # the block with an outer norm has the same equilibrium
    torch.testing.assert_close(z, w * rms(h) / rms(w), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("batch_norm", ["group", "frozen"])
def test_images(batch_norm):
    layer, x = images(batch_norm=batch_norm, **TIGHT)
    x = x.contiguous(memory_format=torch.channels_last)
    layer[0].eval()  # the block that stays explicit keeps its BatchNorm
    assert_as_the_loop(layer, layer, x)
    h = layer[0](x)
    z = layer[1](h)
    y = (h + z) / 2
    v = h + layer.deq.cell.block(y) - y
    torch.testing.assert_close(z, v * rms(h, (1, 2, 3)) / rms(v, (1, 2, 3)), rtol=1e-10, atol=1e-11)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(layer(x), alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoders(norm_first, batch_first):
    net = encoder(norm_first, batch_first, **TIGHT)
    x = torch.randn(3, 7, 8).double()
    mask = torch.randn(7 if batch_first else 3, 7 if batch_first else 3).double()
    assert_as_the_loop(net, net.layers, x, mask)
    assert net.layers.last.steps.shape == ((3,) if batch_first else ())
    assert net(x[0]).shape == x[0].shape and net.layers.last.steps.shape == ()  # tokens of one sample
    padding = torch.zeros(x.shape[:2] if batch_first else x.shape[:2][::-1], dtype=torch.bool)
    padding[0, -1] = True
    for mode in (True, False):
        net.train(mode)
        a, b = net(x, src_key_padding_mask=padding), net(x)
        assert (a - b).abs().max() > 1e-3
        with torch.no_grad():  # torch's fused path, in eval
            torch.testing.assert_close(net(x, src_key_padding_mask=padding), a, rtol=1e-6, atol=1e-7)


def test_arguments_reach_the_block_and_get_gradients():
    stack = nn.ModuleList(Causal(layer_idx=i) for i in range(4)).double()
    layer = to_equilibrium(stack, prelude=1, **TIGHT)
    x, bias = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 5).double()
    assert_as_the_loop(layer, layer, x, bias)

    def looped(x, bias):  # as a model does that owns the list
        for block in layer:
            x = block(x, bias)
        return x

    torch.testing.assert_close(looped(x, bias), layer(x, bias))
    assert (layer(x, bias) - layer(x, bias=0 * bias)).abs().max() > 1e-2


def test_further_outputs_are_those_at_the_solution():
    layer = to_equilibrium(nn.ModuleList([Causal().double()]), **TIGHT)
    x = torch.randn(2, 5, 8).double().requires_grad_()
    z, a = layer(x, weights=True)
    assert torch.equal(z, layer(x))
    again = layer.deq.cell.block((x + z) / 2, weights=True)[1]
    torch.testing.assert_close(a, again, rtol=1e-10, atol=1e-11)
    (grad,) = torch.autograd.grad(a.square().sum(), x)
    layer.unrolled(150)
    (want,) = torch.autograd.grad(layer(x, weights=True)[1].square().sum(), x)
    torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-10)


def test_a_cache_is_filled_once_at_the_solution():
    stack = nn.ModuleList(Causal(layer_idx=i) for i in range(4)).double()
    layer = to_equilibrium(stack, prelude=1, coda=1, **TIGHT).eval()
    x, cache = torch.randn(2, 6, 8).double(), DynamicCache()
    whole = layer(x)
    parts = [layer(part, cache=cache) for part in x.split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)
    assert [c.keys is None or c.keys.shape[2] for c in cache.layers] == [6, 6, True, 6]
    with torch.no_grad():
        positional = DynamicCache()
        to_equilibrium(stack[1:2])(x, None, cache=positional)
        assert positional.layers[1].keys.shape[2] == 6


def test_a_cache_that_changes_in_place_is_refused():
    class StaticLayer(DynamicLayer):
        pass

    layer = to_equilibrium(nn.ModuleList([Causal()]))
    with pytest.raises(ValueError, match="DynamicCache of transformers.*StaticLayer.*use_cache=False"):
        layer(torch.randn(2, 3, 8), cache=DynamicCache(kind=StaticLayer))
    cache = DynamicCache()
    cache.layers = None
    with pytest.raises(ValueError, match="no list of layers"):
        layer(torch.randn(2, 3, 8), cache=cache)
    graphed = to_equilibrium(nn.ModuleList([Causal()]), graph=True)
    with pytest.raises(ValueError, match="graph=True takes no cache"):
        graphed(torch.randn(2, 3, 8), cache=DynamicCache())


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


def test_a_cell_of_ones_own_is_taken_as_it_is():
    own = MLP().double()
    layer = to_equilibrium(mlps(), cell=own, prelude=2, **TIGHT)
    assert layer.deq.cell.block is own
    assert_as_the_loop(layer, layer, torch.randn(4, 6).double())


def test_norms_and_injections():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 6)

        def forward(self, z, x):
            return self.linear(torch.cat([z, x], -1))

    x = torch.randn(4, 3, 6).double()
    for options in (
        {"norm": None, "gain": 0.7},
        {"norm": nn.LayerNorm(6)},
        {"norm": "sample"},
        {"injection": Adapter()},
    ):
        layer = to_equilibrium(mlps(), **options, **TIGHT).double()
        assert_as_the_loop(layer, layer, x)
        cell, z = layer.deq.cell, layer(x)
        y = cell.injection(z, x) if "injection" in options else (x + z) / 2
        v = x + options.get("gain", 1.0) * (cell.block(y) - y)
        dims = (1, 2) if options.get("norm") == "sample" else -1
        norm = options.get("norm", "outer")
        want = v if norm is None else cell.norm(v) if isinstance(norm, nn.Module) else v * rms(x, dims) / rms(v, dims)
        torch.testing.assert_close(z, want, rtol=1e-10, atol=1e-11)
    channels_last = torch.randn(2, 3, 3, 6).double()  # an image of tokens, as no convolution takes it
    torch.testing.assert_close(rms(to_equilibrium(mlps(), **TIGHT)(channels_last)), rms(channels_last))


def test_contractive_with_random_weights():
    """What the docstring measured, on those that torch alone can make."""
    for seed in range(3):
        torch.manual_seed(seed)
        stacks = [
            (mlps(8, 32).float(), torch.randn(4, 32), {}),
            (mlps(8, 32, norm=lambda width: nn.Identity()).float(), torch.randn(4, 32), {}),
            (
                nn.Sequential(*(Basic(16, 16) for _ in range(4))),
                torch.randn(4, 16, 8, 8).relu(),
                {"batch_norm": "group"},
            ),
        ]
        for norm_first in (True, False):
            block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, norm_first=norm_first, batch_first=True)
            stacks.append((nn.ModuleList(copy.deepcopy(block) for _ in range(6)), torch.randn(4, 9, 32), {}))
        for stack, x, options in stacks:
            for cell in ("mean", "first"):
                layer = to_equilibrium(stack, cell=cell, **options)
                layer(x)
                assert layer.last.converged.all() and layer.last.steps.max() <= 13, (type(stack[0]), cell)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.3), nn.Dropout2d(0.3), DropPath(0.3), StochasticDepth(0.3, "row")])
def test_dropout_keeps_its_mask(dropout):
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
    own = to_equilibrium(mlps(), cell=MLP(dropout=0.1).double())
    with pytest.raises(RuntimeError, match="Dropout 'block.drop'.*FixedDropout"):
        own(torch.randn(2, 6).double())


def test_batch_norm_is_refused_or_replaced():
    stage = nn.Sequential(*(Basic() for _ in range(3)))
    with pytest.raises(ValueError, match="block 1.*bn1 is a BatchNorm2d.*batch_norm='group'.*'frozen'"):
        to_equilibrium(stage, prelude=1)
    with pytest.raises(ValueError, match="cell can't be iterated.*bn1"):
        to_equilibrium(stage, cell=Basic(), batch_norm="group")

    class BatchNormAct(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="block 0.*torch's own BatchNorm.*BatchNormAct"):
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
    "make,error,says",
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
def test_what_can_not_be_converted_says_so(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_can_not_be_solved_says_so():
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
        assert torch.equal(twin.unrolled(None)(x), copy.deepcopy(layer).unrolled(None)(x))
    other = to_equilibrium(mlps(5), prelude=1, coda=1)
    assert list(layer.state_dict())[:2] == ["0.norm.weight", "0.norm.bias"]
    assert not [name for name in layer.state_dict() if "unrolled" in name or "twin" in name]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.unrolled(2)(x), z)  # whatever solves it, the loop is the cell's own
    assert len(layer[:2]) == 2 and layer[:2].deq is layer.deq and len(layer[: len(stack)]) == 3
    assert "injection='add', norm='outer', gain=1.0" in repr(layer)
    assert not to_equilibrium(stack.eval()).deq.cell.block.training
    assert layer.deq.solve(layer[0](x), z0=torch.zeros_like(x)).value.shape == x.shape


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


def test_second_derivatives():
    layer = to_equilibrium(mlps(3, 4), adjoint=Implicit(), **TIGHT)
    x = torch.randn(2, 4).double().requires_grad_()
    weight = layer.deq.cell.block.up.weight

    def f(x, w):
        return torch.func.functional_call(layer, {"0.cell.block.up.weight": w}, (x,))

    assert torch.autograd.gradcheck(f, (x, weight)) and torch.autograd.gradgradcheck(f, (x, weight))


def test_zeros_stay_zeros():
    """Padding by zeros has an rms of 0."""
    layer = to_equilibrium(nn.Sequential(MLP()))
    x = torch.randn(2, 3, 6)
    x[:, 1] = 0
    x.requires_grad_()
    z = layer(x)
    z.sum().backward()
    assert z[:, 1].abs().max() < 1e-5 and x.grad.isfinite().all()
    assert layer(x[:0]).shape == (0, 3, 6)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled():
    layer = to_equilibrium(nn.ModuleList(Causal(layer_idx=i) for i in range(3)), prelude=1)
    x, bias = torch.randn(2, 5, 8), torch.randn(5, 5)
    z = layer(x, bias)
    w = torch.compile(layer, backend="aot_eager")(x, bias)
    torch.testing.assert_close(w, z, rtol=1e-5, atol=1e-6)
    cell = to_equilibrium(nn.ModuleList([Causal()]), compile={"backend": "aot_eager"}, solver=Picard())
    torch.testing.assert_close(cell(x, bias), cell.deq.cell(cell(x, bias), cell.deq.cell.inject(x)), rtol=1, atol=1)
