"""Small products of every kind under NVIDIA's compute-sanitizer (D41): `python sanitizer.py` runs all tools.

Where the sanitizer is not there, or is refused (it needs rights to debug the device), or does not get
anywhere, the verdict is "not run", never "pass".
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CASES = 60  # of products, and as many of growth scores
FOUND = 86  # exit status for errors that the sanitizer found


@dataclass(frozen=True)
class Outcome:
    """Of one tool: "pass", "FAILED" or "not run", and why."""

    verdict: str
    detail: str


def run(tool: str, seconds: float, program: str | None = None, grace: float = 60) -> Outcome:
    """Run the cases under one tool.

    Args:
        tool: of `TOOLS`.
        seconds: after which the cases stop by themselves.
        program: the sanitizer [found on PATH or beside nvcc].
        grace: seconds that starting and ending may take besides.
    """
    program = program or find()
    if program is None:
        return Outcome("not run", "there is no compute-sanitizer on PATH or in /usr/local/cuda/bin")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
    command += [sys.executable, str(Path(__file__)), "--cases", str(CASES), "--seconds", str(seconds)]
    # Each allocation by itself, so that memcheck sees where a tensor ends.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        child = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Outcome("not run", str(error))
    try:
        text, _ = child.communicate(timeout=seconds + grace)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with the program that it looks at
        child.communicate()
        return Outcome("not run", f"no end after {seconds + grace:.0f} s")
    return judge(child.returncode, text)


def find() -> str | None:
    """Where the sanitizer is."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def judge(status: int, text: str) -> Outcome:
    """What an exit status and an output mean."""
    done = re.search(r"cases: (\d+) of \d+", text)
    summary = re.search(r"SUMMARY: (\d+) (?:error|hazard)", text)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")[:200]
    if status == FOUND or (summary and int(summary[1])):
        first = next(
            (line for line in text.splitlines() if re.search(r"Invalid|Uninit|Race|hazard|Barr", line)), ""
        )
        return Outcome("FAILED", f"{first.strip()} ... {last}")
    if status == 0 and summary and done and int(done[1]):
        return Outcome("pass", f"{done[0]}, no errors")
    # A case that failed by itself is not the sanitizer's refusal.
    if "AssertionError" in text:
        return Outcome("FAILED", last)
    return Outcome("not run", last)


def run_cases(device: str, count: int, seconds: float) -> int:
    """Run and check the cases; stops after `seconds`. Returns how many were run."""
    import drill_cases as dc
    import torch

    from sparse_kernels import testing
    from sparse_kernels.triton import operators

    end, dtypes = time.monotonic() + seconds, (*dc.half_dtypes(device), torch.float32)
    for seed in range(count):
        if time.monotonic() > end:
            return seed
        case = dc.random_case(seed, dtypes[seed % len(dtypes)], device, integers=True)
        found, expected = dc.run(case), dc.dense(case, torch.float64)
        for name, actual in found.items():
            assert torch.equal(actual, expected[name].to(actual.dtype)), f"{case.name}: {name}"
        b_out, b_in = case.topology.block_size
        if case.x.shape[0] == 0:
            continue
        norms = operators.growth_norms(case.x, case.dy, b_out, b_in, "l1")
        gradient = case.dy.double().t() @ case.x.double()
        wanted = case.topology.to_blocks(gradient).abs().sum((-2, -1))
        testing.assert_normwise(norms.flatten(), wanted.flatten(), name=f"{case.name}: norms")
    return count


def main() -> int:
    """Without arguments: all tools, side by side. With --cases: what they look at."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, help="run this many cases, without the sanitizer")
    parser.add_argument("--seconds", type=float, default=60)
    a = parser.parse_args()
    if a.cases:
        sys.path.insert(0, str(Path(__file__).parents[2]))  # the package may not be installed
        done = run_cases("cuda", a.cases, a.seconds)
        print(f"cases: {done} of {a.cases}", flush=True)
        return 0
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        outcomes = list(pool.map(lambda tool: run(tool, a.seconds), TOOLS))
    for tool, outcome in zip(TOOLS, outcomes, strict=True):
        print(f"compute-sanitizer {tool}: {outcome.verdict} ({outcome.detail})")
    return 1 if any(outcome.verdict == "FAILED" for outcome in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
