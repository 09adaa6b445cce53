"""How a network's sparsity is shared out among its layers. Pure functions of shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from sparse_kernels.positions import active_count

DISTRIBUTIONS = ("uniform", "er", "erk")

Shape = tuple[int, ...]


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """The sparsity, if it is a number in [0, 1); else ValueError."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1) (the fraction of zeros), got {sparsity!r}")
    return float(sparsity)


def zero_count(total: int, sparsity: float) -> int:
    """`floor(sparsity * total)`, guarded against float error."""
    return total - active_count(total, 1.0 - sparsity)


def distribute(
    shapes: Mapping[str, Shape],
    sparsity: float,
    distribution: str = "erk",
    *,
    dense: Collection[str] = (),
    custom: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Sparsity of each layer.

    Args:
        shapes: name -> shape of the weight, `(out, in)` or `(out, in/groups, kh, kw)`.
        sparsity: target for all layers together, in [0, 1).
        distribution: `"uniform"` (the same everywhere), `"er"` (density proportional to
            `(out + in) / (out * in)`) or `"erk"` (to the sum of all dimensions over their product).
        dense: names kept dense, outside the budget: neither counted nor compensated.
        custom: name -> sparsity, likewise outside the budget.

    Returns:
        name -> sparsity, in the order of `shapes`. Layers whose density would exceed 1 get sparsity 0;
        the others pay for them.

    Raises:
        ValueError: sparsity outside [0, 1), an unknown distribution or name.
    """
    check_sparsity(sparsity)
    custom = dict(custom or {})
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    for name in (*dense, *custom):
        if name not in shapes:
            raise ValueError(f"no layer is called {name!r}; the layers are {', '.join(shapes)}")
    for name, value in custom.items():
        check_sparsity(value, f"the custom sparsity of {name!r}")
    free = {name: shape for name, shape in shapes.items() if name not in custom and name not in dense}
    if distribution == "uniform":
        solved = dict.fromkeys(free, float(sparsity))
    else:
        solved = _solve(free, sparsity, kernel=distribution == "erk")
    return {name: solved.get(name, custom.get(name, 0.0)) for name in shapes}


def _solve(shapes: Mapping[str, Shape], sparsity: float, kernel: bool) -> dict[str, float]:
    """Densities epsilon * ratio with the total of `sparsity`; what exceeds 1 is capped and paid for."""
    used = {name: shape if kernel else shape[:2] for name, shape in shapes.items()}
    size = {name: prod(shape) for name, shape in shapes.items()}
    ratio = {name: sum(dims) / prod(dims) for name, dims in used.items() if size[name]}
    zeros = {name: zero_count(n, sparsity) for name, n in size.items()}
    capped = {name for name, n in size.items() if n == 0}
    while True:
        rest = [name for name in shapes if name not in capped]
        if not rest:
            return dict.fromkeys(shapes, 0.0)
        budget = sum(size[name] - zeros[name] for name in rest) - sum(zeros[name] for name in capped)
        epsilon = budget / sum(ratio[name] * size[name] for name in rest)
        highest = max(ratio[name] for name in rest)
        if epsilon * highest <= 1.0:
            return {name: 0.0 if name in capped else 1.0 - epsilon * ratio[name] for name in shapes}
        capped.update(name for name in rest if ratio[name] == highest)
