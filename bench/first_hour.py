"""What the roofline stands on, measured: `python3 -m bench.gpu --first-hour`.

1. Bandwidth from L2 into shared memory, by TMA boxes of 256 rows, from a buffer that stays in L2.
2. Rate of the tensor cores by the N of the instruction, operands in shared memory.
3. All blocks active against cuBLAS, for every launch configuration.
4. Host cost of a launch, with a kept and with a fresh TMA descriptor.

Needs a GPU; on a CPU every kernel runs once in Triton's interpreter, at tiny sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_kernels import layout
from sparse_kernels.triton import operators
from sparse_kernels.triton.configs import Problem, candidates, warp_specialised
from sparse_kernels.triton.tensor_map import tensor_map

from .gpu_rivals import FORWARD_ERROR, Case, Operands, WrongResult, check, dense_calls, strict_float32
from .gpu_timing import Clock

BUFFER = 24 << 20  # bytes: half of the L2
ROWS = 256  # of a box


@triton.jit
def l2_kernel(buffer_map, out, boxes, loads, BOX: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    """Loads boxes of `[ROWS, BOX]` one after the other; a product with few columns consumes them."""
    pid = tl.program_id(0)
    ones = tl.full((BOX, 16), 1.0, buffer_map.dtype)
    acc = tl.zeros((ROWS, 16), tl.float32)
    for i in tl.range(0, loads, num_stages=STAGES):
        # A stride that is prime to the number of boxes: neighbours read different lines.
        at = (pid * 61 + i * 37) % boxes
        acc = tl.dot(buffer_map.load([at * ROWS, 0]), ones, acc)
    tl.store(out + pid, tl.sum(tl.sum(acc, 1), 0))


@triton.jit
def tensor_kernel(a, b, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The same product again and again, out of shared memory."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + n[:, None] * K + k[None, :])
    acc = tl.zeros((M, N), tl.float32)
    for _ in range(steps):
        acc = tl.dot(left, right.T, acc)
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(acc, 1), 0))


def l2_bandwidth(clock: Clock, device: str, smoke: bool) -> list[dict[str, Any]]:
    """TB/s by bytes of a row of the box and programs of a multiprocessor."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    processors = 2 if smoke else torch.cuda.get_device_properties(0).multi_processor_count
    loads, size = (4, ROWS * 64 * 8) if smoke else (2000, BUFFER)
    found = []
    for box in (16, 32, 64):
        buffer = torch.ones(size // (2 * box), box, device=device, dtype=dtype)
        boxes = buffer.shape[0] // ROWS
        for programs in (1, 2):
            # The ring's share of shared memory decides how many programs fit: about 200 KB, or 100 KB.
            stages = min(8, (200 // programs << 10) // (ROWS * box * 2))
            out = torch.empty(processors * programs, device=device)
            launch = functools.partial(
                l2_kernel[(processors * programs,)],
                tensor_map(buffer, *buffer.shape, (ROWS, box)), out, boxes, loads,
                BOX=box, ROWS=ROWS, STAGES=stages, num_warps=4, num_stages=stages,
            )  # fmt: skip
            us = clock.compare({"load": [launch]})["load"].median
            expected = float(ROWS * box * 16 * loads)
            if not torch.allclose(out, torch.full_like(out, expected), rtol=1e-3):
                raise WrongResult(f"boxes of {box} columns: expected sums of {expected}, got {out[0].item()}")
            moved = processors * programs * loads * ROWS * box * 2
            found.append({"bytes of a row": 2 * box, "programs": programs, "TB/s": moved / us / 1e6})
    return found


def tensor_rate(clock: Clock, device: str, smoke: bool) -> list[dict[str, Any]]:
    """TFLOP/s by the N of the instruction, two programs of a warpgroup on every multiprocessor."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    programs = 2 if smoke else 2 * torch.cuda.get_device_properties(0).multi_processor_count
    steps, m, k, found = (2 if smoke else 2000), 64, 128, []
    for n in (16, 32, 64, 128, 256):
        a, b = (torch.ones(rows, k, device=device, dtype=dtype) for rows in (m, n))
        out = torch.empty(programs, device=device)
        launch = functools.partial(tensor_kernel[(programs,)], a, b, out, steps, M=m, N=n, K=k, num_warps=4)
        us = clock.compare({"multiply": [launch]})["multiply"].median
        if not torch.allclose(out, torch.full_like(out, float(m * n * k * steps)), rtol=1e-3):
            raise WrongResult(f"N = {n}: a wrong sum, {out[0].item()}")
        found.append({"N": n, "TFLOP/s": 2 * m * n * k * steps * programs / us / 1e6})
    return found


def all_active(clock: Clock, device: str, smoke: bool) -> list[dict[str, Any]]:
    """Every launch configuration of Y with all blocks active: share of the speed of cuBLAS."""
    dtype = "float16" if device == "cpu" else "bfloat16"
    found = []
    for block in (64, 128):
        tokens, side = (64, 128) if smoke else (8192, 4096)
        o = Operands(Case(tokens, side, side, block, 1.0, dtype), device)
        t = o.topology._with_layout("gpu")
        offsets = layout.offsets(t.n_blocks, t.rows, t.cols, block)
        problem = Problem("spmm", block, block, dtype, tokens)
        with strict_float32():
            expected = o.x[0].float() @ o.dense.float().t()
        y = torch.empty_like(o.dy[0])
        # The interpreter knows no Gluon.
        configs = candidates(problem)[:2] if smoke else candidates(problem) + warp_specialised(problem)
        for config in configs:

            def call(x: torch.Tensor, y=y, o=o, t=t, offsets=offsets, config=config) -> None:  # type: ignore[no-untyped-def]
                operators.launch_spmm(x, o.values, None, t.index, offsets, y, transposed=False, config=config)

            call(o.x[0])
            check(f"{config}", y, expected, o.x[0] @ o.dense.t(), FORWARD_ERROR)
            ours: list[Callable[[], object]] = [functools.partial(call, x) for x in o.x]
            times = clock.compare({"ours": ours, "dense": dense_calls(o, "forward")})
            share = times["dense"].median / times["ours"].median
            found.append(
                {"block": block, "config": str(config), "us": times["ours"].median, "of cuBLAS": share}
            )
    return found


def launch_cost(clock: Clock, device: str, smoke: bool) -> list[dict[str, Any]]:
    """Microseconds of the host for a launch with one descriptor."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    buffer = torch.ones(ROWS, 64, device=device, dtype=dtype)
    out = torch.empty(1, device=device)

    def launch(descriptor: Any) -> None:
        l2_kernel[(1,)](descriptor, out, 1, 1, BOX=64, ROWS=ROWS, STAGES=2, num_warps=4, num_stages=2)

    once = tensor_map(buffer, *buffer.shape, (ROWS, 64))
    calls = {
        "held": lambda: launch(once),
        "kept by address": lambda: launch(tensor_map(buffer, *buffer.shape, (ROWS, 64))),
        "fresh": lambda: launch(TensorDescriptor.from_tensor(buffer, [ROWS, 64])),
    }
    for call in calls.values():
        call()
    repeats = 3 if smoke else 200
    return [{"descriptor": name, "us": clock.host(call, repeats).median} for name, call in calls.items()]


PARTS = {
    "L2 into shared memory": l2_bandwidth,
    "tensor cores": tensor_rate,
    "all blocks active": all_active,
    "host time of a launch": launch_cost,
}


def run(device: str, smoke: bool) -> dict[str, Any]:
    """All parts, printed as tables; one that fails is reported in its place."""
    from rich.console import Console
    from rich.table import Table

    clock, console, found = Clock(device, 2 if smoke else 10), Console(), {}
    clock.warm_up()
    for name, part in PARTS.items():
        try:
            with clock.on_stream():
                rows = part(clock, device, smoke)
        except Exception as error:  # what cannot be measured must not hide the rest
            rows = [{"failed": f"{type(error).__name__}: {str(error)[:300]}"}]
        found[name] = rows
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    return found
