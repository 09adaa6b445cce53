"""Every kernel with every launch configuration compiles for Hopper, and to what it promises, without a GPU.

Promised: tensor cores by wgmma wherever operands are 16 bits wide or tf32, products that overlap with loads,
no spilled registers, and shared memory within limits.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from aot import HOPPER, Facts, compile_kernel, facts  # noqa: E402

from sparse_kernels.triton import bsr_sddmm, bsr_spmm, densify, gluon_spmm, growth  # noqa: E402
from sparse_kernels.triton.configs import (  # noqa: E402
    SHARED_MEMORY,
    Config,
    Problem,
    candidates,
    shared_memory,
    warp_specialised,
)
from sparse_kernels.triton.launch import KNOWN  # noqa: E402

SHORT = {"bfloat16": "bf16", "float16": "fp16", "tf32": "fp32", "float32": "fp32"}
SQUARE = tuple((b, b) for b in (16, 32, 64, 128))
OBLONG = ((128, 32), (32, 128), (16, 64), (64, 16))
LISTS = ("ptr_at", "idx_at", "slot_at", "order_at", "rows", "token_tiles")
CHUNKS = (
    "chunk_row_at",
    "chunk_begin_at",
    "ptr_at",
    "idx_at",
    "slot_at",
    "rows",
    "blocks",
    "tokens",
    "tokens_per_split",
)


def tensor_map(arithmetic: str, *box: int) -> str:
    return f"tensordesc<{SHORT[arithmetic]}[{box[0]},{box[1]}]>"


def precision(problem: Problem) -> str:
    return "ieee" if problem.arithmetic == "float32" else "tf32"


def problems(op: str, transposed: tuple[bool, ...] = (False,)) -> list[Any]:
    """All blocks in bfloat16 and square ones in tf32: every candidate. Others: what the rule chooses."""
    found = []
    for arithmetic, blocks in (
        ("bfloat16", SQUARE + OBLONG),
        *((a, SQUARE) for a in SHORT if a != "bfloat16"),
    ):
        for out, inner in blocks:
            for flag in transposed:
                problem = Problem(op, out, inner, arithmetic, 8192, flag)
                configs = candidates(problem)[: None if arithmetic in ("bfloat16", "tf32") else 1]
                found += [pytest.param(problem, configs, id=problem.key.removesuffix("/<=16384"))]
    return found


def check(
    found: Facts,
    what: object,
    *,
    tensor_cores: bool = True,
    overlapping: bool = True,
    at_most: int = SHARED_MEMORY,
) -> None:
    """`overlapping`: products overlap with loads. They cannot where a float32 operand is transposed."""
    assert found.stack == 0, f"{what} spills: {found}"
    assert found.shared <= at_most, f"{what}: {found}"
    assert found.scratch == 0, f"{what}: {found}"
    assert found.mma_sync == 0, f"{what}: {found}"
    assert bool(found.wgmma) == tensor_cores, f"{what}: {found}"
    if overlapping:
        assert max(found.waits) > 0, f"{what} waits for every product: {found}"


def compile_spmm(p: Problem, config: Config, bias: bool = True) -> Facts:
    element = "*" + SHORT[p.arithmetic]
    types = {"index": "*i32", **dict.fromkeys(LISTS, "i32")} | ({"bias": element} if bias else {})
    if p.out >= 64:
        stored = (config.step, p.out) if p.transposed else (p.out, config.step)
        types |= {
            "x_map": tensor_map(p.arithmetic, config.tokens, config.step),
            "values_map": tensor_map(p.arithmetic, *stored),
            "y_map": tensor_map(p.arithmetic, config.tokens, p.out),
        }
        kernel = bsr_spmm.bsr_spmm_wide_kernel
    else:
        strides = {"tokens": "i32", "x_stride": "i32", "y_stride": "i32"}
        types |= {"x": element, "values": element, "y": element, **strides}
        kernel = bsr_spmm.bsr_spmm_narrow_kernel
    constants = bsr_spmm.constants(p.out, p.inner, p.transposed, bias, config, precision(p))
    unaligned = (*LISTS, "tokens")
    return facts(compile_kernel(kernel, types, constants, unaligned))


@pytest.mark.parametrize(("problem", "configs"), problems("spmm", (False, True)))
def test_spmm(problem: Problem, configs: list[Config]) -> None:
    assert configs
    for config in configs:
        found = compile_spmm(problem, config)
        strict, tf32 = problem.arithmetic == "float32", problem.arithmetic == "tf32"
        stays = tf32 and problem.transposed and problem.out >= 64
        check(
            found, (problem, config), tensor_cores=not strict, overlapping=not strict and not stays,
            at_most=shared_memory(problem, config),
        )  # fmt: skip
        width = config.tokens if problem.out >= 64 else problem.out
        assert set(found.wgmma) == (set() if strict else {f"m64n{width}k{8 if tf32 else 16}"})
        if problem.out >= 64:
            assert found.tma_loads >= 2
        else:
            assert found.cp_async > 0


@pytest.mark.parametrize("block", [16, 64, 128])
def test_spmm_without_bias(block: int) -> None:
    for transposed in (False, True):
        problem = Problem("spmm", block, block, "bfloat16", 8192, transposed)
        check(compile_spmm(problem, candidates(problem)[0], bias=False), problem)


@pytest.mark.skipif(not KNOWN, reason="Gluon has no stable interface: with this Triton it is not used")
@pytest.mark.parametrize("block", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("transposed", [False, True])
def test_warp_specialised_spmm(block: tuple[int, int], transposed: bool) -> None:
    out, inner = reversed(block) if transposed else block
    for i, config in enumerate(warp_specialised(Problem("spmm", out, inner, "bfloat16", 8192, transposed))):
        for dtype in (torch.bfloat16, torch.float16)[: 2 if i == 0 else 1]:
            compiled = gluon_spmm.compile_for(HOPPER, dtype, *block, transposed, True, config)
            found = facts(compiled)
            check(found, (block, transposed, config))
            assert set(found.wgmma) == {f"m64n{config.tokens}k16"}
            assert found.tma_loads >= 2
            assert "setmaxnreg" in compiled.asm["ptx"]


def compile_sddmm(p: Problem, config: Config) -> Facts:
    element = "*" + SHORT[p.arithmetic]
    types = {
        "dy_map": tensor_map(p.arithmetic, config.tokens, p.out),
        "x": element,
        "out": "*fp32",
        "index": "*i32",
        **dict.fromkeys((*CHUNKS, "x_stride"), "i32"),
    }
    constants = bsr_sddmm.constants(p.out, p.inner, config, precision(p))
    return facts(compile_kernel(bsr_sddmm.bsr_sddmm_kernel, types, constants, CHUNKS))


@pytest.mark.parametrize(("problem", "configs"), problems("sddmm"))
def test_sddmm(problem: Problem, configs: list[Config]) -> None:
    for config in configs:
        found = compile_sddmm(problem, config)
        half, strict = problem.arithmetic in ("bfloat16", "float16"), problem.arithmetic == "float32"
        limit = shared_memory(problem, config)
        check(found, (problem, config), tensor_cores=not strict, overlapping=half, at_most=limit)
        assert found.tma_loads > 0
        assert found.cp_async > 0


def growth_types(arithmetic: str, config: Config, width: int) -> dict[str, str]:
    return {
        "dy_map": tensor_map(arithmetic, config.tokens, growth.TILE_OUT),
        "x_map": tensor_map(arithmetic, config.tokens, width),
        "tokens": "i32",
    }


@pytest.mark.parametrize(("problem", "configs"), problems("growth_norms"))
def test_block_norms(problem: Problem, configs: list[Config]) -> None:
    sizes = {"scores": "*fp32", "rows": "i32", "cols": "i32"}
    for config in configs:
        for squares in (False, True):
            types = growth_types(problem.arithmetic, config, growth.WIDE_IN) | sizes
            constants = growth.constants(config, precision(problem))
            constants |= {"TILE_IN": growth.WIDE_IN, "B_OUT": problem.out, "B_IN": problem.inner}
            constants["SQUARES"] = squares
            found = facts(
                compile_kernel(growth.block_norms_kernel, types, constants, ("tokens", "rows", "cols"))
            )
            half, strict = problem.arithmetic in ("bfloat16", "float16"), problem.arithmetic == "float32"
            limit = shared_memory(problem, config)
            check(found, (problem, config), tensor_cores=not strict, overlapping=half, at_most=limit)
            assert found.tma_loads >= 2


@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32", "float32"])
def test_candidates(arithmetic: str) -> None:
    problem = Problem("growth_candidates", 1, 1, arithmetic, 8192)
    strict, half = arithmetic == "float32", arithmetic == "bfloat16"
    sizes = dict.fromkeys(("outputs", "inputs"), "i32")
    lists = {"positions": "*i32", "scores": "*fp32", "capacity": "i32"}
    for config in candidates(problem):
        constants = {**growth.constants(config, precision(problem)), "TILE_IN": growth.TILE_IN}
        types = growth_types(arithmetic, config, growth.TILE_IN) | sizes | {"state": "*i32"}
        found = [
            facts(
                compile_kernel(
                    growth.collect_kernel, types | lists, constants, ("tokens", "capacity", *sizes)
                )
            )
        ]
        for by_place in (False, True):
            digit = {"BINS": growth.BINS, "SHIFT": 7, "WIDTH": 8, "BY_PLACE": by_place}
            kinds = types | {"histogram": "*i32"}
            kernel = compile_kernel(growth.histogram_kernel, kinds, constants | digit, ("tokens", *sizes))
            found += [facts(kernel)]
        for each in found:
            limit = shared_memory(problem, config)
            check(each, config, tensor_cores=not strict, overlapping=half, at_most=limit)
            assert each.tma_loads >= 2


@pytest.mark.parametrize("block", [1, 16, 64, 128])
@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("sample", [False, True])
def test_dense_place(block: int, taps: int, sample: bool) -> None:
    types = {"values": "*bf16", "dense": "*bf16", "row_ptr": "*i32", "col_idx": "*i32"}
    types |= {"first_row": "i32", "columns": "i32"} | ({"slot": "*i32"} if block > 1 else {})
    unaligned = ("row_ptr", "col_idx", "slot", "first_row", "columns")
    constants = densify.constants(block, block, taps, sample)
    found = facts(compile_kernel(densify.dense_place_kernel, types, constants, unaligned))
    check(found, (block, taps, sample), tensor_cores=False, overlapping=False)


def test_every_rule_has_a_configuration() -> None:
    """Whatever block, dtype and direction: something fits into shared memory."""
    for op, directions in (("spmm", (False, True)), ("sddmm", (False,)), ("growth_norms", (False,))):
        for arithmetic in SHORT:
            for out in (16, 32, 64, 128):
                for inner in (16, 32, 64, 128):
                    for transposed in directions:
                        assert candidates(Problem(op, out, inner, arithmetic, 100, transposed))
