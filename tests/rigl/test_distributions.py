"""Distributions against the worked examples and the ResNet-50 table of the specification."""

from __future__ import annotations

import math

import pytest

from rigl.distributions import distribute, zero_count

FOUR = {"a": (32, 16, 3, 3), "b": (64, 32, 1, 1), "c": (64, 64, 3, 3), "d": (10, 64)}


def nnz(shapes: dict[str, tuple[int, ...]], sparsities: dict[str, float]) -> dict[str, int]:
    return {n: math.prod(s) - zero_count(math.prod(s), sparsities[n]) for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("distribution", "target", "sparsities", "counts"),
    [
        ("erk", 0.8, (0.616959, 0.0, 0.881186, 0.0), (1766, 2048, 4380, 640)),
        ("er", 0.8, (0.527883, 0.763941, 0.842628, 0.417722), (2176, 484, 5802, 373)),
        ("erk", 0.9, (0.845239, 0.368058, 0.951995, 0.0), (714, 1295, 1770, 640)),
        ("uniform", 0.8, (0.8,) * 4, (922, 410, 7373, 128)),
    ],
)
def test_worked_example(distribution: str, target: float, sparsities: tuple, counts: tuple) -> None:
    plan = distribute(FOUR, target, distribution)
    assert list(plan) == list(FOUR)
    assert list(plan.values()) == pytest.approx(sparsities, abs=5e-7)
    assert tuple(nnz(FOUR, plan).values()) == counts


# (kh, kw, in, out), how many, density at 0.8 and 0.9
RESNET50 = [
    ((7, 7, 3, 64), 1, 0.8572, 0.4200),
    ((1, 1, 64, 64), 1, 1, 1),
    ((3, 3, 64, 64), 3, 0.3619, 0.1773),
    ((1, 1, 64, 256), 4, 1, 0.9588),
    ((1, 1, 256, 64), 2, 1, 0.9588),
    ((1, 1, 256, 128), 1, 1, 0.5747),
    ((3, 3, 128, 128), 4, 0.1769, 0.0867),
    ((1, 1, 128, 512), 4, 0.9753, 0.4779),
    ((1, 1, 512, 128), 3, 0.9753, 0.4779),
    ((1, 1, 256, 512), 1, 0.5849, 0.2866),
    ((1, 1, 512, 256), 1, 0.5849, 0.2866),
    ((3, 3, 256, 256), 6, 0.0874, 0.0428),
    ((1, 1, 256, 1024), 6, 0.4869, 0.2386),
    ((1, 1, 1024, 256), 5, 0.4869, 0.2386),
    ((1, 1, 512, 1024), 1, 0.2921, 0.1431),
    ((1, 1, 1024, 512), 1, 0.2921, 0.1431),
    ((3, 3, 512, 512), 3, 0.0435, 0.0213),
    ((1, 1, 512, 2048), 3, 0.2433, 0.1192),
    ((1, 1, 2048, 512), 2, 0.2433, 0.1192),
    ((1, 1, 1024, 2048), 1, 0.1459, 0.0715),
    ((2048, 1000), 1, 0.1482, 0.0726),
]


def resnet50() -> dict[str, tuple[tuple[int, ...], tuple[float, float]]]:
    layers = {}
    for dims, count, *densities in RESNET50:
        shape = (dims[3], dims[2], dims[0], dims[1]) if len(dims) == 4 else (dims[1], dims[0])
        for i in range(count):
            layers[f"{dims}#{i}"] = (shape, tuple(densities))
    return layers


@pytest.mark.parametrize(
    ("column", "target", "total", "capped"), [(0, 0.8, 5_100_630, 8), (1, 0.9, 2_550_353, 1)]
)
def test_resnet50_erk(column: int, target: float, total: int, capped: int) -> None:
    layers = resnet50()
    shapes = {name: shape for name, (shape, _) in layers.items()}
    assert sum(map(math.prod, shapes.values())) == 25_502_912
    plan = distribute(shapes, target, "erk")
    for name, (_, densities) in layers.items():
        assert 1 - plan[name] == pytest.approx(densities[column], abs=6e-5), name
    assert sum(s == 0.0 for s in plan.values()) == capped
    assert sum(nnz(shapes, plan).values()) == total


@pytest.mark.parametrize(("target", "total", "true"), [(0.8, 5_108_133, 0.79970), (0.9, 2_558_785, 0.89967)])
def test_resnet50_uniform_first_layer_dense(target: float, total: int, true: float) -> None:
    shapes = {name: shape for name, (shape, _) in resnet50().items()}
    plan = distribute(shapes, target, "uniform", dense=[next(iter(shapes))])
    stored = sum(nnz(shapes, plan).values())
    assert stored == total
    assert 1 - stored / 25_502_912 == pytest.approx(true, abs=5e-6)


def test_dense_and_custom_have_no_part_in_the_budget() -> None:
    rest = {name: FOUR[name] for name in ("a", "c")}
    alone = distribute(rest, 0.8, "erk")
    plan = distribute(FOUR, 0.8, "erk", dense=["b"], custom={"d": 0.25})
    assert plan == {"a": alone["a"], "b": 0.0, "c": alone["c"], "d": 0.25}


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_extremes(distribution: str) -> None:
    assert list(distribute(FOUR, 0.0, distribution).values()) == pytest.approx([0.0] * 4, abs=1e-12)
    plan = distribute(FOUR, 0.999, distribution)
    stored = sum(nnz(FOUR, plan).values())
    target = sum(n - zero_count(n, 0.999) for n in map(math.prod, FOUR.values()))
    assert target <= stored <= target + len(FOUR)
    assert distribute({}, 0.5, distribution) == {}
    assert distribute({"empty": (0, 4)}, 0.5, "erk") == {"empty": 0.0}


@pytest.mark.parametrize(
    ("total", "sparsity", "zeros"), [(1000, 0.9, 900), (640, 0.8, 512), (7, 0.5, 3), (3, 0.1, 0)]
)
def test_zeros_are_floored_but_not_by_float_error(total: int, sparsity: float, zeros: int) -> None:
    assert zero_count(total, sparsity) == zeros


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\).*got 1.0"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": math.nan}, "sparsity"),
        ({"distribution": "er-k"}, "uniform, er, erk"),
        ({"custom": {"z": 0.5}}, "no layer is called 'z'; the layers are a, b, c, d"),
        ({"dense": ["z"]}, "no layer is called 'z'"),
        ({"custom": {"a": 1.0}}, "custom sparsity of 'a'"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distribute(FOUR, **{"sparsity": 0.8, "distribution": "erk", **kwargs})
