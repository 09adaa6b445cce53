"""When the topology is updated, and which fraction of the weights is replaced then."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

SCHEDULES = ("cosine", "constant", "linear", "inverse_power")

Schedule = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Window:
    """The steps at which updates are due.

    Attributes:
        begin: step of the first update.
        t_end: last step at which an update may happen (inclusive).
        delta_t: optimizer steps between two updates.

    Raises:
        ValueError: `begin < 0`, `t_end <= begin`, `delta_t < 1`.
    """

    begin: int
    t_end: int
    delta_t: int

    def __post_init__(self) -> None:
        for name in ("begin", "t_end", "delta_t"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int (a number of optimizer steps), got {value!r}")
        if self.begin < 0:
            raise ValueError(f"begin must be a step number >= 0, got {self.begin}")
        if self.t_end <= self.begin:
            raise ValueError(
                f"t_end must be greater than begin = {self.begin}, got {self.t_end}; it is the step of the "
                "last topology update, usually 75 % of the training steps"
            )
        if self.delta_t < 1:
            raise ValueError(f"delta_t must be at least 1 step, got {self.delta_t}")

    @property
    def never(self) -> int:
        """The `last_update` of a run without any yet: makes the first one due at `begin`."""
        return -self.delta_t

    def due(self, step: int, last_update: int) -> bool:
        """Whether an update belongs to this step."""
        return self.begin <= step <= self.t_end and last_update + self.delta_t <= step


def drop_fraction(
    schedule: str | Schedule, *, alpha: float, begin: int, t_end: int, power: float = 3.0
) -> Schedule:
    """The fraction of a layer's active weights that an update at step t replaces, as a function of t.

    With T = t_end - begin:

    - `"cosine"`: `alpha / 2 * (1 + cos(pi * min(t, T) / T))` (the paper; `begin` shortens the curve but
      does not shift it, as in the official code),
    - `"constant"`: `alpha`,
    - `"linear"`: `alpha * (1 - (t - begin) / T)`,
    - `"inverse_power"`: `alpha * (1 - (t - begin) / T) ** power`,
    - a callable: used as it is, `alpha` and `power` are ignored.

    Raises:
        ValueError: an unknown name, `alpha` outside [0, 1], `power` not positive; later, when called, a
            callable's result outside [0, 1].
        TypeError: a schedule that is neither a name nor callable.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be a fraction in [0, 1], got {alpha!r}")
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not power > 0:
        raise ValueError(f"power must be a positive number, got {power!r}")
    length = t_end - begin
    if callable(schedule):
        return _checked(schedule)
    if not isinstance(schedule, str):
        raise TypeError(f"schedule must be a name or a callable, got {type(schedule).__name__}")
    if schedule == "cosine":
        return lambda t: alpha / 2 * (1 + math.cos(math.pi * min(t, length) / length))
    if schedule == "constant":
        return lambda t: alpha
    if schedule in ("linear", "inverse_power"):
        exponent = 1.0 if schedule == "linear" else power
        return lambda t: alpha * (1 - min(max(t - begin, 0), length) / length) ** exponent
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a callable, got {schedule!r}")


def _checked(schedule: Schedule) -> Schedule:
    def fraction(t: int) -> float:
        value = float(schedule(t))
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"the schedule must return a fraction in [0, 1], got {value} at step {t}")
        return value

    return fraction


def replaced(active: int, fraction: float) -> int:
    """How many of `active` weights an update replaces: `trunc(float32(active) * float32(fraction))`.

    In float32, as the official code computes it: the counts agree digit for digit.
    """
    # The product of two float32 numbers is exact in Python's float64.
    return min(active, int(_float32(_float32(active) * _float32(fraction))))


def _float32(x: float) -> float:
    return ctypes.c_float(x).value
