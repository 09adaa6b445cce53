"""Compiles kernels for sm_90 without a GPU, and reads back what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel uses.

    Attributes:
        wgmma: shapes of the tensor-core instructions, and how often each stands in the code.
        mma_sync: tensor-core instructions of the older, slower kind.
        tma_loads, cp_async, global_loads: how operands come in (the last: through registers).
        waits: arguments of wgmma's waits; above 0 products overlap with loads.
        registers, stack, shared: of a thread, of a thread, of a program.
        scratch: bytes of global scratch a program.
    """

    wgmma: dict[str, int]
    mma_sync: int
    tma_loads: int
    cp_async: int
    global_loads: int
    waits: list[int]
    registers: int
    stack: int
    shared: int
    scratch: int


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], unaligned: tuple[str, ...] = ()
) -> Any:
    """Compile for sm_90.

    Args:
        kernel: a `triton.jit` function.
        types: argument -> type, such as `"*bf16"`, `"i32"`, `"tensordesc<bf16[64,64]>"`.
        constants: compile-time arguments, and the options `num_warps` and `num_stages`.
        unaligned: integers that need not divide by 16; pointers and other integers do.
    """
    options = {k: constants[k] for k in ("num_warps", "num_stages")}
    fixed = {k: v for k, v in constants.items() if k not in options}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if (kind.startswith("*") or kind == "i32") and name not in unaligned
    }
    fixed = {**{name: None for name, kind in signature.items() if kind == "constexpr"}, **fixed}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=HOPPER, options=options)


def facts(compiled: Any) -> Facts:
    """Read the code of a compiled kernel."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", usage)
    assert found is not None, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return Facts(
        wgmma=dict(Counter(re.findall(r"wgmma\.mma_async\S*\.(m64n\d+k\d+)", ptx))),
        mma_sync=count(r"mma\.sync"),
        tma_loads=count(r"cp\.async\.bulk\.tensor.*shared::c(?:luster|ta)\.global"),
        cp_async=count(r"cp\.async\.c[ga]\."),
        global_loads=count(r"ld\.global"),
        waits=[int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)],
        registers=int(found.group(1)),
        stack=int(found.group(2)),
        shared=compiled.metadata.shared,
        scratch=compiled.metadata.global_scratch_size,
    )
