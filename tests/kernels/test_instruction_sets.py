"""Every instruction set passes the same cases and agrees bit for bit on integers (drill D42)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_kernels

CASES = Path(__file__).with_name("kernel_cases.py")
# VEX and EVEX mnemonics begin with v; verr, verw and the virtualisation ones (vm...) take no xmm register.
_VECTOR = re.compile(r".*%[yz]mm|v[a-z0-9]+ .*%xmm")
TOUCH = "import sparse_kernels, torch; torch.ops.sparse_kernels.cpu_isa()"
SETS = ("scalar", "avx2", "avx512")
_NEEDS = {"scalar": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw"}}


def machine_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        pytest.skip("no /proc/cpuinfo to ask for the machine's instruction sets")
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def python(isa: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SPARSE_KERNELS_ISA": isa, "OMP_NUM_THREADS": "1"}
    options = {"env": env, "cwd": CASES.parent, "capture_output": True, "text": True, "timeout": 240}
    return subprocess.run([sys.executable, *args], check=False, **options)


def run_cases(isa: str, drill: str, count: int) -> dict[str, object]:
    done = python(isa, str(CASES), drill, "0", str(count))
    assert done.returncode == 0, f"{isa}: exit {done.returncode}\n{done.stderr[-2000:]}"
    result = json.loads(done.stdout)
    assert result["isa"] == isa
    assert not result["failures"], f"{isa}: " + "\n".join(result["failures"])
    return result


def present() -> list[str]:
    return [isa for isa in SETS if machine_flags() >= _NEEDS[isa]]


def test_random_shapes_under_every_set():
    for isa in present():
        run_cases(isa, "d01", 300)


def test_integers_agree_bit_for_bit():
    sets = present()
    digests = {isa: run_cases(isa, "d02" if isa == sets[0] else "digest", 500)["digest"] for isa in sets}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("isa", ["avx9000", "AVX2 "])
def test_an_unknown_set_is_an_error(isa):
    done = python(isa, "-c", TOUCH)
    assert done.returncode == 1, f"exit {done.returncode}: {done.stderr[-500:]}"
    assert "SPARSE_KERNELS_ISA" in done.stderr


def test_an_absent_set_is_an_error():
    absent = [isa for isa in SETS if isa not in present()]
    if not absent:
        pytest.skip("this machine has every instruction set")
    done = python(absent[0], "-c", TOUCH)
    assert done.returncode == 1, f"exit {done.returncode}: {done.stderr[-500:]}"
    assert "SPARSE_KERNELS_ISA" in done.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_no_vector_extension_outside_the_dispatched_functions():
    """A ymm or zmm register elsewhere would be an illegal instruction on an older machine."""
    libraries = list(Path(sparse_kernels.__file__).parent.glob("_C.*so"))
    assert libraries
    bad, dispatched, symbol = set(), set(), ""
    command = ["objdump", "-d", "--no-show-raw-insn", str(libraries[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as objdump:
        assert objdump.stdout is not None
        for line in objdump.stdout:
            if line.endswith(">:\n"):
                symbol = line.split("<", 1)[1][:-3]
            elif "\t" in line and _VECTOR.match(line.split("\t", 1)[1]):
                (dispatched if "isa_avx" in symbol else bad).add(symbol)
    assert objdump.returncode == 0
    assert not bad, f"{len(bad)} functions, such as {sorted(bad)[:5]}"
    if "avx512" in present():
        assert any("isa_avx512" in s for s in dispatched), "no AVX-512 code at all: the scan saw nothing"
