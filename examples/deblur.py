"""Blurred, noisy pictures are restored: by the fixed point of a learned proximal step, and by 8 unrolled steps of it.

Run:  python examples/deblur.py
Takes 29 s of processor time on one core, by `time`, with torch 2.14.
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn

import tritondeq as tdeq

SIZE, CHANNELS, NOISE, BATCH, DEPTH = 32, 16, 0.02, 8, 8


def pictures(count: int, device: str) -> Tensor:
    """Returns pictures [B, 1, SIZE, SIZE] of five discs and boxes each, in shades of grey from 0 to 1."""
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    picture = torch.zeros(count, SIZE, SIZE)
    for _ in range(5):
        across, down, width, height, shade, kind = torch.rand(6, count, 1, 1)
        x, y = (column - SIZE * across) / (3 + 9 * width), (row - SIZE * down) / (3 + 9 * height)
        inside = torch.where(kind < 0.5, x**2 + y**2 < 1, (x.abs() < 1) & (y.abs() < 1))
        picture = torch.where(inside, shade, picture)
    return picture.unsqueeze(1).to(device)


class Blur(nn.Module):
    """A, convolution with a Gaussian that is 1.5 pixels wide; it is its own transpose."""

    def __init__(self):
        super().__init__()
        rows, columns = torch.fft.fftfreq(SIZE), torch.fft.rfftfreq(SIZE)
        distance = rows[:, None] ** 2 + columns**2
        self.register_buffer("response", torch.exp(-2 * (math.pi * 1.5) ** 2 * distance))

    def forward(self, picture: Tensor) -> Tensor:
        return self.filtered(picture, self.response)

    def wiener(self, blurred: Tensor, level: float) -> Tensor:
        """Returns the best linear estimate where noise has `level` times the power of the picture."""
        return self.filtered(blurred, self.response / (self.response**2 + level))

    def filtered(self, picture: Tensor, response: Tensor) -> Tensor:
        """Returns the picture with each of its frequencies scaled."""
        return torch.fft.irfft2(torch.fft.rfft2(picture) * response, s=(SIZE, SIZE))


class ProximalStep(nn.Module):
    """f(z, y) = D(z - eta A'(A z - y)) for a blurred picture y: a step to what was seen, then a learned denoiser D.

    Its fixed point is that of Gilton et al. 2021, "Deep equilibrium architectures for inverse problems in imaging".
    """

    def __init__(self):
        super().__init__()
        self.blur, self.rate = Blur(), nn.Parameter(torch.tensor(1.0))
        first, middle, last = (
            nn.Conv2d(*size, 3, padding=1) for size in ((1, CHANNELS), (CHANNELS,) * 2, (CHANNELS, 1))
        )
        self.denoiser = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
        with torch.no_grad():  # begins near the identity
            last.weight *= 0.1
            last.bias.zero_()

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        z = z - self.rate * self.blur(self.blur(z) - y)
        return z + self.denoiser(z)


def decibels(estimate: Tensor, picture: Tensor) -> float:
    """Returns the mean peak signal-to-noise ratio; higher is better, and 3 dB are half of the squared error."""
    return (-10 * torch.log10((estimate - picture).square().flatten(1).mean(1))).mean().item()


def train(layer: tdeq.DEQ, steps: int, warm_up: int, device: str) -> float:
    """Trains the layer, unrolled for the first `warm_up` steps, and returns the seconds of the processor."""
    optimizer = torch.optim.Adam(layer.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    began = time.process_time()
    for step in range(steps):
        layer.unrolled(DEPTH if step < warm_up else None)
        clean = pictures(BATCH, device)
        y = seen(layer, clean)
        loss = (layer(y, z0=y) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    return time.process_time() - began


def seen(layer: tdeq.DEQ, clean: Tensor) -> Tensor:
    """Returns a picture as the camera has it: blurred, with noise."""
    return layer.cell.blur(clean) + NOISE * torch.randn_like(clean)


@torch.no_grad()
def main() -> None:
    """Trains both, and prints how near to the clean picture each comes after how many steps."""
    args = flags()
    torch.set_num_threads(1)  # a second thread costs such small nets more than it gains
    lengths = (1, 2, 4, 8, 16, 32, 64, 128)
    rows = []
    for name in ("equilibrium", f"{DEPTH} unrolled steps"):
        torch.manual_seed(args.seed)
        adjoint = tdeq.Phantom(steps=5, damping=0.8)  # cheap, and never fails while training is young
        layer = tdeq.DEQ(ProximalStep(), solver=tdeq.Anderson(), adjoint=adjoint).to(args.device)
        clean = pictures(32, args.device)
        y = seen(layer, clean)
        with torch.enable_grad():
            seconds = train(layer, args.steps, args.steps // 4 if name == "equilibrium" else args.steps, args.device)
        if name == "equilibrium":
            solution = layer.unrolled(None).solve(y, z0=y)
        rows.append((name, seconds, [decibels(layer.unrolled(steps)(y, z0=y), clean) for steps in lengths]))

    wiener = max(decibels(layer.cell.blur.wiener(y, 10 ** (-k / 4)), clean) for k in range(4, 16))
    print(f"blurred: {decibels(y, clean):.1f} dB; best Wiener filter: {wiener:.1f} dB; ", end="")
    print(f"solved equilibrium: {decibels(solution.value, clean):.1f} dB")
    print(f"the solve: {solution.steps.float().mean():.1f} evaluations, {solution.converged.sum()} of 32 converge")
    print("\ntrained as          seconds   dB after" + "".join(f"{steps:6}" for steps in lengths) + "  plain steps")
    for name, seconds, scores in rows:
        print(f"{name:18}{seconds:9.1f}           " + "".join(f"{score:6.1f}" for score in scores))


def flags() -> argparse.Namespace:
    """Parses the command line."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=200, help="training steps of each (default: 200)")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="cpu, or cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 4 or not 0 <= args.seed < 2**31:
        parser.error("--steps takes integers from 4 on, --seed from 0 to 2147483647")
    return args


if __name__ == "__main__":
    main()
