"""How residual stacks begin as equilibria: `python -m tritondeq.bench.wirings` prints a table.

Random weights as the makers of the blocks draw them (1x), and with all matrices and kernels four times as large (4x).
One block stays in front, `to_equilibrium(stack, prelude=1)`; 3 or 8 become a cell, by their mean or as the first of
them. Columns give the least and the most over these, seeds and samples: the spectral radius of df/dz at the fixed
point; evaluations to a residual of 1e-3 by three solvers; undamped evaluations of z = N((y + F(y)) / 2), the familiar
block with an outer norm, whose fixed point is the same, and how many times ours they are where both arrive. "46 % not":
of the samples, within 200 evaluations; of the radius, where 2000 did not do.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritondeq as tdeq
from tritondeq.toolbox import one_thread

from .machine import installed
from .report import markdown

WIDTH, HEADS, TOKENS, PIXELS, SAMPLES = 64, 4, 16, 8, 4
BLOCKS, SEEDS, SCALES = (3, 8), 3, (1, 4)
TOL, MOST = 1e-3, 200
SOLVERS = {"undamped": tdeq.Picard(), "default": tdeq.Picard(0.8), "Anderson": tdeq.Anderson()}
HEAD = ["wiring", "weights", "spectral radius", *SOLVERS, "familiar block", "its over ours"]

Stack = tuple[nn.Sequential | nn.ModuleList, Tensor]  # and what enters it


class MLP(nn.Module):
    """h + W2 gelu(W1 norm(h))."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm, self.up, self.down = norm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        """Evaluates the block on h, [..., WIDTH]."""
        return h + self.down(F.gelu(self.up(self.norm(h))))


class Basic(nn.Module):
    """The basic block of a ResNet, its norms of groups."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(8, WIDTH) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        """Evaluates the block on h, [B, WIDTH, H, W]."""
        return F.relu(h + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(h))))))


def _mlps(blocks: int, norm: Callable[[int], nn.Module]) -> Stack:
    return nn.Sequential(*(MLP(norm) for _ in range(blocks))), torch.randn(SAMPLES, WIDTH)


def _encoders(blocks: int, norm_first: bool) -> Stack:
    options = {"dropout": 0.0, "norm_first": norm_first, "batch_first": True}
    stack = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options) for _ in range(blocks))
    return stack, torch.randn(SAMPLES, TOKENS, WIDTH)


def _image() -> Tensor:
    return torch.randn(SAMPLES, WIDTH, PIXELS, PIXELS).relu()


def _resnet(blocks: int, kind: str) -> Stack:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, kind), [blocks, 1, 1, 1]).layer1, _image()


def _vit(blocks: int) -> Stack:
    import timm

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "num_heads": HEADS, "depth": blocks}
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    seen = []
    with model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0])):
        model(torch.randn(SAMPLES, 3, 32, 32))
    return model.blocks, seen[0]


def _gpt2(blocks: int) -> Stack:
    import transformers

    shape = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": blocks, "vocab_size": 100}
    model = transformers.GPT2Model(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    return model.h, model.wte(torch.randint(100, (SAMPLES, TOKENS))) + model.wpe(torch.arange(TOKENS))


# A stack of so many blocks and its input, and the package that has the blocks.
WIRINGS: dict[str, tuple[Callable[[int], Stack], str]] = {
    "MLP, pre-norm": (lambda n: _mlps(n, nn.LayerNorm), "torch"),
    "MLP without a norm": (lambda n: _mlps(n, lambda width: nn.Identity()), "torch"),
    "encoder, pre-norm": (lambda n: _encoders(n, norm_first=True), "torch"),
    "encoder, post-norm": (lambda n: _encoders(n, norm_first=False), "torch"),
    "ResNet, basic, GroupNorm": (lambda n: (nn.Sequential(*(Basic() for _ in range(n))), _image()), "torch"),
    "ResNet, basic (torchvision)": (lambda n: _resnet(n, "BasicBlock"), "torchvision"),
    "ResNet, bottleneck (torchvision)": (lambda n: _resnet(n, "Bottleneck"), "torchvision"),
    "ViT (timm)": (_vit, "timm"),
    "GPT-2 (transformers)": (_gpt2, "transformers"),
}


@torch.no_grad()
def start(name: str, scale: float, blocks: int, cell: str, seed: int) -> dict[str, Tensor]:
    """Returns, by column, a number for each sample of one cell.

    "radius" is NaN where there is no fixed point, and counts of evaluations are infinite where MOST do not do.
    """
    torch.manual_seed(seed)
    stack, x = WIRINGS[name][0](blocks + 1)
    for p in stack.eval().parameters():
        if p.ndim > 1:
            p.mul_(scale)
    layer = tdeq.to_equilibrium(stack, cell=cell, prelude=1, batch_norm="group").deq
    x = _state(stack[0](x))
    layer.solver, layer.tol, layer.max_steps = tdeq.Picard(0.3), 1e-5, 2000
    solution = layer.solve(x)
    radius = tdeq.spectral_radius(layer, solution.value, x, products=30)
    made = {"radius": radius.where(solution.converged, torch.nan)}
    layer.tol, layer.max_steps = TOL, MOST
    for solver in SOLVERS:
        layer.solver = SOLVERS[solver]
        made[solver] = _steps(layer.solve(x))
    return made | {"familiar": _steps(_familiar(layer.cell.block, x))}


def _state(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _steps(solution: tdeq.Solution) -> Tensor:
    return solution.steps.double().where(solution.converged, torch.inf)


def _familiar(block: nn.Module, x: Tensor) -> tdeq.Solution:
    dims = (1, 2, 3) if x.ndim == 4 else -1
    size = torch.linalg.vector_norm(x, dim=dims, keepdim=True)

    def f(z: Tensor) -> Tensor:
        y = (x + z) / 2
        v = (y + _state(block(y))) / 2
        return size * v / torch.linalg.vector_norm(v, dim=dims, keepdim=True)

    return tdeq.fixed_point(f, x, tol=TOL, max_steps=MOST)


def _range(values: Tensor, digits: int) -> str:
    fine = values[values.isfinite()]
    parts = [f"{fine.min():.{digits}f} to {fine.max():.{digits}f}"] if len(fine) else []
    if len(fine) < len(values):
        parts.append(f"{100 * (1 - len(fine) / len(values)):.0f} % not")
    return ", ".join(parts)


def rows(names: Sequence[str], blocks: Sequence[int] = BLOCKS, seeds: int = SEEDS) -> Iterator[list[str]]:
    """Yields the row of each wiring at each scale of its weights."""
    for scale, name in product(SCALES, names):
        cells = [start(name, scale, *case) for case in product(blocks, ("mean", "first"), range(seeds))]
        by = {column: torch.cat([cell[column] for cell in cells]) for column in cells[0]}
        both = by["familiar"].isfinite() & by["undamped"].isfinite()
        counts = [_range(by[column], 0) for column in (*SOLVERS, "familiar")]
        ratio = _range((by["familiar"] / by["undamped"])[both], 1)
        yield [name, f"{scale}x", _range(by["radius"], 2), *counts, ratio]


def main(argv: list[str] | None = None) -> None:
    """Prints the table, and what could not be measured here."""
    parser = argparse.ArgumentParser("tritondeq.bench.wirings", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="that are replaced; default: 3 8")
    options = parser.parse_args(argv)
    here = [name for name, (_, package) in WIRINGS.items() if installed(package)]
    with one_thread(), tdeq.backend("torch"):
        print(markdown([HEAD, *rows(here, options.blocks, options.seeds)]))
    for name, (_, package) in WIRINGS.items():
        if name not in here:
            print(f"\nNot measured: {name}, for {package} is not installed.")


if __name__ == "__main__":
    main()
