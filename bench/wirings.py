"""How residual stacks begin as equilibria: `python -m tritondeq.bench.wirings` prints the table of NOTES.md.

Random weights as the makers of the blocks draw them (1x), and with all matrices and kernels four times as large (4x).
One block stays in front, `to_equilibrium(stack, prelude=1)`; 3 or 8 become a cell, by their mean or as the first of
them. Columns give the least and the most over these, seeds and samples. By the torch backend, in one thread.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritondeq as tdeq
from tritondeq.toolbox import one_thread

from .common import installed, markdown_table

WIDTH, HEADS, TOKENS, PIXELS, SAMPLES = 64, 4, 16, 8, 4
BLOCKS, SEEDS, SCALES = (3, 8), 3, (1, 4)
TOL, MOST = 1e-3, 200
SOLVERS = {"undamped": tdeq.Picard(), "default": tdeq.Picard(0.8), "Anderson(5)": tdeq.Anderson()}
HEAD = ["wiring", "weights", "spectral radius", *SOLVERS, "familiar block", "its over ours"]

Stack = tuple[nn.Sequential | nn.ModuleList, Tensor]  # and what enters it


class MLP(nn.Module):
    """h + W2 gelu(W1 norm(h))."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm, self.up, self.down = norm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(self.norm(h))))


class Basic(nn.Module):
    """The basic block of a ResNet, its norms of groups."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(8, WIDTH) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class Wiring:
    """Of blocks.

    Attributes:
        make: A stack of so many.
        needs: Package that has the blocks.
    """

    make: Callable[[int], Stack]
    needs: str = "torch"


WIRINGS = {
    "MLP, pre-norm": Wiring(lambda n: _mlps(n, nn.LayerNorm)),
    "MLP without a norm": Wiring(lambda n: _mlps(n, lambda width: nn.Identity())),
    "encoder, pre-norm": Wiring(lambda n: _encoders(n, norm_first=True)),
    "encoder, post-norm": Wiring(lambda n: _encoders(n, norm_first=False)),
    "ResNet, basic, GroupNorm": Wiring(lambda n: (nn.Sequential(*(Basic() for _ in range(n))), _image())),
    "ResNet, basic (torchvision)": Wiring(lambda n: _resnet(n, "BasicBlock"), "torchvision"),
    "ResNet, bottleneck (torchvision)": Wiring(lambda n: _resnet(n, "Bottleneck"), "torchvision"),
    "ViT (timm)": Wiring(_vit, "timm"),
    "GPT-2 (transformers)": Wiring(_gpt2, "transformers"),
}


@dataclass(frozen=True)
class Outcome:
    """Of one cell, a number for each sample.

    Attributes:
        radius: Spectral radius of df/dz at the fixed point; NaN where none was found.
        steps: Evaluations to TOL, by the name of the solver; infinite where MOST do not do.
        familiar: Those of z = N((y + F(y)) / 2), undamped, whose fixed point is the same.
    """

    radius: Tensor
    steps: dict[str, Tensor]
    familiar: Tensor


@torch.no_grad()
def start(name: str, scale: float, blocks: int, cell: str, seed: int) -> Outcome:
    torch.manual_seed(seed)
    stack, x = WIRINGS[name].make(blocks + 1)
    for p in stack.eval().parameters():
        if p.ndim > 1:
            p.mul_(scale)
    layer = tdeq.to_equilibrium(stack, cell=cell, prelude=1, batch_norm="group").deq
    x = _state(stack[0](x))
    layer.solver, layer.tol, layer.max_steps = tdeq.Picard(0.3), 1e-5, 2000
    found = layer.solve(x)
    radius = tdeq.spectral_radius(layer, found.value, x, products=30).where(found.converged, torch.nan)
    layer.tol, layer.max_steps, steps = TOL, MOST, {}
    for solver in SOLVERS:
        layer.solver = SOLVERS[solver]
        steps[solver] = _steps(layer.solve(x))
    return Outcome(radius, steps, _steps(_familiar(layer.cell.block, x)))


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
    said = [f"{fine.min():.{digits}f} to {fine.max():.{digits}f}"] if len(fine) else []
    if len(fine) < len(values):
        said.append(f"{100 * (1 - len(fine) / len(values)):.0f} % not")
    return ", ".join(said)


def rows(names: Sequence[str], blocks: Sequence[int] = BLOCKS, seeds: int = SEEDS) -> Iterator[list[str]]:
    for scale, name in product(SCALES, names):
        cases = product(blocks, ("mean", "first"), range(seeds))
        found = [start(name, scale, *case) for case in cases]
        steps = {solver: torch.cat([o.steps[solver] for o in found]) for solver in SOLVERS}
        radius, familiar = torch.cat([o.radius for o in found]), torch.cat([o.familiar for o in found])
        both = familiar.isfinite() & steps["undamped"].isfinite()
        counts = [_range(each, 0) for each in (*steps.values(), familiar)]
        yield [name, f"{scale}x", _range(radius, 2), *counts, _range((familiar / steps["undamped"])[both], 1)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("tritondeq.bench.wirings", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="that are replaced; default: 3 8")
    options = parser.parse_args(argv)
    here = [name for name, wiring in WIRINGS.items() if installed(wiring.needs)]
    with one_thread(), tdeq.backend("torch"):
        print("\n".join(markdown_table([HEAD, *rows(here, options.blocks, options.seeds)])))
    for name in (name for name in WIRINGS if name not in here):
        print(f"\nNot measured: {name}, for {WIRINGS[name].needs} is not installed.")


if __name__ == "__main__":
    main()
