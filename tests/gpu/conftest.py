"""These tests run on a GPU, or with TRITON_INTERPRET=1 on the CPU, where Triton's interpreter runs kernels.

`tests/triton/test_interpreter.py` starts the second in a process of its own; a plain run skips them.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Poisoned memory is a mode of torch in which it refuses cuBLAS without this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

collect_ignore_glob = [] if torch.cuda.is_available() or INTERPRETED else ["test_*.py"]


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode is a prototype")
    # torch 2.9 and later, once, of `torch.set_float32_matmul_precision`.
    config.addinivalue_line("filterwarnings", "ignore:Please use the new API settings to control TF32")
    # Of the first product in the thread of the backward pass.
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS")
    if INTERPRETED:
        # Triton 3.6 makes numbers of one-element arrays, as numpy will refuse to; test data hold NaN.
        config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning")
        config.addinivalue_line("filterwarnings", "ignore:.*encountered in:RuntimeWarning")
