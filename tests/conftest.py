"""Fixtures shared by all tests: seeds, one thread, scripts in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


class NoHostReads(TorchDispatchMode):
    """Raises where an operation would wait for a GPU: it reads a value, or has a shape that depends on one.

    Also where it copies a number to one, as `t[0] = 1` does. `Tensor.tolist` of a CPU tensor cannot be seen.
    """

    READS = (
        "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere",
        "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._numbers: list[Tensor] = []  # what Python numbers became

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        masks = (torch.bool, torch.uint8)
        if (
            name in self.READS
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
            or (
                name in ("index", "index_put", "index_put_")
                and any(isinstance(t, Tensor) and t.dtype in masks for t in args[1])
            )
            or (name == "copy_" and any(args[1] is number for number in self._numbers))
        ):
            raise AssertionError(f"{name} waits for the device")
        found = func(*args, **kwargs)
        if name == "lift_fresh":
            self._numbers.append(found)
        return found


@pytest.fixture
def no_host_reads() -> type[TorchDispatchMode]:
    """A context in which nothing may be read on the host."""
    return NoHostReads
