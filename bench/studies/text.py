"""Text: the next character of Python's own library, as its sources lie on this machine; steps at test time."""

import hashlib
import math
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritondeq as tdeq
from tritondeq import plot
from tritondeq.cells.tokens import rotary_angles, rotated
from tritondeq.toolbox import parameters

from . import contestants as who
from . import effort, plots
from .study import Draw, Job, Measure, Run, Study
from .train import COSTS, at_equal_time, cost, latency, solved, train
from .verdict import compare

SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))  # and one more for all other characters
NOT_READ = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 10  # one file of so many
ROTARY = 10000.0
PLAIN = "plain stack"


@dataclass(frozen=True)
class Corpus:
    """Symbols [N], uint8, of files to train on and of those held out; `digest` is the SHA-256 of both."""

    train: Tensor
    test: Tensor
    digest: str


@cache
def corpus() -> Corpus:
    """Reads the sources of the running Python's standard library, in order of their paths.

    Without tests, tables of encodings, and what this machine has installed or configured. A file is held out by a hash
    of its path.

    Raises:
        FileNotFoundError: there are none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[str]] = {False: [], True: []}
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        parts[held_out(name)].append(path.read_text("utf-8", errors="replace"))
    if not all(parts.values()):
        raise FileNotFoundError(f"no Python sources in {root}: the text study reads those of the standard library")
    learnt, unseen = ("".join(parts[held]) for held in (False, True))
    digest = hashlib.sha256(f"{learnt}\0{unseen}".encode("utf-8", "surrogatepass")).hexdigest()
    return Corpus(symbols(learnt), symbols(unseen), digest)


def sources(root: Path) -> Iterator[Path]:
    """Yields the source files of the library below `root`, in order."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_READ and not name.startswith("config-"))
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def held_out(name: str) -> bool:
    """Returns whether a file of that path is for testing only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT == 0


def symbols(text: str) -> Tensor:
    """Places in SYMBOLS, or len(SYMBOLS), one a character."""
    table = np.full(128, len(SYMBOLS), dtype=np.uint8)
    table[[ord(symbol) for symbol in SYMBOLS]] = np.arange(len(SYMBOLS))
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return torch.from_numpy(table[np.minimum(points, 127)])


class Plain(nn.Module):
    """The usual pre-norm block, z + Attn(RMS z), then + FFN(RMS .).

    It has the parts of `cells.Transformer` and no input but z.
    """

    def __init__(self, features: int, heads: int):
        super().__init__()
        like = tdeq.cells.Transformer(features, heads=heads, causal=True, rotary=ROTARY)
        self.heads, self.width = heads, features // heads
        self.qkv, self.output, self.up, self.down = like.qkv, like.output, like.up, like.down
        self.attention_norm, self.ffn_norm = like.attention_norm, like.ffn_norm

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Evaluates the block on z, [B, T, D]; x is not used."""
        q, k, v = self.qkv(self.attention_norm(z)).unflatten(-1, (3, self.heads, self.width)).movedim((-3, -2), (0, 2))
        angles = rotary_angles(0, z.shape[1], self.width, ROTARY, z)
        q, k = (rotated(t, *angles) for t in (q, k))
        z = z + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, h = self.up(self.ffn_norm(z)).chunk(2, dim=-1)
        return z + self.down(F.silu(gate) * h)


class Net(nn.Module):
    """Symbols [B, T] -> logits of the next ones [B, T, V]: an embedding, the contestant's body, and a linear head."""

    def __init__(self, contestant: str, features: int, head: int, depth: int, **options: Any):
        super().__init__()
        heads, self.plain = features // head, contestant == PLAIN
        self.embedding = nn.Embedding(len(SYMBOLS) + 1, features)
        if self.plain:
            self.body = who.Stack(lambda: Plain(features, heads), depth)
        else:
            make = partial(tdeq.cells.Transformer, features, heads=heads, causal=True, rotary=ROTARY)
            self.body = who.body(contestant, make, depth, **options)
        self.norm = nn.RMSNorm(features) if self.plain else nn.Identity()  # the cell ends with one
        self.head = nn.Linear(features, len(SYMBOLS) + 1)

    def forward(self, symbols: Tensor) -> Tensor:
        """Returns logits [B, T, symbols] for symbols [B, T]."""
        x = self.embedding(symbols)
        return self.head(self.norm(self.body(x, x if self.plain else None)))


def build(job: Job) -> Net:
    """The contestant's net, drawn from the job's seed."""
    settings = job.settings
    options = {
        "tol": settings["tol"],
        "max_steps": settings["max_steps"],
        "adjoint": tdeq.Phantom(*settings["phantom"]),
    }
    head, depth, features = settings["head"], settings["depth"], settings["features"]

    def made(contestant: str, width: int) -> Net:
        return Net(contestant, width, head, depth, **options)

    if job.contestant == who.WIDE:
        target = parameters(made(who.STACK, features))
        widths = range(features, 8 * features + 1, head)
        features = who.matched(lambda width: parameters(made(who.DEQ, width)), target, widths)
    torch.manual_seed(job.seed)
    return made(job.contestant, features).to(job.device)


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(symbols [B, T], the next ones [B, T])."""
    at = text[starts[:, None] + torch.arange(length + 1)].long()
    return at[:, :-1], at[:, 1:]


def bits(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy, in bits a character."""
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten()) / math.log(2)


def run(job: Job) -> dict[str, Any]:
    """Trains one contestant with one seed and returns what was measured."""
    net, text, settings = build(job), corpus(), job.settings
    length, batch = settings["length"], settings["batch"]
    generator = torch.Generator().manual_seed(job.seed)

    def drawn() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text.train) - length, (batch,), generator=generator)
        return tuple(part.to(job.device) for part in windows(text.train, starts, length))

    apart = len(text.test) // settings["test"]
    test = windows(text.test, torch.arange(settings["test"]) * apart, length)
    x, y = (part.to(job.device) for part in test)
    tested = torch.no_grad()(lambda: bits(net, x, y).item())
    sample = windows(text.train, torch.arange(batch) * length, length)
    sample = tuple(part.to(job.device) for part in sample)
    found = {"corpus": text.digest, "symbols": [len(text.train), len(text.test)], "python": platform.python_version()}
    found["trained"] = settings["updates"] * batch * length
    found |= cost(net, lambda: bits(net, *sample))
    spent = train(
        net,
        lambda part: bits(net, *part),
        (drawn() for _ in range(settings["updates"])),
        updates=settings["updates"],
        lr=settings["lr"],
        check=tested,
    )
    found |= spent | {"bits": tested(), "tested": y.numel()} | solved(net.body)
    return found | latency(lambda: net(x), y.numel(), job.device) | by_effort(net, job, tested)


def by_effort(net: Net, job: Job, tested: Callable[[], float]) -> dict[str, Any]:
    """Measures the bits of the trained net at other numbers of steps.

    Curves [steps, bits] for all, [tolerance, bits] and [tolerance, steps] for equilibria; `half` and `double`, with so
    many of the steps that it was trained with.
    """
    settings, steps, core = job.settings, who.steps(net.body), effort.core(net.body)
    own = steps.mean().item() if isinstance(steps, Tensor) else steps
    if core is None:
        return {"by_steps": [[own, tested()]], "half": None, "double": None}
    beside = 2 if isinstance(net.body, who.Hybrid) else 0

    def at(count: int) -> float:
        with effort.taking(core, count, settings["tight"]):
            return tested()

    found = {"by_steps": [[count + beside, at(count)] for count in settings["steps"]]}
    for name, share in (("half", 0.5), ("double", 2)):
        found[name] = at(max(1, round(share * (own - beside))))
    if who.solution(net.body) is None:
        return found
    curves = {"by_tol": [], "steps_by_tol": []}
    for tol in settings["tols"]:
        with effort.changed(core, tol=tol, max_steps=max(settings["steps"])):
            curves["by_tol"].append([tol, tested()])
            curves["steps_by_tol"].append([tol, who.steps(net.body).mean().item()])
    return found | curves


def pictures(runs: list[Run]) -> dict[str, Draw]:
    """Returns what to draw, by name."""
    return {"size": lambda figure: size(figure, runs), "steps": lambda figure: steps(figure, runs)} | {
        "learning": lambda figure: plots.learning(figure, [""], runs, BITS)
    }


def size(figure: Any, runs: list[Run]) -> None:
    """Bits against parameters, a dot a seed and the mean."""
    ax = figure.subplots()
    for name in plots.names(runs):
        own, look = plots.of(runs, contestant=name), plots.style(name, plots.names(runs))
        x, y = [run["parameters"] for run in own], [run["bits"] for run in own]
        ax.plot(x, y, ".", color=look["color"], alpha=0.5, markersize=5)
        ax.plot(mean(x), mean(y), linestyle="", label=name, markersize=9, **look)
    ax.set(xscale="log", xlabel="parameters", ylabel=BITS)
    plot.tidy(ax)
    plots.legend(figure, ax)


def steps(figure: Any, runs: list[Run]) -> None:
    """Bits by steps, bits by tolerance, steps by tolerance."""
    columns = [("by_steps", "steps at test time", BITS)]
    columns += [("by_tol", "tolerance", BITS), ("steps_by_tol", "tolerance", "steps")]
    axes = plots.panels(figure, [""], columns, runs)
    axes[0].set(xscale="log", ylim=(None, 1.05 * max(run["bits"] for run in runs)))  # a step or two are off the scale
    for ax, (_, x, _) in zip(axes, columns, strict=True):
        if x == "tolerance":
            ax.set(xscale="log")
            ax.invert_xaxis()


def says(runs: list[Run]) -> Iterator[str]:
    """Yields what the numbers show, in sentences."""
    first, digests = runs[0], sorted({run["corpus"][:16] for run in runs})
    learnt, unseen = first["symbols"]
    yield (
        f"The sources of Python {first['python']}: {learnt:,} characters to train on and {unseen:,} held out, SHA-256 "
        f"{', '.join(digests)}...; tested on {first['tested']:,} of the latter. Each contestant saw "
        f"{first['trained']:,} characters, {100 * first['trained'] / learnt:.1f} % of what is there."
    )
    own = {name: plots.of(runs, contestant=name) for name in plots.names(runs)}
    seconds, values = at_equal_time({name: [run["curve"] for run in each] for name, each in own.items()})
    fared = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    yield f"After {seconds:.1f} s, when the quickest is done and the others still train, bits: {fared}."
    for name in (name for name in (who.DEQ, who.HYBRID, who.WIDE, who.LOOP) if name in own):
        half, usual, double = (mean(run[key] for run in own[name]) for key in ("half", "bits", "double"))
        yield f"{name}: {half:.3f} bits with half of its steps, {usual:.3f} as trained, {double:.3f} with double."
    for name in (name for name in (who.DEQ, who.HYBRID, who.WIDE, who.STACK) if {name, PLAIN} <= own.keys()):
        told = compare(*([run["bits"] for run in own[each]] for each in (name, PLAIN)), "less")
        word = f" ({told.word})" if told.word else ""
        yield f"{name} against the {PLAIN}, the usual transformer: {told.ours:.3f} to {told.theirs:.3f} bits{word}."


BITS = "bits a character"
SHARED = {"lr": 6e-3, "tol": 1e-2, "tight": 1e-5, "max_steps": 24, "phantom": [5, 0.8]}
SHARED |= {"steps": [1, 2, 3, 4, 6, 8, 12, 16, 24], "tols": [0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4]}
TINY = {"features": 16, "head": 8, "depth": 2, "length": 16, "batch": 2, "updates": 3, "test": 4}
TINY |= {"steps": [1, 2, 4], "tols": [0.1, 0.01]}
QUICK = {"features": 64, "head": 16, "depth": 4, "length": 128, "batch": 4, "updates": 500, "test": 64}
FULL = {"features": 384, "head": 64, "depth": 8, "length": 256, "batch": 64, "updates": 6000, "test": 512, "lr": 3e-3}
STUDY = Study(
    name="text",
    title="Text: bits a character, by parameters and by steps",
    question=(
        "does an equilibrium foretell text as well as a stack that has several times its parameters, and do more steps "
        "at test time help? The cell is a causal `cells.Transformer` with rotary positions; gradients are phantom ones "
        "([Geng et al. 2021](https://arxiv.org/abs/2111.05177)). The plain stack is the usual pre-norm transformer, "
        "which has the cell's parts, adds what each computes, and does not see its input again. Half and double "
        "are the bits with so many of the steps that the net was trained with, at test time only. A step is an "
        "evaluation of the block; that at which an equilibrium stops measures its residual and does not move it. A "
        "sample of the inference time is a character; steps are those of a sequence."
    ),
    data=(
        "the sources of the running Python's standard library, without tests, tables of encodings and installed "
        f"packages: printable ASCII, the newline, and one symbol for all else. One file of {HELD_OUT} is held out, "
        "by a hash of its path. Which Python's, and a hash of it all, is said below. Of learning rates "
        "0.006 and 0.012, tried once on files to train on, the higher suits DEQ and stack a little better and the "
        "plain stack much worse; quick runs take the lower for all. That of full runs is not tuned."
    ),
    settings={"tiny": SHARED | TINY, "quick": SHARED | QUICK, "full": SHARED | FULL},
    contestants=(*who.ALL, PLAIN),
    measures=(
        Measure("bits", BITS, "less", main=True, digits=3),
        Measure("half", "bits with half of the steps", "less", main=True, digits=3),
        Measure("double", "bits with twice the steps", "less", main=True, digits=3),
        *COSTS,
    ),
    run=run,
    pictures=pictures,
    says=says,
)
