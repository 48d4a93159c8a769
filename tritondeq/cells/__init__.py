"""Cells: one file each."""

from .affine import Affine as Affine
from .base import Cell as Cell
from .monotone import Monotone as Monotone
