"""The programs a stranger starts: `rigl`, `python -m sparse_kernels.info`, and what they leave behind."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rigl import cli, report
from rigl.recipes import RECIPES
from rigl.recipes._duel import training_flops


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)


def test_info_names_versions_modules_and_reasons() -> None:
    done = _run("sparse_kernels.info")
    assert done.returncode == 0, done.stderr
    lines = dict(
        line.split(None, 1) for line in done.stdout.splitlines() if not line.startswith("CPU kernels")
    )
    import torch

    assert lines["torch"].strip() == torch.__version__
    assert lines["_C"].startswith("loaded")
    assert "_C_cuda" in lines
    assert "SPARSE_KERNELS_ISA" in lines
    assert "GPU" in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "recipes", "summary", "rigl train digits"]),
        (["train", "--help"], ["digits"]),
        (
            ["train", "digits", "--help"],
            ["--sparsity", "--method", "--block-size", "--epochs", "--seed", "0.95"],
        ),
    ],
)
def test_help_explains_itself(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["train", "nothing"], ["train", "digits", "--method", "magic"], ["bake", "digits"]],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("--sparsity", "1.5", "sparsity"),
        ("--epochs", "0", "epochs must be at least 1, got 0"),
        ("--sparsity", "0", "sparsity must be between 0 and 1"),
        ("--seed", "99999999999999999999", "seed must be between 0 and"),
        ("--lr", "nan", "lr must be a positive number, got nan"),
        ("--out", "/proc/nope", "out: no report can be written to /proc/nope"),
        ("--batch-size", "4000", "1347"),
        ("--threads", "-1", "threads"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    setting: str, value: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "digits", "--out", str(tmp_path), setting, value]) == 1
    error = capsys.readouterr().err
    assert error.startswith("rigl: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_missing_libraries_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("tyro", "sklearn") else find(name)
    )
    assert cli.main(["recipes"]) == 1
    error = capsys.readouterr().err
    assert "scikit-learn, tyro" in error
    assert "sparse-kernels[train]" in error


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)


def test_summary_shows_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["summary", "digits", "--sparsity", "0.9", "--block-size", "8"]) == 0
    text = capsys.readouterr().out
    assert "2048x2048" in text
    assert "BSR 8x8" in text


@pytest.mark.parametrize(
    "settings",
    [[], ["--method", "set", "--block-size", "2"], ["--method", "static", "--distribution", "uniform"]],
)
def test_digits_writes_its_report(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rigl.recipes.digits._SIZES", (64, 96, 96, 10))
    out = tmp_path / "a" / "b"
    arguments = ["train", "digits", "--epochs", "2", "--delta-t", "3", "--threads", "1", "--out", str(out)]
    assert cli.main([*arguments, "--sparsity", "0.8", *settings]) == 0
    assert "Test accuracy" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.png"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "report.json").read_text())
    for side in ("dense", "sparse"):
        figures = content[side]
        assert 0 < figures["test_accuracy"] <= 1
        assert figures["step_ms"] > 0
        assert len(figures["curve"]["seconds"]) == len(figures["curve"]["test_accuracy"]) == 2
    dense, sparse = content["dense"], content["sparse"]
    biases = 96 + 96 + 10
    assert dense["parameters"] == 64 * 96 + 96 * 96 + 96 * 10 + biases
    if "uniform" not in settings:  # which keeps the first layer dense
        assert sparse["parameters"] - biases == pytest.approx(0.2 * (dense["parameters"] - biases), abs=8)
    assert dense["training_flops"] == 1
    assert 0.2 <= sparse["training_flops"] < 0.6
    # SGD with momentum: a weight, its gradient and its momentum, 4 bytes each.
    assert dense["memory_bytes"] == 12 * dense["parameters"]
    assert sparse["memory_bytes"] - sparse["memory"]["index"] == 12 * sparse["parameters"]
    assert content["speedup"] == pytest.approx(dense["step_ms"] / sparse["step_ms"])
    assert (sparse["updates"] > 0) == ("static" not in settings)
    assert content["environment"]["threads"] == 1
    assert content["config"]["epochs"] == 2


def test_training_flops_follow_the_published_formula() -> None:
    # 90 % sparse, an update every 100 steps: (3 * 0.1 * 100 + 2 * 0.1 + 1) / 101 of 3.
    assert training_flops(1000, 100, "rigl", 100) == pytest.approx((30 + 0.2 + 1) / 101 / 3)
    assert training_flops(1000, 100, "set", 100) == pytest.approx(0.1)


def test_the_table_says_slower_where_it_is() -> None:
    side = {
        "test_accuracy": 0.9,
        "parameters": 10,
        "training_flops": 1.0,
        "train_seconds": 1.0,
        "memory_bytes": 10,
    }
    content = {"dense": {**side, "step_ms": 1.0}, "sparse": {**side, "step_ms": 2.0}}
    cells = {row[0]: row[3] for row in report.rows(content)}
    assert cells["Training step, median"] == "2.0x slower"
