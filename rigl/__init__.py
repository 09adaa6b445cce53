"""Train sparse networks from scratch: make a model sparse, and let its topology follow the gradient."""

import logging as _logging

from .convert import densify, layer_sparsities, sparsify, summary
from .graphs import GraphedStep
from .methods import SET, RigL, Static
from .outcomes import NonFiniteWarning, SkippedUpdateWarning

_logging.getLogger("rigl").addHandler(_logging.NullHandler())

__all__ = [
    "GraphedStep",
    "NonFiniteWarning",
    "RigL",
    "SET",
    "SkippedUpdateWarning",
    "Static",
    "densify",
    "layer_sparsities",
    "sparsify",
    "summary",
]
