"""The roofline model of `bench` against the figures that the kernels were designed by."""

from __future__ import annotations

import math

import pytest

from bench import roofline
from bench.roofline import Product

H200 = roofline.device_for("NVIDIA H200")


def product(density: float, block: int, **changes: int) -> Product:
    sizes = {"tokens": 8192, "inputs": 4096, "outputs": 4096, "b_out": block, "b_in": block, **changes}
    return Product(**sizes, density=density)


# density, block -> microseconds: floor and plan of Y, floor and plan of dW; speed-up of the whole step.
PLANS = {
    (0.2, 128): (95, 109, 88, 103, 3.3),
    (0.2, 32): (185, 211, 260, 296, 1.5),
    (0.1, 128): (52, 61, 44, 54, 5.9),
    (0.1, 64): (81, 93, 73, 86, 3.8),
    (0.1, 16): (154, 176, 244, 279, 1.7),
    (0.05, 64): (45, 53, 36, 46, 6.9),
    (0.05, 32): (72, 83, 65, 78, 4.3),
}


@pytest.mark.parametrize(("density", "block"), list(PLANS))
def test_floors_and_plans_of_the_design(density: float, block: int) -> None:
    p = product(density, block)
    y, dw = roofline.spmm(p, H200), roofline.sddmm(p, H200)
    found = [1e6 * seconds for seconds in (y.seconds, y.plan, dw.seconds, dw.plan)]
    assert [math.floor(us + 0.5) for us in found] == pytest.approx(PLANS[density, block][:4], abs=1)
    speedup = 3 * roofline.gemm(p, H200).seconds / roofline.step_plan(p, H200)
    assert speedup == pytest.approx(PLANS[density, block][4], abs=0.06)


def test_what_binds() -> None:
    assert roofline.spmm(product(0.1, 64), H200).bound == "l2"
    assert roofline.spmm(product(0.05, 128), H200).bound == "dram"
    assert roofline.gemm(product(1.0, 64), H200).bound == "tensor"
    assert roofline.densify(product(1.0, 64), H200).seconds == pytest.approx(7.8e-6, rel=0.01)
    # A slower L2 makes slower products, and a slower DRAM slower scatters.
    slow = roofline.Device("slow", l2=5.5e12, dram=2e12)
    p = product(0.1, 64)
    assert roofline.spmm(p, slow).seconds == pytest.approx(roofline.spmm(p, H200).seconds * 7.5 / 5.5)
    assert roofline.densify(p, slow).seconds > roofline.densify(p, H200).seconds


def test_the_input_gradient_has_the_sides_of_a_block_exchanged() -> None:
    p = product(0.1, 128, b_in=32, inputs=1024)
    assert p.transposed.transposed == p
    assert (p.transposed.b_out, p.transposed.inputs) == (32, 4096)
    assert p.transposed.flops == p.flops
    assert roofline.spmm_gather(p.transposed, H200).seconds > roofline.spmm_gather(p, H200).seconds
    parts = [roofline.spmm(p, H200), roofline.spmm(p.transposed, H200), roofline.sddmm(p, H200)]
    assert roofline.step(p, H200) == pytest.approx(sum(part.seconds for part in parts))


def test_an_unknown_device_gets_the_constants_of_the_first() -> None:
    assert roofline.device_for("NVIDIA H100 80GB HBM3").dram < H200.dram
    assert roofline.device_for("something else") is H200
    assert H200.scaled("float32").dense == H200.dense / 2
    assert H200.scaled("float16") == H200
