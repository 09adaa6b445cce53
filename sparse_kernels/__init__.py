"""Sparse layers whose memory and time scale with density: only active weights are stored and multiplied."""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from . import functional
from .backend import use_backend
from .nn import SparseConv2d, SparseLinear
from .rewiring import reorder_
from .topology import Topology

try:
    __version__ = _version("sparse-kernels")
except _NotFound:  # used from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["SparseConv2d", "SparseLinear", "Topology", "functional", "reorder_", "use_backend"]
