"""The CPU benchmark: every part once at tiny sizes, and the arithmetic of its figures; no speed is judged."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import report, targets, timing  # noqa: E402
from bench.measure import Row, WrongResult, agrees, check, fma_peak, measure  # noqa: E402
from bench.models import MODELS  # noqa: E402
from bench.models import check as check_model  # noqa: E402
from bench.registry import SUITES  # noqa: E402
from bench.rivals import TorchCSR, rivals_of  # noqa: E402
from sparse_kernels import SparseConv2d, SparseLinear  # noqa: E402

ROOT = Path(__file__).parents[2]
ROW = Row("linear", "a layer", "CSR", 0.1, "step", 1.0, "dense", 5.0, 5.0, 0.05, 1, "avx512", "linear")


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(900)  # a dozen processes import torch
def test_every_suite_runs(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    text = run("pytest", "bench/suites", "--smoke", "--out", str(tmp_path), "-p", "no:cacheprovider")
    assert "targets:" in text
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {"linear-1t", "conv2d-1t", "step-1t"} <= found.keys()
    for name in ("linear-1t", "conv2d-1t", "step-1t"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name, content in found.items():
        assert content["conditions"]["fma_peak_gflops"] > 0
        assert all(row["ms"] > 0 and row["speedup"] > 0 for row in content["rows"])
        with (tmp_path / f"{name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(content["rows"])
    linear = found["linear-1t"]["rows"]
    assert {row["op"] for row in linear} == {"forward", "backward", "step", "dX", "dW"}
    assert {row["format"] for row in linear} == {"CSR", "BSR 16"}
    assert all("torch.sparse" in row["rivals"] for row in linear if row["format"] == "CSR")
    assert {row["case"] for row in found["step-1t"]["rows"]} == {"mlp-tiny", "resnet-tiny"}


def test_the_command_runs_and_adds_to_a_file(tmp_path: Path) -> None:
    common = ("--suite", "linear-tiny", "--budget", "1e-3", "--out", str(tmp_path), "--add")
    run("bench.run", *common, "--densities", "0.5")
    run("bench.run", *common, "--densities", "0.2", "--block-size", "16", "--no-peers")
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["format"], row["density"]) for row in rows] == [("CSR", 0.5)] * 3 + [("BSR 16", 0.2)] * 3


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = SUITES["linear-tiny"]
    right = SparseLinear.to_dense

    def wrong(layer: SparseLinear) -> torch.nn.Linear:
        dense = right(layer)
        with torch.no_grad():
            dense.weight[layer.mask()] *= 1.001
        return dense

    monkeypatch.setattr(SparseLinear, "to_dense", wrong)
    with pytest.raises(WrongResult, match="output"):
        measure(case, 0.2, start=lambda race, ours: pytest.fail("timed"))


@pytest.mark.parametrize("what", ["dW", "dX", "db"])
def test_a_wrong_gradient_is_seen(what: str) -> None:
    layer = SparseLinear(32, 48, density=0.2)
    spoiled = {"dW": lambda: layer.values, "db": lambda: layer.bias}
    x, dy = torch.randn(8, 32), torch.randn(8, 48)
    check(layer, x, dy)
    if what == "dX":
        layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 1.001,))
    else:
        spoiled[what]().register_hook(lambda grad: grad * 1.001)
    with pytest.raises(WrongResult, match=what):
        check(layer, x, dy)


def test_a_rival_is_the_same_layer_or_left_out() -> None:
    layer = SparseLinear(32, 48, density=0.2)
    x, dy = torch.randn(8, 32), torch.randn(8, 48)
    rival = rivals_of(layer)["torch.sparse"]
    assert isinstance(rival, TorchCSR)
    assert agrees(rival, layer, x, dy)
    with torch.no_grad():
        rival.values[3] += 0.1
    assert not agrees(rival, layer, x, dy)
    assert rivals_of(SparseLinear(32, 48, density=0.2, block_size=16)) == {}


def test_a_network_with_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["resnet-tiny"].sparse(0.5)
    x, labels = torch.randn(MODELS["resnet-tiny"].input_shape), torch.tensor([1, 2])
    check_model(model, x, labels)
    right = SparseConv2d.to_dense

    def wrong(layer: SparseConv2d) -> torch.nn.Conv2d:
        dense = right(layer)
        with torch.no_grad():
            dense.weight[0, 0] += 0.1
        return dense

    monkeypatch.setattr(SparseConv2d, "to_dense", wrong)
    with pytest.raises(WrongResult):
        check_model(model, x, labels)


def test_a_race_takes_turns_and_compares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(name: str, seconds: float) -> timing.Step:
        def step() -> None:
            order.append(name)
            # The machine slows down from turn to turn; the ratio does not.
            now[0] += seconds * (1 + len(order) // 100)

        return step

    race = timing.Race(
        {
            "dense": timing.Contestant([takes("f", 2), takes("b", 4)]),
            "ours": timing.Contestant([takes("x", 1), takes("y", 1)]),
        },
        budget=1e9,
    )
    assert (race.calls, race.turns) == (timing.CALLS, timing.TURNS[1])
    order.clear()
    race.run()
    assert "".join(order[:20]) == "fb" * 5 + "xy" * 5
    assert race.ratio("dense", "ours").median == 3
    assert race.ratio("dense", "ours", 0).median == 2
    assert race.ratio("dense", "ours", 1).spread < 0.2
    assert race.times("ours").fastest < race.times("ours").median
    assert race.best(["dense", "ours"]) == "ours"
    # What is too long for the budget gets one call a turn.
    assert timing.Race({"ours": timing.Contestant([takes("z", 9)])}, budget=1).calls == 1


def test_cores_taken_by_others_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    race = timing.Race({"ours": timing.Contestant([lambda: None])}, budget=1e-3)
    cores = len(timing.os.sched_getaffinity(0)) if hasattr(timing.os, "sched_getaffinity") else 0
    if not cores:
        pytest.skip("not Linux: unknown there")
    wall, busy, own = race._begin
    # In ten seconds we worked for five on each core, others as long.
    monkeypatch.setattr(timing, "_clocks", lambda: (wall + 10, busy + 10 * cores, own + 5 * cores))
    assert race.crowd(cores) == pytest.approx(0.5 * cores)
    monkeypatch.setattr(timing, "_clocks", lambda: (wall + 10, busy + 10 * cores, own + 10 * cores))
    assert race.crowd(cores) == 0


def test_verdicts() -> None:
    def words(row: Row) -> list[str]:
        return [verdict.word for verdict in targets.judge(row)]

    assert words(ROW) == ["met"]
    assert words(replace(ROW, speedup=4.9)) == ["missed"]
    assert words(replace(ROW, speedup=7)) == ["stretch"]
    assert words(replace(ROW, speedup=7, spread=0.21)) == ["noisy"]
    assert words(replace(ROW, crowd=0.5)) == ["noisy"]
    assert words(replace(ROW, density=0.3)) == []
    assert words(replace(ROW, op="forward", peak=0.54)) == ["missed"]
    extra = {"growth / dense dW": 1.1, "update / step": 2.1}
    assert words(replace(ROW, kind="growth", op="update", extra=extra)) == ["met", "missed"]
    twice = replace(ROW, threads=2, speedup=4.4)
    assert [v.word for v in targets.judge_threads([twice], [ROW])] == ["missed"]
    assert targets.judge(replace(ROW, speedup=4))[0].ratio == pytest.approx(0.8)


def test_break_even() -> None:
    def curve(*points: tuple[float, float]) -> dict[str, float]:
        return targets.break_even([replace(ROW, density=1 - s, speedup=v) for s, v in points])

    (point,) = curve((0.4, 0.5), (0.6, 2.0), (0.8, 4.0)).values()
    assert point == pytest.approx(0.5)  # half way in the logarithm
    assert list(curve((0.4, 1.1), (0.6, 2.0)).values()) == [0.4]
    assert curve((0.4, 0.5), (0.6, 0.9)) == {}  # never
    assert curve((0.8, 2.0), (0.9, 4.0)) == {}  # not looked for


def test_files_keep_what_belongs_to_other_conditions_apart(tmp_path: Path) -> None:
    report.write([replace(ROW, density=0.2)], tmp_path)
    path = tmp_path / "linear-1t.json"
    other = path.read_text().replace(report.machine(), "another-machine")
    report.write([ROW], tmp_path, add=True)
    assert len(json.loads(path.read_text())["rows"]) == 2
    path.write_text(other)
    report.write([ROW], tmp_path, add=True)
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_the_peak_is_a_rate() -> None:
    assert 0.1 < fma_peak(1) < 1000
