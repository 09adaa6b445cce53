"""The kernels of topology updates compile for Hopper without a GPU: nothing spilled, no global atomics."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from aot import Facts, compile_kernel, facts  # noqa: E402

from sparse_kernels.triton import rewire, selection, slots  # noqa: E402
from sparse_kernels.triton.configs import SHARED_MEMORY  # noqa: E402

POINTERS = {
    **dict.fromkeys(("index", "new", "work", "slots", "fresh_slots", "a", "b", "c", "d"), "*i32"),
    **dict.fromkeys(("drop_scores", "scores"), "*fp32"),
    **{"ok": "*i1", "replaced": "*i64", "count": "*i64"},
}


def compiled(kernel: Any, constants: dict[str, Any], **types: str) -> tuple[Any, Facts]:
    """Integers are as a launch passes them: without a hint."""
    given = [name for name in kernel.arg_names if name not in constants]
    types = {name: types.get(name, POINTERS.get(name, "i32")) for name in given}
    numbers = tuple(name for name in given if types[name] == "i32")
    assert set(numbers) <= {p.name for p in kernel.params if p.do_not_specialize}, "compiled once per size"
    result = compile_kernel(kernel, types, constants, numbers)
    return result, facts(result)


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [(kernel, rewire.constants(name)) for name, kernel in rewire.KERNELS.items()]
    + [(slots.clear_kernel, slots.CLEAR)],
    ids=[*rewire.KERNELS, "clear"],
)
def test_kernel(kernel: Any, constants: dict[str, Any]) -> None:
    result, found = compiled(kernel, constants)
    assert found.stack == 0, found
    assert found.scratch == 0, found
    assert found.shared <= 48 * 1024, found  # several programs of a processor
    assert found.registers <= 128, found
    assert "atom.global" not in result.asm["ptx"]
    assert "red.global" not in result.asm["ptx"]


def test_entries_are_cleared_before_they_are_written() -> None:
    """Between the two, all threads of the program meet."""
    result, _ = compiled(rewire.entries_kernel, rewire.constants("entries"))
    ptx = result.asm["ptx"]
    cleared, met, written = ptx.find("st.global"), ptx.find("bar.sync"), ptx.rfind("st.global")
    assert 0 < cleared < met < written


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("k", ["i32", "*i32", "*i64"])
def test_cut(small: bool, k: str) -> None:
    constants = selection.constants(small, k != "i32")
    _, found = compiled(selection.cut_kernel, constants, k=k)
    assert found.stack == 0, found
    assert found.scratch == 0, found
    assert found.registers * 32 * constants["num_warps"] <= 65536, found
    assert found.shared <= SHARED_MEMORY, found


@pytest.mark.parametrize("side", [2, 6, 16, 128])
@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_survey(side: int, score: str, element: str) -> None:
    types = {"values": element, "gradient": element, "scores": "*fp32", "finite": "*i1"}
    _, found = compiled(slots.survey_kernel, slots.survey_constants(side * side, score), **types)
    assert found.stack == 0, found
    assert found.scratch == 0, found
    assert found.registers <= 128, found
