"""The GPU benchmark and its programs, tried out on the CPU: every part once, at tiny sizes, no figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # whose interpreter runs the kernels
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import gpu_report, gpu_suite, gpu_timing  # noqa: E402
from bench.gpu_report import Row, Verdict  # noqa: E402
from bench.gpu_rivals import Case, WrongResult, check  # noqa: E402

ROOT = Path(__file__).parents[2]


def run(*arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_every_part_of_the_benchmark_runs(tmp_path: Path) -> None:
    text = run("bench.gpu", "--device", "cpu", "--smoke", "--out", str(tmp_path))
    assert "FAILED" not in text
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(path.read_text())
    assert {row["op"] for row in found["rows"]} == {"forward", "dX", "dW", "step"}
    assert len(found["rows"]) == 16
    assert all(row["us"] > 0 and row["floor_us"] > 0 and row["how"] == "cpu" for row in found["rows"])
    assert {"growth", "update", "host time of a call", "peers, forward"} <= found["extras"].keys()
    assert not found["failures"]
    assert not found["left_out"]
    # A CPU says nothing about a GPU.
    assert "no figure of a GPU" in found["conditions"]["device"]
    assert {v["verdict"] for v in found["requirements"]} == {"not judged"}


def test_a_budget_leaves_out_and_says_so(tmp_path: Path) -> None:
    text = run("bench.gpu", "--device", "cpu", "--smoke", "--budget", "1e-9", "--out", str(tmp_path))
    assert "left out, no time: growth scores" in text
    (path,) = tmp_path.glob("*.json")
    assert "growth scores" in json.loads(path.read_text())["left_out"]


def test_the_first_hour_runs(tmp_path: Path) -> None:
    text = run("bench.gpu", "--device", "cpu", "--smoke", "--first-hour", "--out", str(tmp_path))
    assert "failed" not in text
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert [len(found[name]) for name in ("L2 into shared memory", "tensor cores")] == [6, 5]


def test_the_tuner_writes_a_table_that_the_kernels_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_kernels.triton import configs

    table = tmp_path / "table.json"
    text = run("bench.tune", "--device", "cpu", "--smoke", "--out", str(table))
    assert "FAILED" not in text
    assert "left out" not in text
    monkeypatch.setattr(configs, "TABLE", table)
    configs._table.cache_clear()
    try:
        entries = json.loads(table.read_text())["cpu"]
        assert {key.split("/")[0] for key in entries} == {"spmm", "spmmt", "sddmm", "growth_norms"}
        for key, entry in entries.items():
            op, sides, arithmetic, _ = key.split("/")
            out, inner = map(int, sides.split("x"))
            problem = configs.Problem(op.removesuffix("t"), out, inner, arithmetic, 48, op == "spmmt")
            assert problem.key == key
            assert configs.choose(problem, "cpu") == configs.Config(**entry["config"])
    finally:
        configs._table.cache_clear()


def test_the_profile_runs() -> None:
    assert "dW, block 128" in run("bench.gpu_profile", "--device", "cpu", "--smoke")


@pytest.mark.parametrize(
    "arguments", [["bench.gpu"], ["bench.tune"], ["bench.gpu_profile"], ["bench.gpu", "--device", "cpu"]]
)
def test_without_a_gpu_the_way_out_is_named(arguments: list[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    assert "--smoke" in run(*arguments, status=2)


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([(0.5, 0.5), (0.25, 1.0), (0.1, 3.0)], "75%"),
        ([(0.4, 0.5), (0.1, 2.0)], "80%"),  # half way between them, on a logarithmic scale
        ([(0.5, 1.2), (0.1, 3.0)], "below 50%"),
        ([(0.5, 0.2), (0.05, 0.9)], "above 95%"),
        ([], "not measured"),
    ],
)
def test_break_even(points: list[tuple[float, float]], found: str) -> None:
    assert gpu_report.break_even(points) == found
    assert gpu_report.break_even(reversed(points)) == found


def test_targets_belong_to_one_layer_and_dtype() -> None:
    def target(op: str = "step", density: float = 0.1, **changes: object) -> tuple[float, float] | None:
        sizes = {"tokens": 8192, "inputs": 4096, "outputs": 4096, "block": 64, "density": density, **changes}
        return Row(Case(**sizes), op, 1, 1, 1, 1, 1, 1, "graph").target  # type: ignore[arg-type]

    def verdict(us: float, auto_us: float | None) -> str:
        return Row(Case(8192, 4096, 4096, 64, 0.1), "step", us, 1, 1, 42, 1, 1, "graph", auto_us).verdict

    assert target() == (3.5, 4.2)
    assert [verdict(1, us) for us in (10, 12, 14, 8)] == ["good", "met", "MISSED", "good"]
    assert [verdict(us, None) for us in (12, 14)] == ["met", "MISSED"]
    assert target(density=0.05, block=16) == (2.2, 2.9)
    others = [{"op": "forward"}, {"density": 0.5}, {"inputs": 1024}, {"dtype": "float16"}]
    assert [target(**other) for other in others] == [None] * 4  # type: ignore[arg-type]


def test_what_was_not_measured_is_not_met() -> None:
    words = [
        gpu_report.at_least("a", None, 1).word,
        gpu_report.at_least("a", 2, 1, judged=False).word,
        gpu_report.at_least("a", 2, 1).word,
        gpu_report.at_least("a", float("nan"), 1).word,
        gpu_report.at_most("a", 2, 1).word,
        Verdict("a", "-", "", None).word,
    ]
    assert words == ["not judged", "not judged", "met", "MISSED", "MISSED", "not judged"]


def test_a_wrong_result_is_not_timed() -> None:
    import torch

    expected = torch.randn(64, 64)
    rival = expected.half()
    check("y", rival.clone(), expected, rival, 2)
    for value in (float("nan"), 1.5 * expected.abs().max().item()):
        wrong = rival.clone()
        wrong[-1, -1] = value
        with pytest.raises(WrongResult, match="not timed"):
            check("y", wrong, expected, rival, 2)


def test_the_suite_builds_says_that_there_is_no_gpu_and_goes_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "build", lambda: "ok")
    monkeypatch.setattr(gpu_suite, "has_gpu", lambda: False)
    assert gpu_suite.main(["test"]) == 0
    assert "nothing was run or measured" in capfd.readouterr().out
    monkeypatch.setattr(gpu_suite, "build", lambda: "FAILED")
    assert gpu_suite.main([]) == 1
    assert gpu_suite.main(["nonsense"]) == 2


def test_the_suite_runs_all_parts_and_fails_if_one_does(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def pretended(command: list[str], limit: float, quiet: bool = False) -> tuple[int, str]:
        commands.append(" ".join(command[1:]))
        return (1 if "test_drills_memory" in commands[-1] else 0), "memcheck: not run (refused)"

    monkeypatch.setattr(gpu_suite, "run", pretended)
    assert gpu_suite.main([]) == 1
    out = capfd.readouterr().out
    assert "FAILED: 1 of" in out
    assert "memcheck: not run" in out
    assert any(c.startswith("-m bench.gpu --quick") for c in commands)
    assert not any("bench.tune" in c for c in commands)
    commands.clear()
    assert gpu_suite.main(["tune"]) == 0
    assert [c for c in commands if "tune" in c]
    assert not [c for c in commands if "pytest" in c]


def test_a_part_without_an_end_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "child"
    code = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 3; touch {mark}'])"
    status, text = gpu_suite.run([sys.executable, "-c", code], limit=1, quiet=True)
    assert status == 124
    assert "no end after 1 s" in text
    assert gpu_suite.run([sys.executable, "-c", "import time; time.sleep(3)"], limit=60)[0] == 0
    assert not mark.exists()


def test_a_call_that_synchronises_is_seen_and_the_mode_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def reads() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert gpu_timing._synchronises(reads)
    assert not gpu_timing._synchronises(lambda: None)
    assert modes == ["error", "default"] * 2
