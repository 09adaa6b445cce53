"""Builds the extension modules; everything else is in pyproject.toml.

`sparse_kernels._C` (schemas and CPU kernels) is always built. `sparse_kernels._C_cuda` is built when
nvcc is found, or always with SPARSE_KERNELS_CUDA=1 (an error without nvcc), or never with =0. Both use
the LibTorch stable ABI, so one wheel serves every torch from 2.11 on. No network, no GPU query.
"""

import os
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(pattern))


def cuda_home() -> Path | None:
    """Where nvcc lives, if the switch allows CUDA. `which nvcc` may be a wrapper script: not asked."""
    switch = os.environ.get("SPARSE_KERNELS_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"SPARSE_KERNELS_CUDA must be auto, 0 or 1, got {switch!r}")
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    found = (home / "bin" / "nvcc").is_file()
    if switch == "1" and not found:
        raise SystemExit(f"SPARSE_KERNELS_CUDA=1, but there is no nvcc in {home}/bin: set CUDA_HOME")
    return home if found and switch != "0" else None


def extensions() -> list[cpp_extension.CppExtension]:
    cxx = ["-O3", "-fvisibility=hidden", "-Wall", TARGET]
    found = [
        cpp_extension.CppExtension(
            "sparse_kernels._C",
            ["csrc/registration.cpp", *sources("cpu/*.cpp")],
            extra_compile_args={"cxx": cxx},
            depends=[*sources("common/*.h"), *sources("cpu/*.h"), *sources("cpu/*.inl")],
            py_limited_api=True,
        )
    ]
    home = cuda_home()
    cuda_sources = sources("cuda/*.cu") + sources("cuda/*.cpp")
    if home is not None and cuda_sources:
        # A CPU build of torch leaves CUDA_HOME unset whatever the environment says.
        cpp_extension.CUDA_HOME = str(home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
        found.append(
            cpp_extension.CppExtension(
                "sparse_kernels._C_cuda",
                cuda_sources,
                include_dirs=[str(home / "include")],
                library_dirs=[str(home / "lib64")],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": ["-O3", TARGET, "-DUSE_CUDA"]},
                py_limited_api=True,
            )
        )
    print(f"sparse-kernels: building {', '.join(e.name for e in found)}", flush=True)
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
