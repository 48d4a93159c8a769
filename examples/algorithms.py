"""Parity of every prefix, learnt on 20 bits and tested on up to 160: an equilibrium goes on for longer, a stack can't.

Run:  python examples/algorithms.py
Takes 36 s of processor time on one core, by `time`, with torch 2.14.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritondeq as tdeq

CHANNELS, DEPTH, BATCH = 32, 10, 64


def strings(count: int, bits: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns random bits [count, bits] and the parity of their prefixes, which is the answer."""
    drawn = torch.randint(0, 2, (count, bits)).to(device)
    return drawn, drawn.cumsum(1) % 2


def neighbours(z: Tensor) -> Tensor:
    """Puts each position beside its two neighbours, [B, L, C] -> [B, L, 3 C]: a Linear of it is a convolution."""
    padded = F.pad(z, (0, 0, 1, 1))
    return torch.cat([padded[:, :-2], z, padded[:, 2:]], dim=-1)


class Block(nn.Module):
    """f(z, x) = LayerNorm(0.8 z + conv(relu(conv(z) + x))) on [B, L, C]: a step sees two positions to each side."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3 * CHANNELS, CHANNELS), nn.Linear(3 * CHANNELS, CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS)
        with torch.no_grad():
            self.last.weight *= 0.3  # contractive at first, for the norm of 0.8 z prevails

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(0.8 * z + self.last(neighbours(F.relu(self.first(neighbours(z)) + x))))


class Stack(nn.Module):
    """The explicit rival: blocks one after another, each with other weights."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for block in self.blocks:
            z = block(z, x)
        return z


class Net(nn.Module):
    """Bits [B, L] -> logits [B, L]."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, CHANNELS), body, nn.Linear(CHANNELS, 1)

    def forward(self, bits: Tensor) -> Tensor:
        x = self.stem(neighbours(2.0 * bits.unsqueeze(-1) - 1))
        return self.head(self.body(x)).squeeze(-1)


def train(net: Net, steps: int, length: int, device: str) -> float:
    """Trains the net, and returns the seconds of the processor."""
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    began = time.process_time()
    for step in range(steps):
        if isinstance(net.body, tdeq.DEQ):  # warm-up: as an unrolled loop, for the first quarter
            net.body.unrolled(length if step < steps // 4 else None)
        bits, answer = strings(BATCH, length, device)
        loss = F.binary_cross_entropy_with_logits(net(bits), answer.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.process_time() - began


@torch.no_grad()
def test(net: Net, bits: int, device: str) -> tuple[float, str]:
    """Returns the share of strings whose every bit is right, in %, and how many evaluations of a block they take."""
    drawn, answer = strings(64, bits, device)
    exact = ((net(drawn) > 0) == (answer > 0)).all(1).float().mean().item()
    last = getattr(net.body, "last", None)
    return 100 * exact, f"{last.steps.float().mean():.0f}" if last else str(DEPTH)


def main() -> None:
    """Trains both nets, and prints how they do on longer strings."""
    args = flags()
    torch.set_num_threads(1)  # a second thread costs such small nets more than it gains
    print(f"strings that are right in every bit, and evaluations of a block; trained on {args.bits} bits")
    print(f"{'':22}seconds" + "".join(f"{f'{args.bits * k} bits':>18}" for k in (1, 2, 4, 8)))
    for name in ("equilibrium", f"stack of {DEPTH} blocks"):
        torch.manual_seed(args.seed)
        # Phantom gradients are cheap and never fail; the 60 steps at most are for training on short strings.
        deq = tdeq.DEQ(Block(), adjoint=tdeq.Phantom(steps=5, damping=1.0), max_steps=60)
        net = Net(deq if name == "equilibrium" else Stack()).to(args.device)
        seconds = train(net, args.steps, args.bits, args.device)
        deq.max_steps = 1000
        scores = [test(net, args.bits * k, args.device) for k in (1, 2, 4, 8)]
        print(
            f"{name:22}{seconds:7.1f}" + "".join(f"{exact:8.0f} % in {steps:>4}" for exact, steps in scores), flush=True
        )
    print(f"A block sees two positions to each side: beyond {2 * DEPTH + 1} bits the stack can't know the answer.")


def flags() -> argparse.Namespace:
    """Parses the command line."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=300, help="training steps of each net (default: 300)")
    parser.add_argument("--bits", type=int, default=20, help="length of the strings trained on (default: 20)")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="cpu, or cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 4 or args.bits < 2 or not 0 <= args.seed < 2**31:
        parser.error("--steps takes integers from 4 on, --bits from 2 on, --seed from 0 to 2147483647")
    return args


if __name__ == "__main__":
    main()
