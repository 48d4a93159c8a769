"""Scikit-learn's 1,797 digits, read by an equilibrium of one block and by a stack of six such blocks.

Run:  python examples/classify_digits.py
Takes 30 s of processor time on one core, by `time`, with torch 2.14.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import tritondeq as tdeq

CHANNELS, DEPTH, BATCH = 32, 6, 64


class Stack(nn.Module):
    """The explicit rival: the same block, as often as there are layers, each with other weights."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(tdeq.cells.Conv(CHANNELS) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for block in self.blocks:
            z = block(z, block.inject(x))
        return z


def equilibrium() -> tdeq.DEQ:
    """Returns one such block, as deep as each image needs."""
    return tdeq.DEQ(tdeq.cells.Conv(CHANNELS), solver=tdeq.Anderson())


class Net(nn.Module):
    """Images [B, 1, 8, 8] -> logits [B, 10]; `body` maps features [B, C, 4, 4] to features."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1), nn.GroupNorm(8, CHANNELS))
        self.body = body
        self.head = nn.Linear(16 * CHANNELS, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).flatten(1))


def data(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training and test images [N, 1, 8, 8] in 0 ... 1, then their labels [N]."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=seed)
    x, test_x = (torch.tensor(part, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16 for part in parts[:2])
    y, test_y = (torch.tensor(part, device=device) for part in parts[2:])
    return x, test_x, y, test_y


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> float:
    """Trains the net on batches that depend on the seed alone, and returns the seconds of the processor."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    began = time.process_time()
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=generator).to(x.device)
        loss = F.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.process_time() - began


def main() -> None:
    """Trains both nets, and prints what each has learnt and how many steps the equilibrium takes."""
    args = flags()
    torch.set_num_threads(1)  # a second thread costs such small nets more than it gains
    x, test_x, y, test_y = data(args.seed, args.device)
    print(f"{'':24}parameters  test accuracy  seconds of training")
    nets = []
    for name, body in (("equilibrium of one block", equilibrium), (f"stack of {DEPTH} blocks", Stack)):
        torch.manual_seed(args.seed)
        net = Net(body()).to(args.device)
        nets.append(net)
        seconds = train(net, x, y, args.steps, args.seed)
        with torch.no_grad():
            accuracy = (net(test_x).argmax(1) == test_y).float().mean().item()
        count = sum(p.numel() for p in net.parameters())
        print(f"{name:24}{count:10,}{100 * accuracy:13.1f} %{seconds:21.1f}", flush=True)
    last = nets[0].body.last  # what the solve of the test images reports, one entry an image
    steps = last.steps.float()
    print(f"evaluations for a test image: {steps.min():.0f} to {steps.max():.0f}, on average {steps.mean():.1f}")
    print(f"{last.converged.sum()} of {len(steps)} solves converge")


def flags() -> argparse.Namespace:
    """Parses the command line."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="cpu, or cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 2 or not 0 <= args.seed < 2**31:
        parser.error("--steps takes integers from 2 on, --seed those from 0 to 2147483647")
    return args


if __name__ == "__main__":
    main()
