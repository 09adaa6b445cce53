"""Random shapes against a float64 oracle, and exact integers (drills D01 and D02)."""

from __future__ import annotations

import kernel_cases as kc
import pytest
import torch

from sparse_kernels import testing

KINDS = list(kc.KINDS)
BACKENDS = ["cpu", "dense"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_stay_within_the_componentwise_bound(kind, dtype, backend):
    cases = kc.cases(kind, dtype, 300)
    failures = [f for case in cases for f in kc.check_bounds(case, kc.run(case, backend))]
    assert not failures, kc.report(failures)


@pytest.mark.parametrize("kind", KINDS)
def test_the_automatic_choice_is_as_exact(kind):
    failures = [
        f
        for case in kc.cases(kind, torch.float32, 100, 1000)
        for f in kc.check_bounds(case, kc.run(case, "auto"))
    ]
    assert not failures, kc.report(failures)


@pytest.mark.parametrize("dtype", testing.REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reduced_precision_is_within_twice_the_error_of_dense(kind, dtype):
    failures = []
    for case in kc.cases(kind, dtype, 300):
        ours, dense = kc.run(case), kc.dense_run(case)
        for key, exact in kc.oracle(case)[0].items():
            if exact.numel() == 0:
                continue
            assert ours[key].dtype == dtype
            error, theirs = ((r[key].double() - exact).abs().max().item() for r in (ours, dense))
            ulp = torch.finfo(dtype).eps * exact.abs().max().item()
            if not error <= max(2 * theirs, ulp):
                failures.append(f"{case.name}: {key} error {error:.3g}, dense {theirs:.3g}, 1 ulp {ulp:.3g}")
    assert not failures, kc.report(failures)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_small_integers_are_exact(kind, dtype, backend):
    failures = [
        f
        for case in kc.cases(kind, dtype, 500, integers=True)
        for f in kc.check_exact(case, kc.run(case, backend))
    ]
    assert not failures, kc.report(failures)


def test_the_bound_has_teeth():
    """Two rows of zeros in a 1024 x 1024 output, one wrong entry, one NaN: all must be seen."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1024, 1024, generator=generator, dtype=torch.float64)
    magnitude = exact.abs() * 30
    testing.assert_componentwise(exact.float(), exact, magnitude)
    for spoil in (
        lambda t: t[17:19].zero_(),
        lambda t: t[5, 7].add_(1e-3),
        lambda t: t[-1, -1].fill_(torch.nan),
    ):
        wrong = exact.float()
        spoil(wrong)
        with pytest.raises(AssertionError, match="entries beyond"):
            testing.assert_componentwise(wrong, exact, magnitude)
