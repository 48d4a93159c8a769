"""Residual blocks as models have them, stacks of them converted, and what a converted one is held against."""

import torch
import torch.nn.functional as F
from torch import nn

from tritondeq import to_equilibrium

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
    runs = []
    for steps in (None, 100):
        torch.manual_seed(3)
        layer.unrolled(steps)
        out = net(*inputs, **kwargs)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), wanted)))
        if steps is None:
            assert layer.last.converged.all() and layer.last.steps.max() > 2
    layer.unrolled(None)
    torch.testing.assert_close(*runs, rtol=1e-7, atol=1e-9)
    assert all(g.norm() > 0 for g in runs[0][1:])


def rms(x, dims=-1):
    return x.square().mean(dims, keepdim=True).sqrt()
