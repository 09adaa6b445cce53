"""What `make gpu` runs: build, GPU tests, compute-sanitizer, benchmark; each part timed, none stops the next.

    python3 -m bench.gpu_suite                 # all, in less than 9 minutes
    python3 -m bench.gpu_suite test            # or bench, tune, profile: that part alone, after the build

On a machine without a GPU it builds, says so, and measures nothing. Needs no network and no installation.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "gpu"
ONLY = ("test", "bench", "tune", "profile")
# Seconds that a part may take. Kernels are compiled by the tests first; the benchmark finds them there.
BUILD, TEST, SANITIZER, BENCH, TUNE, PROFILE = 150, 180, 60, 180, 500, 400
SLACK = 60  # that a part with a budget of its own may need to come to its end


@dataclass(frozen=True)
class Part:
    """What came of one part.

    Attributes:
        name: as printed.
        result: "ok", "FAILED", or why it was not run.
        seconds: that it took.
    """

    name: str
    result: str
    seconds: float


def run(command: list[str], limit: float, quiet: bool = False, cwd: Path = ROOT) -> tuple[int, str]:
    """Run a command, at the root of the repository: exit status and, if quiet, what it printed."""
    pipe = subprocess.PIPE if quiet else None
    # A session of its own: what it has started ends with it.
    child = subprocess.Popen(
        command, cwd=cwd, text=True, stdout=pipe, stderr=subprocess.STDOUT if quiet else None,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        text, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        text, _ = child.communicate()
        return 124, f"{text or ''}\nno end after {limit:.0f} s"
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    return child.returncode, text or ""


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]


def build() -> str:
    """Compile in place."""
    command = python("setup.py", "--quiet", "build_ext", "--inplace")
    if int(metadata.version("setuptools").split(".")[0]) >= 77:
        status, text = run(command, BUILD + SLACK, quiet=True)
    else:
        # It cannot read our pyproject.toml. In a folder without one it does not try; nothing is fetched.
        with tempfile.TemporaryDirectory() as folder:
            for name in ("setup.py", "csrc", "sparse_kernels"):
                Path(folder, name).symlink_to(ROOT / name)
            status, text = run(command, BUILD + SLACK, quiet=True, cwd=Path(folder))
    if status:
        print(text)
    run(python("-m", "sparse_kernels.info"), SLACK)
    return "FAILED" if status else "ok"


def tests() -> str:
    """Every file in a process of its own, several at a time: most of the time goes into compiling kernels.

    compute-sanitizer runs beside them: nothing is timed here.
    """
    files = sorted(TESTS.glob("test_*.py"))
    workers = max(1, min(6, (os.cpu_count() or 2) // 2))

    def one(path: Path) -> tuple[Path, int, str, float]:
        start = time.monotonic()
        command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(path))
        status, text = run(command, TEST, quiet=True)
        return path, status, text, time.monotonic() - start

    with ThreadPoolExecutor(workers + 1) as pool:
        sanitized = pool.submit(sanitizer)
        done = list(pool.map(one, files))
    failed = 0
    for path, status, text, seconds in done:
        lines = [line for line in text.splitlines() if line.strip()]
        if status:
            failed += 1
            print("\n".join(lines[-80:]))
        print(f"{path.name}: {'FAILED' if status else 'ok'}, {seconds:.0f} s ({lines[-1] if lines else ''})")
    status, text = sanitized.result()
    print(text.strip())
    if failed or not files:
        return f"FAILED: {failed} of {len(files)} files"
    if status:
        return "FAILED: compute-sanitizer"
    return "ok, without all or part of compute-sanitizer" if "not run" in text else "ok"


def sanitizer() -> tuple[int, str]:
    """The four tools of compute-sanitizer, side by side."""
    command = python(str(TESTS / "sanitizer.py"), "--seconds", str(SANITIZER))
    return run(command, SANITIZER + 2 * SLACK, quiet=True)


def module(name: str, *arguments: str, limit: float) -> Callable[[], str]:
    """A program of this folder."""

    def part() -> str:
        status, text = run(python("-m", f"bench.{name}", *arguments), limit)
        print(text.strip(), end="")  # of a run that had no end: the rest it has printed itself
        return "FAILED" if status else "ok"

    return part


def parts(only: str) -> dict[str, Callable[[], str]]:
    """What to run after the build."""
    found = {}
    if only in ("", "test"):
        found["tests"] = tests
    if only in ("", "bench"):
        found["benchmark"] = module("gpu", "--quick", "--budget", str(BENCH), limit=BENCH + SLACK)
    if only == "tune":
        found["launch table"] = module("tune", "--budget", str(TUNE), limit=TUNE + SLACK)
    if only == "profile":
        found["profile"] = module("gpu_profile", limit=PROFILE)
    return found


def has_gpu() -> bool:
    """Whether torch sees one. Asked in another process: this one shall not hold memory on it."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return run(python("-c", code), SLACK, quiet=True)[0] == 0


def main(arguments: list[str]) -> int:
    """Run the parts and print what came of them. The exit status is 1 if any failed."""
    only = arguments[0] if arguments else ""
    if len(arguments) > 1 or (only and only not in ONLY):
        print(f"expected one of {', '.join(ONLY)}, or nothing for all; got {' '.join(arguments)!r}")
        return 2
    done: list[Part] = []

    def timed(name: str, part: Callable[[], str]) -> str:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        result = part()
        done.append(Part(name, result, time.monotonic() - start))
        print(f"-- {name}: {result}, {done[-1].seconds:.0f} s", flush=True)
        return result

    if timed("build", build) != "ok":
        return 1
    if not has_gpu():
        print("There is no GPU here that torch can use: the modules were built, nothing was run or measured.")
        return 0
    for name, part in parts(only).items():
        timed(name, part)
    print("== make gpu")
    for part in done:
        print(f"{part.name:<20} {part.seconds:6.0f} s  {part.result}")
    print(f"{'together':<20} {sum(part.seconds for part in done):6.0f} s")
    return 1 if any(part.result.startswith("FAILED") for part in done) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
