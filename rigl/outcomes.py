"""How a topology update may end, other than well."""

from __future__ import annotations


class SkippedUpdateWarning(RuntimeWarning):
    """A topology update that was due did not happen; nothing changed."""


class NonFiniteWarning(SkippedUpdateWarning):
    """The reason was a weight, gradient or growth score that is NaN or infinite."""


class NotFinite(Exception):
    """A layer's numbers forbid the update of all."""


class NotReady(Exception):
    """The gradients seen do not suffice to decide; try again at the next step."""


def not_finite(what: str, name: str) -> str:
    """The message for a layer's `"weight"`, `"gradient"` or `"score"`."""
    kind = {"weight": "a weight", "gradient": "the gradient", "score": "a growth score (gradient)"}[what]
    return f"{kind} of layer {name!r} is not finite"
