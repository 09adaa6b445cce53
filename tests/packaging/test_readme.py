"""What README and docs show is run, so that it stays true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)


SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{i}") for page in PAGES for i, code in enumerate(_blocks(page))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run(code: str) -> None:
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_the_readme_has_a_snippet() -> None:
    assert _blocks(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_figure_waits_to_be_measured(page: Path) -> None:
    assert "RUN ME" not in page.read_text()
