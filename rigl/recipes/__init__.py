"""Ready-made trainings: `rigl train RECIPE`. A recipe is a frozen config dataclass and what to do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import digits


@dataclass(frozen=True)
class Recipe:
    """One entry of `rigl recipes`.

    Attributes:
        config: the settings with their defaults.
        about: one line for the list.
        train: config -> the folder with the report.
        summary: config -> the sparse network's layers, printable.
    """

    config: Any
    about: str
    train: Callable[[Any], Path]
    summary: Callable[[Any], object]


RECIPES = {
    "digits": Recipe(digits.Digits(), digits.ABOUT, digits.train, digits.summary),
}
