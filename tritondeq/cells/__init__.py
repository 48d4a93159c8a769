"""Cells: one file each."""

from .affine import Affine as Affine
from .base import Cell as Cell
from .conv import Conv as Conv
from .gated import Gated as Gated
from .mlp import MLP as MLP
from .monotone import Monotone as Monotone
from .multiscale import MultiScale as MultiScale
from .transformer import Transformer as Transformer
