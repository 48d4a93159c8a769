"""One causal transformer block, run to its equilibrium, learns to write Python from the standard library's sources.

Run:  python examples/train_lm.py [--checkpoint FILE], or torchrun --nproc-per-node 2 examples/train_lm.py
Takes 40 s of processor time on one core, by `time`, with torch 2.14.
"""

import argparse
import math
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tritondeq as tdeq

SYMBOLS = 128  # ASCII


class LanguageModel(nn.Module):
    """Symbols [B, T] -> logits of the next ones [B, T, SYMBOLS]."""

    def __init__(self, features: int):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, features)
        cell = tdeq.cells.Transformer(features, heads=features // 16, causal=True, rotary=1e4)
        self.core = tdeq.DEQ(cell, adjoint=tdeq.Phantom(steps=5, damping=0.8), tol=1e-2, max_steps=24)
        self.head = nn.Linear(features, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        return self.head(self.core(self.embedding(symbols)))

    @torch.no_grad()
    def write(self, prompt: Tensor, count: int) -> Tensor:
        """Returns the prompt [1, T] and `count` symbols more: each is solved alone, beside the earlier equilibria."""
        symbols, new, cache = prompt, prompt, None
        for _ in range(count):
            z, cache = self.core.step(self.embedding(new), cache)
            new = (self.head(z[:, -1]) / 0.7).softmax(-1).multinomial(1)  # 0.7: a temperature
            symbols = torch.cat([symbols, new], 1)
        return symbols


def corpus() -> tuple[Tensor, Tensor]:
    """Returns the symbols of the standard library's modules: the first nine tenths, and the rest, for tests."""
    text = b"\n".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    symbols = torch.frombuffer(bytearray(text), dtype=torch.uint8).clamp(max=SYMBOLS - 1)
    return symbols[: len(symbols) * 9 // 10], symbols[len(symbols) * 9 // 10 :]


def windows(text: Tensor, starts: Tensor, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns windows of the text [B, T] and, for each symbol, the next one."""
    at = text[starts.unsqueeze(1) + torch.arange(length + 1)].long().to(device)
    return at[:, :-1], at[:, 1:]


def bits(logits: Tensor, symbols: Tensor) -> Tensor:
    """Returns the cross entropy, in bits a symbol."""
    return F.cross_entropy(logits.flatten(0, 1), symbols.flatten()) / math.log(2)


def save(path: Path, state: dict) -> None:
    """Replaces the file at once, so that a whole checkpoint is there whenever the process ends."""
    new = path.with_name(path.name + ".new")
    torch.save(state, new)
    os.replace(new, path)


def report(net: LanguageModel, train: Tensor, test: Tensor, length: int, device: str) -> None:
    """Prints the bits a symbol of text that was held out, beside those of a table of pairs, and writes some text."""
    symbols, targets = windows(test, torch.arange(64) * (len(test) // 65), length, device)
    pairs = torch.bincount(train[:-1].long() * SYMBOLS + train[1:], minlength=SYMBOLS**2).view(SYMBOLS, SYMBOLS)
    table = bits((pairs + 0.1).log()[symbols.cpu()], targets.cpu())  # how often each symbol follows each other one
    with torch.no_grad():
        print(f"held-out text: {bits(net(symbols), targets):.3f} bits a symbol; table of pairs: {table:.3f}")
    written = net.write(torch.tensor([list(b"def ")], device=device), 200)
    print("written token by token:", bytes(written[0].tolist()).decode("ascii"), sep="\n")


def main() -> None:
    """Trains from the start or from the checkpoint, on one device or a rank each, and reports."""
    args, ranks, rank = flags(), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else "cpu"
    torch.set_num_threads(1)  # a second thread costs a small net more than it gains
    if device != "cpu":
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    train, test = corpus()
    net = LanguageModel(args.features).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    parts, saved = {"net": net, "optimizer": optimizer, "schedule": schedule}, {"step": 0}
    shape = {name: getattr(args, name) for name in ("steps", "features", "length", "batch", "lr", "seed")}
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device)
        if saved["shape"] != shape:
            raise SystemExit(f"{args.checkpoint} is of a run with other flags: {saved['shape']}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        if rank == 0:
            print(f"goes on after step {saved['step']} of {args.checkpoint}", flush=True)

    if ranks > 1:  # started by torchrun
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    model = nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
    for step in range(saved["step"] + 1, args.steps + 1):
        torch.manual_seed(args.seed * 1_000_003 + step)  # so a continued run draws what one without a break does
        starts = torch.randint(len(train) - args.length, (args.batch,))[rank::ranks]  # this rank's share
        symbols, targets = windows(train, starts, args.length, device)
        loss = bits(model(symbols), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if rank == 0 and (step == args.steps or step % args.every == 0):
            print(f"step {step}: {loss:.3f} bits, {net.core.last.steps.float().mean():.1f} evaluations", flush=True)
            if args.checkpoint:
                states = {name: part.state_dict() for name, part in parts.items()}
                save(args.checkpoint, states | {"shape": shape, "step": step, "loss": loss.item()})
    if rank == 0:
        report(net, train, test, args.length, device)
    if ranks > 1:
        dist.broadcast(first := nn.utils.parameters_to_vector(net.parameters()).detach(), src=0)
        assert torch.equal(first, nn.utils.parameters_to_vector(net.parameters())), "ranks have to end alike"
        dist.destroy_process_group()


def flags() -> argparse.Namespace:
    """Parses the command line."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False)
    numbers = {"steps": 400, "features": 64, "length": 128, "batch": 8, "every": 50, "seed": 0, "lr": 6e-3}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"(default: {default})")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="cpu, or cuda where there is a GPU")
    parser.add_argument("--checkpoint", type=Path, help="a file, saved as often as a line is printed")
    args, ranks = parser.parse_args(), int(os.environ.get("WORLD_SIZE", 1))
    fits = args.features % 16 == args.batch % ranks == 0 and args.seed in range(2**31) and args.lr > 0
    if not fits or min(args.steps, args.features, args.length, args.batch, args.every) < 1:
        parser.error(f"--features takes multiples of 16, --batch of {ranks}, --seed 0 to 2147483647, --steps 1 on")
    return args


if __name__ == "__main__":
    main()
