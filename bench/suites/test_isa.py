"""AVX2 against AVX-512, each in processes of its own: the instruction set is chosen once in a process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import Row, format_name
from bench.registry import SUITES
from sparse_kernels import _ops

ROOT = Path(__file__).parents[2]
CASES = [
    pytest.param(suite, SUITES[suite][0].name, block, id=f"{suite}-{format_name(block)}".lower())
    for suite in ("linear", "conv2d")
    for block in (1, 16)
] + [pytest.param("linear-tiny", SUITES["linear-tiny"][0].name, 1, id="tiny", marks=pytest.mark.smoke)]


def _child(isa: str, suite: str, case: str, block: int, out: Path, budget: float) -> Row:
    command = [
        sys.executable, "-m", "bench.run", "--suite", suite, "--cases", case, "--block-size", str(block),
        "--densities", "0.1", "--no-peers", "--threads", str(torch.get_num_threads()),
        "--budget", str(budget), "--out", str(out / isa),
    ]  # fmt: skip
    environment = os.environ | {"SPARSE_KERNELS_ISA": isa}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (out / isa).glob("*.json")
    (row,) = (Row(**r) for r in json.loads(path.read_text())["rows"] if r["op"] == "step")
    assert row.isa == isa
    return row


@pytest.mark.parametrize(("suite", "case", "block"), CASES)
def test_avx2(suite: str, case: str, block: int, board: Any, budget: float, tmp_path: Path) -> None:
    """The speed-ups over dense are compared, not the times: torch knows nothing of our variable."""
    if _ops.cpu_isa() != "avx512":
        pytest.skip("no AVX-512 to compare with")
    found: dict[str, list[Row]] = {"avx512": [], "avx2": []}
    for _ in range(2 if budget > 0.1 else 1):
        for isa, rows in found.items():
            rows.append(_child(isa, suite, case, block, tmp_path, budget))
    speed = {isa: math.sqrt(math.prod(row.speedup for row in rows)) for isa, rows in found.items()}
    narrow, wide = found["avx2"][-1], found["avx512"][-1]
    extra = {"avx512 ms": wide.ms, "avx2 / avx512": speed["avx2"] / speed["avx512"]}
    board.add([replace(narrow, suite="isa", kind="isa", speedup=speed["avx2"], extra=extra)])
