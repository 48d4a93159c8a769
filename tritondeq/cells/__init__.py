"""Cells: one file each."""

from .affine import Affine as Affine
from .base import Cell as Cell
from .transformer import Transformer as Transformer
