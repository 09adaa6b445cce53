"""What importing the packages does, in fresh processes: little, and nothing to the device."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Runs first in the fresh process: counts questions to the device and notes what torch alone brings in.
_PRELUDE = """
import json, sys
import torch
asked = []
def spy(name):
    def ask(*args, **kwargs):
        asked.append(name)
        return 0
    return ask
for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_capability"):
    setattr(torch.cuda, name, spy(name))
before = set(sys.modules)
"""


def _fresh(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["sparse_kernels", "rigl", "rigl.cli", "rigl.recipes", "rigl.report"])
def test_import_brings_in_nothing_heavy_and_asks_no_device(package: str) -> None:
    out = _fresh(
        _PRELUDE + f"import {package}\nprint(json.dumps([asked, sorted(set(sys.modules) - before)]))"
    )
    asked, new = json.loads(out)
    heavy = {"triton", "matplotlib", "sklearn", "scipy", "rich", "tqdm", "tyro", "lightning", "transformers"}
    assert {name.split(".")[0] for name in new} & heavy == set()
    assert not any(name.startswith("torch._inductor") for name in new)
    assert asked == []


def test_import_prints_nothing() -> None:
    assert _fresh("import sparse_kernels, rigl") == ""


def test_works_where_the_cuda_module_is_absent() -> None:
    code = (
        "import sys; sys.modules['sparse_kernels._C_cuda'] = None\n"  # an import of it fails
        "import torch; torch.version.cuda = '13.0'\n"
        "import sparse_kernels as sk\n"
        "from sparse_kernels import _load\n"
        "assert '_C_cuda' in _load.missing, _load.missing\n"
        "print(sk.SparseLinear(8, 4, density=0.5)(torch.ones(2, 8)).shape)"
    )
    assert _fresh(code).strip() == "torch.Size([2, 4])"


def test_says_how_to_build_when_the_cpu_module_is_absent() -> None:
    code = (
        "import sys; sys.modules['sparse_kernels._C'] = None\n"
        "try:\n    import sparse_kernels\nexcept ImportError as error:\n    print(error)"
    )
    assert "pip install --no-build-isolation" in _fresh(code)


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, package-relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} | {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


def test_kernels_do_not_know_the_training_half() -> None:
    for path in (ROOT / "sparse_kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "rigl" for name in _imports(path)), path


def test_implementations_do_not_import_each_other() -> None:
    backends = {"reference", "dense"}
    for name in backends:
        others = {f".{other}" for other in (backends | {"functional"}) - {name}}
        imported = _imports(ROOT / "sparse_kernels" / f"{name}.py")
        assert not imported & others, name
