"""Loads the extension modules and remembers why one could not be."""

from __future__ import annotations

import importlib

import torch

#: Module name -> why it is not loaded. Shown by `python -m sparse_kernels.info`.
missing: dict[str, str] = {}


def _load(name: str) -> None:
    try:
        importlib.import_module(f"sparse_kernels.{name}")
    except ImportError as error:
        missing[name] = str(error)


_load("_C")
if "_C" in missing:
    raise ImportError(
        f"the compiled part of sparse_kernels cannot be loaded ({missing['_C']}). "
        "Build it in place with `pip install --no-build-isolation -e .`"
    )
try:
    torch.ops.sparse_kernels.cpu_isa()
except RuntimeError as error:  # SPARSE_KERNELS_ISA asks for what is not there
    # The text before is the check's place in the source.
    raise ImportError(str(error).splitlines()[0].split(", ", 2)[-1]) from None
if torch.version.cuda is None:
    missing["_C_cuda"] = "this torch is built without CUDA"
else:
    _load("_C_cuda")
