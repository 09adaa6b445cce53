"""With which tiles the kernels run: measured winners by device, else a rule from shared memory and registers.

Nothing here tunes at run time: a choice depends on device name, operation, blocks, dtype and a bucket of
tokens, so it is the same in every process and for every topology of a layer. `python -m bench.tune` measures
the candidates and rewrites `launch_table.json`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..layout import chunk_entries

SHARED_MEMORY = 232_448  # bytes that one thread block may use on sm_90
#: Arithmetic -> bytes of an operand. "tf32" is float32 whose products are rounded, "float32" has exact ones.
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}
GROWTH_TILE = (128, 256)  # of the dense weight gradient, for growth scores
TOKEN_BUCKETS = (1024, 4096, 16384)  # batches up to each of these share a choice
TABLE = Path(__file__).with_name("launch_table.json")


@dataclass(frozen=True)
class Config:
    """Tile of one launch.

    Attributes:
        tokens: rows of X (and of Y or dY) in a tile; the contraction step of a weight gradient.
        step: contraction step of a product; 0 where the kernel has none.
        warps: warps of a program.
        stages: depth of the software pipeline.
        window: rows of blocks whose programs run side by side before the next token tile; 0 means all.
        kernel: "triton", or "gluon" for the warp-specialised spmm.
    """

    tokens: int
    step: int
    warps: int
    stages: int
    window: int = 0
    kernel: str = "triton"


@dataclass(frozen=True)
class Problem:
    """What a launch depends on.

    Attributes:
        op: "spmm" (Y, or dX with `transposed`), "sddmm" (dW), "growth_norms" or "growth_candidates".
        out: side of a block along the output of the operation (along out_features for sddmm and growth).
        inner: its other side.
        arithmetic: a key of `ITEM_SIZES`.
        tokens: tokens in the batch.
        transposed: whether blocks are stored `[inner, out]`, as the input gradient finds them.
    """

    op: str
    out: int
    inner: int
    arithmetic: str
    tokens: int
    transposed: bool = False

    @property
    def bucket(self) -> str:
        """Batches that share a choice."""
        return next((f"<={n}" for n in TOKEN_BUCKETS if self.tokens <= n), f">{TOKEN_BUCKETS[-1]}")

    @property
    def key(self) -> str:
        """Name in the launch table."""
        direction = "t" if self.transposed else ""
        return f"{self.op}{direction}/{self.out}x{self.inner}/{self.arithmetic}/{self.bucket}"


def choose(problem: Problem, device: str) -> Config:
    """The measured winner on this device, or what the rule says."""
    entry = _table().get(device, {}).get(problem.key)
    return Config(**entry["config"]) if entry else rule(problem)


def is_tuned(device: str) -> bool:
    """Whether the table holds winners measured on this device."""
    return device in _table()


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_table(device: str, entries: dict[str, tuple[Config, float]]) -> None:
    """Put measured winners (`Problem.key` -> config and microseconds) of a device into the table.

    Products that this process has made already keep their configuration.
    """
    table = dict(_table())
    fresh = {key: {"config": asdict(c), "us": round(us, 2)} for key, (c, us) in sorted(entries.items())}
    table[device] = {**table.get(device, {}), **fresh}
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(TABLE)
    _table.cache_clear()


def rule(problem: Problem) -> Config:
    """The first candidate."""
    return candidates(problem)[0]


def candidates(problem: Problem) -> list[Config]:
    """Configurations worth measuring, the likeliest first: all fit in shared memory and registers."""
    found = {"spmm": _spmm, "sddmm": _sddmm, "growth_norms": _growth, "growth_candidates": _growth}[
        problem.op
    ](problem)
    return [c for c in found if shared_memory(problem, c) <= SHARED_MEMORY]


def warp_specialised(problem: Problem) -> list[Config]:
    """Configurations of the Gluon spmm for sides of 64 and 128 and 16-bit operands; none for other problems.

    Each compiles for sm_90 in both directions without spills. They run where the launch table says so: where
    they were measured to be faster.
    """
    p = problem
    if p.op != "spmm" or p.arithmetic not in ("bfloat16", "float16") or min(p.out, p.inner) < 64:
        return []
    # The small ones let two or three programs run on a multiprocessor.
    tiles = {
        64: [(256, 4, 5), (256, 4, 4), (128, 4, 4), (128, 4, 3), (64, 4, 4)],
        128: [(256, 8, 4), (256, 8, 3), (128, 4, 3), (128, 8, 6), (128, 8, 4), (64, 4, 4)],
    }
    return [Config(tokens, 64, warps, stages, 0, "gluon") for tokens, warps, stages in tiles[p.out]]


def is_wide(problem: Problem) -> bool:
    """Whether blocks go on the M side of the tensor cores, which has 64 rows at least."""
    return problem.out >= 64


def shared_memory(problem: Problem, config: Config) -> int:
    """Bytes of the ring of operands or of the tile of results, whichever is more, and barriers: an estimate.

    A test compares it with what the compiler allots.
    """
    size, p, c = ITEM_SIZES[problem.arithmetic], problem, config
    if p.op == "spmm":
        ring, tile = c.step * (c.tokens + p.out), c.tokens * p.out
    elif p.op == "sddmm":
        columns = chunk_entries(p.inner) * p.inner
        ring, tile = c.tokens * (p.out + columns), p.out * columns * 4 // size
    else:
        ring, tile = c.tokens * sum(GROWTH_TILE), 0
    return size * max(c.stages * ring, tile) + 1024


def _spmm(p: Problem) -> list[Config]:
    if not is_wide(p):
        # Several blocks a step, so that the contraction is as deep as the tensor cores like it.
        shallow, deep = (32, 64) if ITEM_SIZES[p.arithmetic] == 4 else (64, 128)
        depth, twice = max(p.inner, shallow), max(p.inner, deep)
        found = [Config(256, depth, 8, 3), Config(256, depth, 8, 4), Config(128, twice, 4, 3)]
        found += [Config(128, depth, 4, 4), Config(128, depth, 4, 2), Config(64, depth, 4, 3)]
        if p.arithmetic == "float32":  # no tensor cores: tiles that fit into registers
            found = [Config(64, depth, 8, 2), Config(64, depth, 4, 2), Config(32, depth, 8, 2)]
    elif p.arithmetic == "float32":
        found = [Config(64 if p.out == 64 else 32, 16, 8, 3), Config(32, 16, 8, 2)]
    elif p.arithmetic == "tf32":
        step, warps = min(p.inner, 32), 8 if p.out == 128 else 4
        found = [Config(128, step, warps, 4), Config(128, step, warps, 3), Config(64, step, warps, 4)]
    elif p.out == 128:
        # 256 tokens: fewest bytes from L2. 128: two programs on a multiprocessor, one's end behind the other.
        step = min(p.inner, 64)
        found = [Config(256, step, 8, 4), Config(256, step, 8, 3), Config(128, step, 8, 3)]
        found += [Config(128, step, 4, 3), Config(128, step, 4, 4), Config(256, step, 8, 4, 8)]
    else:
        step = min(p.inner, 64)
        found = [Config(128, step, 4, 4), Config(256, step, 4, 4), Config(256, step, 4, 2)]
        found += [Config(256, step, 4, 3), Config(128, step, 4, 3), Config(128, step, 4, 4, 8)]
    return list(dict.fromkeys(found))


def _sddmm(p: Problem) -> list[Config]:
    if p.arithmetic == "float32":
        return [Config(16, 0, 8, 3), Config(16, 0, 8, 2)]
    if p.arithmetic == "tf32":
        return [Config(32, 0, 8, 3), Config(32, 0, 8, 2), Config(16, 0, 8, 3)]
    return [Config(64, 0, 8, 3), Config(64, 0, 8, 4), Config(32, 0, 8, 4), Config(128, 0, 8, 2)]


def _growth(p: Problem) -> list[Config]:
    if p.arithmetic == "float32":
        return [Config(16, 0, 8, 3), Config(16, 0, 8, 2)]
    if p.arithmetic == "tf32":
        return [Config(32, 0, 8, 3), Config(32, 0, 8, 2)]
    return [Config(64, 0, 8, 3), Config(64, 0, 8, 4), Config(32, 0, 8, 4)]
