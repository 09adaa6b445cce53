"""`python -m sparse_kernels.info`: versions, what is built, what is not and why. Paste it in bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import sparse_kernels

from . import _load, _ops
from .backend import has_triton
from .triton.configs import is_tuned

_VARIABLES = {
    "SPARSE_KERNELS_ISA": "instruction set of the CPU kernels (run time)",
    "TRITON_INTERPRET": "1: Triton kernels run on CPU tensors, slowly (run time)",
    "SPARSE_KERNELS_CUDA": "whether to build the CUDA module: auto, 0 or 1 (build time)",
}


def _compiler(module: Path) -> str:
    """What compiled an extension module, from the mark that compilers leave in it."""
    mark = re.search(rb"(GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+)", module.read_bytes())
    return mark.group().decode() if mark else "unknown"


def _module_state(name: str) -> str:
    if name in _load.missing:
        return f"not loaded: {_load.missing[name]}"
    found = sorted(Path(__file__).parent.glob(f"{name}.*"))
    return f"loaded, built with {_compiler(found[0])}" if found else "loaded"


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def cpu_kernels() -> str:
    """The instruction set that the CPU kernels use here, or why there are none."""
    try:
        return str(_ops.cpu_isa())
    except NotImplementedError:
        return "none in this build of _C: products run as plain torch"


def gpu_kernels() -> str:
    """Which Triton would compile the GPU kernels, or why they cannot run."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "cannot run: Triton is not installed (a CUDA build of torch brings it)"
    if has_triton("cpu"):
        return f"Triton {version}, interpreted on the CPU (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return f"Triton {version} is there, a GPU is not"
    tuned = (
        "tuned here" if is_tuned(torch.cuda.get_device_name()) else "launches by rule, not tuned for this GPU"
    )
    return f"Triton {version}; {tuned}"


def gpu_state() -> str:
    """What torch sees of a GPU."""
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    return f"none: torch is built for CUDA {torch.version.cuda} but sees no device"


def collect() -> dict[str, str]:
    """What the command prints, in order."""
    found = {
        "sparse-kernels": sparse_kernels.__version__,
        "torch": str(torch.__version__),
        "Python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "CPU": f"{cpu_name()}, torch uses {torch.get_num_threads()} threads",
        "CPU kernels": cpu_kernels(),
        "_C": _module_state("_C"),
        "_C_cuda": _module_state("_C_cuda") + "; it holds no kernels yet",
        "GPU": gpu_state(),
        "GPU kernels": gpu_kernels(),
    }
    for name, meaning in _VARIABLES.items():
        found[name] = f"{os.environ.get(name, 'not set')}    ({meaning})"
    return found


def main() -> None:
    """Print it."""
    found = collect()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
