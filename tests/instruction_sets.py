"""Runs the operators' tests once more for each instruction set that the kernels would not use by themselves.

    python tests/instruction_sets.py [pytest arguments]

The suite itself runs on the widest set of the machine; `make test` runs this beside it. Each set is forced in
a process of its own, which `tests/kernels/conftest.py` makes sure of. Sets that the machine lacks are named.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETS = ("avx512", "avx2", "scalar")
# What starts processes for every set itself is left to the suite.
TESTS = ("tests/kernels", "tests/nn/test_gradients.py", "--ignore=tests/kernels/test_instruction_sets.py")
LAST_LINES = 12


def environment(isa: str | None) -> dict[str, str]:
    """This process's, with a set asked for or none."""
    kept = {k: v for k, v in os.environ.items() if k != "SPARSE_KERNELS_ISA"}
    return kept if isa is None else {**kept, "SPARSE_KERNELS_ISA": isa}


def set_in_use(isa: str | None) -> str:
    """The set of a fresh process's kernels; empty if the one asked for is absent."""
    code = "import sparse_kernels, torch; print(torch.ops.sparse_kernels.cpu_isa())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(isa),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode and isa is None:
        raise SystemExit(run.stderr)
    return run.stdout.strip()


def main() -> int:
    """Run them all, print the end of each run (all of it, if it failed); the number of failed runs."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run in progress ends too
    widest, failed = set_in_use(None), []
    for isa in SETS:
        if isa == widest:
            print(f"== {isa}: the suite itself runs on it", flush=True)
            continue
        if set_in_use(isa) != isa:
            print(f"== {isa}: NOT RUN, this machine lacks it", flush=True)
            continue
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *TESTS, *sys.argv[1:]]
        run = subprocess.run(
            command, cwd=ROOT, env=environment(isa), capture_output=True, text=True, check=False
        )
        lines = (run.stdout + run.stderr).splitlines()
        if run.returncode:
            failed.append(isa)
        else:
            lines = lines[-LAST_LINES:]
        verdict = "FAILED" if run.returncode else "passed"
        print(f"== {isa}: {verdict}, {time.monotonic() - start:.0f} s: {' '.join(TESTS)}", *lines, sep="\n")
        sys.stdout.flush()
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
