"""Where the cycles of the GPU kernels go: one launch of each, under ncu or torch's profiler.

python3 -m bench.gpu_profile               # ncu if it is there and allowed, else torch's profiler
python3 -m bench.gpu_profile --launches    # what ncu looks at
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

from .gpu_rivals import Case, Operands, dense_calls, sparse_calls
from .gpu_timing import Call
from .gpu_update import growth_calls

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats")
KERNELS = "regex:bsr_|gluon_|block_norms"
BLOCKS = (16, 64, 128)


def products(device: str, smoke: bool) -> dict[str, Call]:
    """One call of every product and block, and the dense ones."""
    tokens, side = (32, 128) if smoke else (8192, 4096)
    dtype, backend = ("float32", "auto") if device == "cpu" else ("bfloat16", "triton")
    found: dict[str, Call] = {}
    for block in BLOCKS:
        o = Operands(Case(tokens, side, side, block, 0.1 if not smoke else 0.5, dtype), device, copies=1)
        for op in ("forward", "dX", "dW"):
            found[f"{op}, block {block}"] = sparse_calls(o, op, backend)[0]
        if block == 64:
            found["growth scores, block 64"] = growth_calls(o)[0]
            found["cuBLAS forward"] = dense_calls(o, "forward")[0]
    return found


def launches(device: str, smoke: bool) -> None:
    """Each once to compile, and once between the marks of the profiler."""
    calls = products(device, smoke)
    for call in calls.values():
        call()
    if device == "cpu":
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def by_ncu() -> bool:
    """Print what ncu says. Whether it said anything."""
    ncu = shutil.which("ncu") or shutil.which(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/ncu")
    if ncu is None:
        print("ncu: not there")
        return False
    command = [ncu, "--profile-from-start", "off", "--kernel-name", KERNELS]
    command += [argument for section in SECTIONS for argument in ("--section", section)]
    command += [sys.executable, "-m", "bench.gpu_profile", "--launches"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        print("ncu: no end after 300 s")
        return False
    if done.returncode or "ERR_NVGPUCTRPERM" in done.stdout or "Duration" not in done.stdout:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line]
        print(f"ncu: not run ({lines[0] if lines else f'exit status {done.returncode}'})")
        return False
    print(done.stdout)
    return True


def by_torch(device: str, smoke: bool) -> None:
    """Print times by kernel."""
    activity = torch.profiler.ProfilerActivity
    calls = products(device, smoke)
    for call in calls.values():
        call()
    kinds = [activity.CPU] if device == "cpu" else [activity.CPU, activity.CUDA]
    with torch.profiler.profile(activities=kinds) as trace:
        for name, call in calls.items():
            with torch.profiler.record_function(name):
                call()
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_cpu_time_total" if device == "cpu" else "self_cuda_time_total"
    print(trace.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def main(argv: list[str] | None = None) -> int:
    """Profile. Needs a GPU; `--device cpu --smoke` tries the program out."""
    parser = argparse.ArgumentParser(
        prog="bench.gpu_profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launches", action="store_true", help="launch the kernels, and nothing else")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    a = parser.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --smoke tries the program out without one")
    if a.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, which is later
    run: Callable[[str, bool], None] = launches if a.launches else by_torch
    if a.launches or a.device == "cpu" or not by_ncu():
        run(a.device, a.smoke)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
