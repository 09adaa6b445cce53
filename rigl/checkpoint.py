"""Checks of an updater's saved state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COUNTS = ("step_count", "updates", "failed_updates", "replaced")
_NUMBERS = ("seed", "last_update", *_COUNTS)


def check_state(state: Any, own: Mapping[str, Any]) -> Mapping[str, int | None]:
    """Raise ValueError unless `state` is one that an updater whose own state is `own` can take.

    Returns:
        Backward passes in a step, by layer.
    """
    if not isinstance(state, Mapping) or not own.keys() <= state.keys():
        got = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"expected the state of a {own['method']}, with {', '.join(own)}; got {got}")
    if state["method"] != own["method"]:
        raise ValueError(f"this is the state of a {state['method']}, not of a {own['method']}")
    for key in _NUMBERS:
        if isinstance(state[key], bool) or not isinstance(state[key], int):
            raise ValueError(f"{key} must be an int, got {state[key]!r}")
        if key in _COUNTS and state[key] < 0:
            raise ValueError(f"{key} must not be negative, got {state[key]}")
    if state["last_update"] > state["step_count"]:
        raise ValueError(
            f"last_update must not be after step_count, got {state['last_update']} and {state['step_count']}"
        )
    passes: Any = state["passes"]
    if not isinstance(passes, Mapping) or passes.keys() != own["passes"].keys():
        other = repr(passes)
        if isinstance(passes, Mapping):
            other = ", ".join(sorted(own["passes"].keys() ^ passes.keys()))
        raise ValueError(f"the state is of a model with other sparse layers; not in both: {other}")
    for name, n in passes.items():
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise ValueError(f"passes of layer {name!r} must be a positive int or None, got {n!r}")
    return passes
