"""How fast a block-sparse product can be on one GPU: floors from tensor cores, L2, shared memory and DRAM.

A model, not a measurement. Each kernel has up to four times, the largest of which is its floor:

* tensor: useful multiply-adds at the rate that the dense library reaches, or at what the shape of the
  instruction allows, if that is less;
* l2: bytes that all programs fetch from L2 into shared memory;
* shared: traffic at the port of shared memory: what TMA writes and what wgmma reads;
* dram: activations, weights and results, once.

`python -m bench.roofline --tokens 8192 --inputs 4096 --outputs 4096` prints the floors. With the L2 bandwidth
that `python -m bench.gpu --first-hour` measures: `--l2 6.5`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

SLACK, LAUNCH = 1.12, 3e-6  # a plan is SLACK * floor + LAUNCH: pipeline fill, tail, launch in a CUDA graph
REDUCTION = 2e-6  # of the split weight gradient: one more kernel
WGMMA_ROWS = 64


@dataclass(frozen=True)
class Device:
    """Constants of a GPU. Rates in operations per second, bandwidths in bytes per second.

    Attributes:
        name: as in `torch.cuda.get_device_name()`, or part of it.
        peak: tensor cores, 16-bit operands.
        dense: what the dense library reaches of it in a large product.
        l2: from L2 into shared memory, all multiprocessors together.
        dram: reached in a copy.
        processors, clock: multiprocessors and their frequency under load, Hz.
    """

    name: str
    peak: float = 989e12
    dense: float = 790e12
    l2: float = 7.5e12
    dram: float = 4.3e12
    processors: int = 132
    clock: float = 1.755e9

    @property
    def shared(self) -> float:
        """Shared memory: 128 bytes a clock and multiprocessor."""
        return 128 * self.processors * self.clock

    def scaled(self, dtype: str) -> Device:
        """For another dtype: tf32 (what float32 means on tensor cores) has half the rates of 16 bits."""
        return replace(self, peak=self.peak / 2, dense=self.dense / 2) if dtype == "float32" else self


DEVICES = (Device("H200"), Device("H100", dram=3.0e12))


def device_for(name: str) -> Device:
    """Constants for a name that torch reports; those of the H200 for a device that is not in the table."""
    return next((d for d in DEVICES if d.name in name), DEVICES[0])


@dataclass(frozen=True)
class Product:
    """One block-sparse weight and a batch.

    Attributes:
        tokens, inputs, outputs: X is `[tokens, inputs]`, Y is `[tokens, outputs]`.
        b_out, b_in: sides of a block.
        density: fraction of active blocks.
        size: bytes of a number.
    """

    tokens: int
    inputs: int
    outputs: int
    b_out: int
    b_in: int
    density: float
    size: int = 2

    @property
    def positions(self) -> int:
        """Blocks of the grid."""
        return (self.outputs // self.b_out) * (self.inputs // self.b_in)

    @property
    def blocks(self) -> float:
        """Active blocks."""
        return self.density * self.positions

    @property
    def flops(self) -> float:
        """Useful operations of one of the three products."""
        return 2 * self.tokens * self.blocks * self.b_out * self.b_in

    @property
    def transposed(self) -> Product:
        """The same for the input gradient, whose outputs are the inputs."""
        return replace(self, inputs=self.outputs, outputs=self.inputs, b_out=self.b_in, b_in=self.b_out)

    @property
    def bytes(self) -> float:
        """X, Y and the active values, once."""
        weights = self.density * self.outputs * self.inputs
        return self.size * (self.tokens * (self.inputs + self.outputs) + weights)


@dataclass(frozen=True)
class Floor:
    """Seconds that a kernel needs at least, and why.

    Attributes:
        times: name of the limit -> seconds.
        overhead: what a plan adds to the slack.
    """

    times: dict[str, float]
    overhead: float = LAUNCH

    @property
    def seconds(self) -> float:
        """The largest."""
        return max(self.times.values())

    @property
    def bound(self) -> str:
        """Which one it is."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def plan(self) -> float:
        """What a good kernel takes, in seconds."""
        return SLACK * self.seconds + self.overhead


def issue_share(n: int, size: int = 2) -> float:
    """Share of the peak at which wgmma m64nN can read its operands from shared memory."""
    k = 32 // size  # of one instruction
    clocks = n / 2  # 64 * n * k multiply-adds at 2048 a clock, for 16 bits
    reads = size * k * (WGMMA_ROWS + n) / 128
    return min(1.0, clocks / reads)


def spmm_gather(p: Product, device: Device, tile: int = 256) -> Floor:
    """Y: a program has one row of blocks and `tile` tokens, and gathers the columns of X that it needs."""
    visits = p.blocks * p.tokens / tile
    operands = p.size * (tile * p.b_in + p.b_out * p.b_in)
    l2 = visits * operands + p.size * p.tokens * p.outputs
    wide = p.b_out >= WGMMA_ROWS  # blocks on the M side, tokens on the N side
    instructions = (p.b_out if wide else tile) / WGMMA_ROWS
    n = tile if wide else p.b_out
    reads = p.size * p.b_in * instructions * (WGMMA_ROWS + n)
    rate = min(device.dense, device.peak * issue_share(min(n, 256), p.size))
    shared = visits * (reads + operands)
    return Floor(
        {
            "tensor": p.flops / rate,
            "l2": l2 / device.l2,
            "shared": shared / device.shared,
            "dram": p.bytes / device.dram,
        }
    )


def spmm_stream(p: Product, device: Device, tokens: int = 128, outputs: int = 256) -> Floor:
    """Y: a program has several rows of blocks, and streams every column of X that any of them needs once."""
    rows = outputs // p.b_out
    needed = 1 - (1 - p.density) ** rows
    programs = (p.tokens / tokens) * (p.outputs / outputs)
    filled = programs * p.size * p.inputs * (tokens * needed + outputs * p.density)
    visits = programs * rows * (p.inputs / p.b_in) * p.density
    reads = visits * p.size * p.b_in * (tokens / WGMMA_ROWS) * (WGMMA_ROWS + p.b_out)
    rate = min(device.dense, device.peak * issue_share(p.b_out, p.size))
    return Floor(
        {
            "tensor": p.flops / rate,
            "l2": (filled + p.size * p.tokens * p.outputs) / device.l2,
            "shared": (reads + filled) / device.shared,
            "dram": p.bytes / device.dram,
        }
    )


def spmm(p: Product, device: Device) -> Floor:
    """Y, by the better of the two; streaming is for blocks that are small against a tile of 256 outputs."""
    found = [spmm_gather(p, device)]
    if p.b_out <= 64:
        found.append(spmm_stream(p, device))
    return min(found, key=lambda floor: floor.seconds)


def sddmm(p: Product, device: Device, columns: int = 256) -> Floor:
    """dW: a program has blocks of one row, `columns` wide together, and one tile of dY for all of them."""
    group = max(1, columns // p.b_in)
    l2 = p.blocks * p.tokens * p.size * (p.b_in + p.b_out / group) + p.blocks * p.b_out * p.b_in * 4
    # Below 64 rows on the M side there is only the older mma.sync, at about 60 % of the rate.
    rate = device.dense if p.b_out >= WGMMA_ROWS else 0.6 * device.dense
    dram = p.size * p.tokens * (p.inputs + p.outputs)
    times = {"tensor": p.flops / rate, "l2": l2 / device.l2, "dram": dram / device.dram}
    return Floor(times, LAUNCH + REDUCTION)


def gemm(p: Product, device: Device) -> Floor:
    """The dense product, at the rate that the dense library reaches."""
    flops = 2 * p.tokens * p.inputs * p.outputs
    moved = p.size * (p.tokens * (p.inputs + p.outputs) + p.inputs * p.outputs)
    return Floor({"tensor": flops / device.dense, "dram": moved / device.dram})


def growth(p: Product, device: Device) -> Floor:
    """Scores of all blocks: the dense weight gradient, of which only norms are written."""
    flops = 2 * p.tokens * p.inputs * p.outputs
    moved = p.size * p.tokens * (p.inputs + p.outputs) + 4 * p.positions
    return Floor({"tensor": flops / device.dense, "dram": moved / device.dram})


def densify(p: Product, device: Device) -> Floor:
    """Values into a dense scratch, whose writes count."""
    return Floor({"dram": p.size * p.inputs * p.outputs / device.dram})


def update(p: Product, device: Device, kernels: int = 15) -> Floor:
    """A topology update: values read for their norms, scores of all blocks, lists, each a few times."""
    values = p.size * p.density * p.inputs * p.outputs
    moved = values + 4 * (4 * p.positions + 16 * p.blocks)
    return Floor({"dram": moved / device.dram}, overhead=kernels * LAUNCH)


def step(p: Product, device: Device) -> float:
    """Floor in seconds of Y, dX and dW together."""
    parts = (spmm(p, device), spmm(p.transposed, device), sddmm(p, device))
    return sum(floor.seconds for floor in parts)


def step_plan(p: Product, device: Device) -> float:
    """What a good layer takes for the three, going through the dense library where that is faster."""
    dense, scatter = gemm(p, device).seconds, densify(p, device).seconds
    plans = [min(f.plan, dense + scatter) for f in (spmm(p, device), spmm(p.transposed, device))]
    return sum(plans) + min(sddmm(p, device).plan, 1.03 * dense)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--device", default="H200", choices=[d.name for d in DEVICES])
    parser.add_argument("--l2", type=float, help="TB/s from L2 into shared memory")
    a = parser.parse_args()
    device = device_for(a.device)
    if a.l2:
        device = replace(device, l2=a.l2 * 1e12)
    whole = Product(a.tokens, a.inputs, a.outputs, 64, 64, 1.0)
    dense = gemm(whole, device).seconds
    print(f"{device.name}: dense {dense * 1e6:.0f} us a product, L2 {device.l2 / 1e12:.1f} TB/s")
    print("sparsity  block |  Y floor us         plan  speed-up |  dW floor us       plan  speed-up |  step")
    for density in (0.2, 0.1, 0.05):
        for b in (128, 64, 32, 16):
            p = replace(whole, b_out=b, b_in=b, density=density)
            y, dw = spmm(p, device), sddmm(p, device)
            cells = [
                f"{f.seconds * 1e6:7.1f} ({f.bound:6}) {f.plan * 1e6:7.1f} {dense / f.plan:8.2f}x"
                for f in (y, dw)
            ]
            whole_step = 3 * dense / step_plan(p, device)
            print(f"{1 - density:8.0%} {b:6d} | {cells[0]} | {cells[1]} | {whole_step:4.1f}x")


if __name__ == "__main__":
    main()
