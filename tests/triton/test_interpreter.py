"""The GPU tests on the CPU: Triton's interpreter runs the kernels, in processes of their own.

The interpreter is chosen when kernels are defined, so it cannot be switched on here. It knows no bfloat16.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests" / "gpu").glob("test_*.py"), key=lambda path: -path.stat().st_size)


def run(path: Path) -> tuple[int, str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    return done.returncode, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[Path, Future[tuple[int, str]]]]:
    """All files, two at a time: they take a while, on one core each."""
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run, path) for path in FILES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(path: Path, runs: dict[Path, Future[tuple[int, str]]]) -> None:
    status, output = runs[path].result(timeout=280)
    assert status in (0, 5), output  # 5: all of a file's tests need a real GPU
