"""Cells: one file each."""

from .affine import Affine as Affine
from .base import Cell as Cell
from .conv import Conv as Conv
from .multiscale import MultiScale as MultiScale
