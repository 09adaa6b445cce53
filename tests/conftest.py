"""Fixtures shared by all tests: seeds, one thread, scripts in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Unless a test asks for more: thousands of tiny operations would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., str]:
    """Runs the pieces of a script in a process of its own, on two threads; returns what it printed."""

    def run(*pieces: str, timeout: float) -> str:
        script = tmp_path / "script.py"
        script.write_text("".join(map(textwrap.dedent, pieces)))
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        command = [sys.executable, str(script)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, env=environment
            )
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs: no end after {timeout} s")
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
