"""Mazes: pictures of them and the one way through each, and a net for these, of any size."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritondeq.demo import parity

WALL, FLOOR, ENDS = range(3)  # channels of a maze


def maze(size: int, chance: random.Random) -> tuple[Tensor, Tensor]:
    """A perfect maze of size x size pixels, size odd, by depth-first search, and the one way between two of its cells.

    Cells are the pixels of odd row and odd column; walls stand between some of them, and all around.

    Returns:
        (picture [size, size, 3] of walls, floor and the two ends; the way with its ends, [size, size]): zeros and ones.
    """
    cells = size // 2
    start, goal = (divmod(at, cells) for at in chance.sample(range(cells * cells), 2))
    picture, way = torch.zeros(size, size, 3), torch.zeros(size, size)
    floor, trail, seen = [_pixel(start)], [start], {start}
    while trail:
        r, c = trail[-1]
        fresh = [
            (i, j)
            for i, j in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1))
            if 0 <= i < cells and 0 <= j < cells and (i, j) not in seen
        ]
        if not fresh:
            trail.pop()
            continue
        i, j = chance.choice(fresh)
        trail.append((i, j))
        seen.add((i, j))
        floor += [(r + i + 1, c + j + 1), _pixel((i, j))]
        if (i, j) == goal:
            between = [(a + b + 1, c + d + 1) for (a, c), (b, d) in zip(trail, trail[1:], strict=False)]
            _mark(way, between + [_pixel(cell) for cell in trail])
    _mark(picture[..., FLOOR], floor)
    _mark(picture[..., ENDS], [_pixel(start), _pixel(goal)])
    picture[..., WALL] = 1 - picture[..., FLOOR]
    return picture, way


def _pixel(cell: tuple[int, int]) -> tuple[int, int]:
    return 2 * cell[0] + 1, 2 * cell[1] + 1


def _mark(plane: Tensor, pixels: list[tuple[int, int]]) -> None:
    rows, columns = zip(*pixels, strict=True)
    plane[list(rows), list(columns)] = 1


def mazes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [count, size, size, 3] and ways [count, size, size]."""
    chance = random.Random(seed)
    pictures, ways = zip(*(maze(size, chance) for _ in range(count)), strict=True)
    return torch.stack(pictures), torch.stack(ways)


class Block(nn.Module):
    """f(z, u) = LayerNorm(0.8 z + conv(relu(conv(z) + u))), kernels of 3 x 3; z and u are [B, H, W, C].

    That of the demonstration's parity in two dimensions. The norm is over channels, so that size does not matter.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.LayerNorm(channels)
        with torch.no_grad():
            self.last.weight *= 0.3

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """Evaluates the block on z, [B, H, W, C], given u of the same shape."""
        inner = F.relu(self.first(z.movedim(3, 1)).movedim(1, 3) + u)
        return self.norm(parity.DECAY * z + self.last(inner.movedim(3, 1)).movedim(1, 3))


class Maze(nn.Module):
    """Pictures [B, H, W, 3] -> logits [B, H, W], as `parity.Net` is for strings."""

    def __init__(self, blocks: int, channels: int):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.head = nn.Linear(channels, 1)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(blocks))

    def start(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(z0, u)."""
        u = self.stem(pictures.movedim(3, 1)).movedim(1, 3)
        return torch.zeros_like(u), u

    def read(self, z: Tensor) -> Tensor:
        """Returns the logits [B, H, W] of a state."""
        return self.head(z).squeeze(-1)
