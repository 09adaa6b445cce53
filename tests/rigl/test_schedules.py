"""When updates happen and how much they replace: the published vectors and check values."""

from __future__ import annotations

import math

import pytest

from rigl.schedules import Window, drop_fraction, replaced


@pytest.mark.parametrize(
    ("begin", "t_end", "delta_t", "expected"),
    [
        (3, 7, 2, "11101101101"),
        (1, 5, 3, "10111011111"),
        (0, 4, 1, "01010101011"),
    ],
)
def test_trigger_vectors(begin: int, t_end: int, delta_t: int, expected: str) -> None:
    window = Window(begin, t_end, delta_t)
    step, last, seen = 0, window.never, ""
    for _ in expected:
        if window.due(step, last):
            last, seen = step, seen + "0"
        else:
            step, seen = step + 1, seen + "1"
    assert seen == expected


@pytest.mark.parametrize(
    ("step", "k"), [(0, 8847), (6250, 7551), (12500, 4423), (18750, 1295), (24900, 0), (25000, 0)]
)
def test_cosine_check_values(step: int, k: int) -> None:
    fraction = drop_fraction("cosine", alpha=0.3, begin=0, t_end=25000)
    assert replaced(29_492, fraction(step)) == k


def test_batches_of_the_published_run() -> None:
    window = Window(0, 25000, 100)
    last, updates = window.never, 0
    for step in range(32000):
        if window.due(step, last):
            last, updates = step, updates + 1
    assert updates == 251


def test_formulas_with_begin() -> None:
    conf = {"alpha": 0.4, "begin": 20, "t_end": 120}
    cosine = drop_fraction("cosine", **conf)
    # The official code shortens the curve by `begin`, but does not shift it.
    assert cosine(50) == pytest.approx(0.2 * (1 + math.cos(math.pi * 0.5)))
    assert cosine(110) == cosine(120) == pytest.approx(0.0, abs=1e-15)
    assert drop_fraction("constant", **conf)(77) == 0.4
    assert drop_fraction("linear", **conf)(70) == pytest.approx(0.2)
    assert drop_fraction("inverse_power", power=3, **conf)(70) == pytest.approx(0.4 * 0.5**3)
    assert drop_fraction(lambda t: t / 1000, **conf)(70) == 0.07


def test_the_count_is_taken_in_float32() -> None:
    # 0.3 in float32 is 0.30000001...: exactly 3 of 10, where 0.29999999999999999 * 10 might give 2.
    assert replaced(10, 0.3) == 3
    # 2^24 + 1 is not a float32: the product is that of 2^24.
    assert replaced(2**24 + 1, 1.0) == 2**24
    assert replaced(2**24 + 3, 1.0) == 2**24 + 3  # rounds up to + 4, but there are no more than that
    assert replaced(7, 1.0) == 7
    assert replaced(7, 0.0) == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"begin": 5, "t_end": 5}, ValueError, "t_end must be greater than begin = 5"),
        ({"t_end": 0}, ValueError, "t_end must be greater"),
        ({"begin": -1}, ValueError, "begin"),
        ({"delta_t": 0}, ValueError, "delta_t must be at least 1"),
        ({"delta_t": 2.5}, TypeError, "delta_t must be an int"),
        ({"t_end": True}, TypeError, "t_end must be an int"),
    ],
)
def test_impossible_windows(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Window(**{"begin": 0, "t_end": 10, "delta_t": 1, **kwargs})


@pytest.mark.parametrize(
    ("schedule", "kwargs", "error", "message"),
    [
        ("cosine", {"alpha": 1.1}, ValueError, r"alpha must be a fraction in \[0, 1\], got 1.1"),
        ("cosine", {"alpha": -0.1}, ValueError, "alpha"),
        ("cosine", {"alpha": math.nan}, ValueError, "alpha"),
        ("inverse_power", {"power": 0}, ValueError, "power"),
        ("cosin", {}, ValueError, "cosine, constant, linear, inverse_power"),
        (3, {}, TypeError, "name or a callable"),
    ],
)
def test_impossible_schedules(schedule: object, kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        drop_fraction(schedule, **{"alpha": 0.3, "begin": 0, "t_end": 10, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_a_callable_must_return_a_fraction(value: float) -> None:
    with pytest.raises(ValueError, match="at step 4"):
        drop_fraction(lambda t: value, alpha=0.3, begin=0, t_end=10)(4)
