"""Drop-in sparse layers."""

from ._layer import SparseLayer
from .conv import SparseConv2d
from .linear import SparseLinear

__all__ = ["SparseConv2d", "SparseLayer", "SparseLinear"]
