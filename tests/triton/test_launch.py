"""A kernel launched again gets what Triton's own path would give it. The driver here only records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

import triton  # noqa: E402
from aot import HOPPER  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402

from sparse_kernels import layout, testing  # noqa: E402
from sparse_kernels.triton import bsr_sddmm, bsr_spmm, gluon_spmm  # noqa: E402
from sparse_kernels.triton.configs import Problem, candidates, warp_specialised  # noqa: E402
from sparse_kernels.triton.launch import KNOWN  # noqa: E402

if not KNOWN:
    pytest.skip("with this Triton all launches take its own path", allow_module_level=True)
LIMITS = {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}


def forget() -> None:
    """Compiled kernels belong to the driver that loaded them."""
    for module in (bsr_spmm, bsr_sddmm, gluon_spmm):
        module._launch.cache_clear()
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What reaches the C launcher: grid, stream, function, then every argument, descriptors taken apart."""
    recorded: list[tuple[Any, ...]] = []

    class Utils:
        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 1, 2, 100, 0, 1024

        def get_device_properties(self, _: int) -> dict[str, int]:
            return LIMITS

        def fill_tma_descriptor(self, *args: Any) -> tuple[Any, ...]:
            return "map", *(tuple(a) if isinstance(a, list) else a for a in args)

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            kinds = dict(source.signature)
            maps = metadata.tensordesc_meta
            self._launch = nvidia.wrap_handle_tensordesc(lambda *a: recorded.append(a), kinds, maps)

        def __call__(self, *args: Any) -> None:
            grid_and_function, rest = args[:5], args[5:]
            self._launch(*grid_and_function, False, False, None, None, *rest)

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int = 0) -> int:
            return 0

        def get_current_target(self) -> Any:
            return HOPPER

    monkeypatch.setattr(driver, "_active", Driver())
    forget()
    yield recorded
    forget()


def comparable(launch: tuple[Any, ...]) -> list[Any]:
    """Without what profilers are given: metadata and two hooks. Tensors by their address."""
    told = (*launch[:10], *launch[13:])
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in told]


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_spmm(block: int, transposed: bool, launches: list[tuple[Any, ...]]) -> None:
    topology = testing.random_topology((4 * block, 6 * block), "uniform", 0.5, block)._with_layout("gpu")
    offsets = layout.offsets(topology.n_blocks, topology.rows, topology.cols, block)
    values = torch.zeros(topology.values_shape, dtype=torch.bfloat16)
    shape = topology.shape[::-1] if transposed else topology.shape
    bias = None if transposed else torch.zeros(shape[0], dtype=torch.bfloat16)
    problem = Problem("spmm", block, block, "bfloat16", 300, transposed)
    for config in candidates(problem)[:1] + warp_specialised(problem)[:1]:
        spmm = gluon_spmm.bsr_spmm if config.kernel == "gluon" else bsr_spmm.bsr_spmm
        x, out = (torch.zeros(300, n, dtype=torch.bfloat16) for n in (shape[1], shape[0]))
        for _ in range(3):
            spmm(x, values, bias, topology.index, offsets, out, transposed=transposed, config=config)
        first, *others = map(comparable, launches)
        assert len(others) == 2
        assert all(other == first for other in others)
        launches.clear()


def test_sddmm(launches: list[tuple[Any, ...]]) -> None:
    topology = testing.random_topology((128, 192), "uniform", 0.5, 32)._with_layout("gpu")
    offsets = layout.offsets(topology.n_blocks, topology.rows, topology.cols, 32)
    out = torch.zeros(topology.values_shape, dtype=torch.bfloat16)
    x, dy = (torch.zeros(300, n, dtype=torch.bfloat16) for n in topology.shape[::-1])
    config = candidates(Problem("sddmm", 32, 32, "bfloat16", 300))[0]
    for _ in range(2):
        bsr_sddmm.bsr_sddmm(dy, x, out, topology.index, offsets, config=config, processors=1)
    first, second = map(comparable, launches)
    assert first == second
