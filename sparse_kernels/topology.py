"""`Topology`: the index arrays of one sparse weight, rebuilt in place at every update.

A weight of shape `[out, in]` (Linear) or `[out, in/groups, kh, kw]` (Conv2d) is seen as a grid of
`rows x cols` blocks: `rows = out / b_out`, `cols = (in / b_in) * kh * kw`, in the order of the dense
weight's memory. With `block_size = (1, 1)` that grid is the weight itself, and a *position*
(`row * cols + col`) is the flat index into it. Stored are CSR arrays over that grid for the products
that run along rows (forward, weight gradient) and their transpose for the input gradient.

All arrays are views of one int32 tensor, `index`. An update builds a complete new one on the side,
checks it, and copies it over in a single `copy_`: addresses never change, and an error anywhere
leaves the old topology intact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _ops
from .positions import active_count, check_integers, draw_positions, fitting_blocks, normalize_block_size

INT32_MAX = 2**31 - 1


class Topology:
    """Which positions of one weight are active, as int32 index arrays in both directions.

    Attributes:
        shape: shape of the dense weight, `(out, in)` or `(out, in/groups, kh, kw)`.
        block_size: `(b_out, b_in)`; `(1, 1)` is CSR, anything else BSR.
        groups: convolution groups (1 for Linear).
        rows, cols: the block grid.
        n_blocks: active positions (blocks). Constant for the topology's whole life.
        index: `[*]` int32, the one buffer behind the arrays below.
        row_ptr: `[rows + 1]`; the positions of row r are `row_ptr[r]:row_ptr[r+1]`.
        col_idx: `[n_blocks]`; the column of each position, ascending within a row.
        col_ptr: `[groups * cols + 1]`; the same by columns (each group has its own columns).
    """

    def __init__(
        self,
        positions: Tensor,
        shape: tuple[int, ...],
        block_size: int | tuple[int, int] = 1,
        groups: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        """Build from flat positions of the block grid.

        Args:
            positions: `[n_blocks]` int64, distinct, any order, each in `[0, rows * cols)`.
            shape: shape of the dense weight.
            block_size: `b` or `(b_out, b_in)`.
            groups: convolution groups.
            device: where the arrays live (default: where `positions` lives). For "meta" they live on the CPU:
                a pattern cannot be left out, and it is small beside the weight.

        Raises:
            ValueError: a block that does not divide its dimension (the message names those that
                do), positions out of range or repeated, sizes beyond int32.
            TypeError: `positions` not an integer tensor.
        """
        self._set_geometry(shape, block_size, groups)
        check_integers("positions", positions)
        device = torch.device(device) if device is not None else positions.device
        if device.type == "meta":
            device = torch.device("cpu")
        flat = positions.detach().to("cpu", torch.int64).flatten().sort().values
        self._check_positions(flat)
        self.n_blocks = flat.numel()
        self._bind(self._build(flat).to(device))

    # construction ---------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        shape: tuple[int, ...],
        density: float,
        block_size: int | tuple[int, int] = 1,
        groups: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Topology:
        """`active_count(N, density)` of the N positions, uniformly at random, exactly."""
        blank = cls.__new__(cls)
        blank._set_geometry(shape, block_size, groups)
        total = blank.rows * blank.cols
        count = active_count(total, density)
        cls._check_count(count)
        positions = draw_positions(total, count, generator)
        return cls(positions, shape, block_size, groups, device)

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int | tuple[int, int] = 1, groups: int = 1) -> Topology:
        """From a bool tensor of the dense weight's shape. A block is active if any of its entries is."""
        blank = cls.__new__(cls)
        blank._set_geometry(tuple(mask.shape), block_size, groups)
        blocks = blank.to_blocks(mask != 0).flatten(2).any(-1)
        return cls(blocks.flatten().nonzero().flatten(), tuple(mask.shape), block_size, groups)

    def _set_geometry(self, shape: tuple[int, ...], block_size: int | tuple[int, int], groups: int) -> None:
        shape = tuple(int(n) for n in shape)
        if len(shape) not in (2, 4) or any(n < 0 for n in shape):
            raise ValueError(
                f"shape must be (out, in) or (out, in/groups, kh, kw) with sizes >= 0, got {shape}"
            )
        self.shape = shape
        self.block_size = b_out, b_in = normalize_block_size(block_size)
        if groups < 1 or shape[0] % groups:
            raise ValueError(f"groups must divide out = {shape[0]}, got {groups}")
        self.groups = groups
        extents = {"out": shape[0] // groups, "in": shape[1]}
        for (name, extent), block in zip(extents.items(), self.block_size, strict=True):
            per = " per group" if groups > 1 else ""
            if extent % block:
                common = math.gcd(*extents.values()) if b_out == b_in else extent
                raise ValueError(
                    f"block size {block} does not divide the {name} dimension {extent}{per}; "
                    f"sizes that fit: {fitting_blocks(common)}"
                )
        taps = shape[2] * shape[3] if len(shape) == 4 else 1
        self.rows, self.cols = shape[0] // b_out, shape[1] // b_in * taps
        self.taps = taps
        if max(self.rows, self.cols * groups) >= INT32_MAX:
            raise ValueError(
                f"the block grid {self.rows} x {self.cols} exceeds the int32 index range (2^31 - 2 a side)"
            )

    @staticmethod
    def _check_count(count: int) -> None:
        if count > INT32_MAX:
            raise ValueError(f"{count} active positions exceed the int32 index range (2^31 - 1)")

    def _check_positions(self, flat: Tensor) -> None:
        """`flat`: sorted int64 positions on the CPU."""
        self._check_count(flat.numel())
        if flat.numel() == 0:
            return
        low, high, total = int(flat[0]), int(flat[-1]), self.rows * self.cols
        if low < 0 or high >= total:
            bad = low if low < 0 else high
            raise ValueError(f"position {bad} is out of range [0, {total})")
        repeated = (flat[1:] == flat[:-1]).nonzero()
        if repeated.numel():
            raise ValueError(f"position {int(flat[repeated[0, 0]])} occurs more than once")

    def _build(self, flat: Tensor) -> Tensor:
        return _ops.index_build(flat, self.rows, self.cols, self.groups, self._plans)

    @property
    def _plans(self) -> int:
        """Which schedules of the CSR CPU kernels `index` carries behind the arrays (csrc/common/index.h)."""
        if self.block_size != (1, 1):
            return 0
        return 2 if len(self.shape) == 2 else 1

    def _bind(self, index: Tensor) -> None:
        self.index = index
        sizes = self._sizes()
        self.row_ptr, self.col_idx, self.col_ptr, *self._transpose = index[: sum(sizes.values())].split(
            list(sizes.values())
        )

    def _sizes(self) -> dict[str, int]:
        """The arrays at the front of `index`, in order (csrc/common/index.h)."""
        n = self.n_blocks
        sizes = {"row_ptr": self.rows + 1, "col_idx": n, "col_ptr": self.groups * self.cols + 1}
        return sizes if self._plans == 2 else {**sizes, "row_idx": n, "perm": n}

    @property
    def row_idx(self) -> Tensor:
        """`[n_blocks]` int32: the row of each position in column order, ascending within a column.

        This and `perm` are computed here for CSR weights of a Linear, whose kernels have no use for them.
        """
        if self._transpose:
            return self._transpose[0]
        rows = torch.arange(self.rows, dtype=torch.int32, device=self.device)
        return rows.repeat_interleave(self.row_ptr.diff(), output_size=self.n_blocks)[self.perm]

    @property
    def perm(self) -> Tensor:
        """`[n_blocks]` int32: where the value of each position in column order stands in row order."""
        return self._transpose[1] if self._transpose else self.col_idx.argsort(stable=True).int()

    # size and place -------------------------------------------------------------------------

    @property
    def block_numel(self) -> int:
        """Weights in a block."""
        return self.block_size[0] * self.block_size[1]

    @property
    def nnz(self) -> int:
        """Active weights (blocks times their size)."""
        return self.n_blocks * self.block_numel

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the values: `(nnz,)` for CSR, `(n_blocks, b_out, b_in)` for BSR."""
        return (self.n_blocks,) if self.block_size == (1, 1) else (self.n_blocks, *self.block_size)

    @property
    def density(self) -> float:
        """Active fraction of all positions."""
        total = self.rows * self.cols
        return self.n_blocks / total if total else 0.0

    @property
    def device(self) -> torch.device:
        """Where the index arrays live."""
        return self.index.device

    def to(self, device: torch.device | str) -> Topology:
        """This topology if it is on `device` (or that is "meta"), else a copy there."""
        if torch.device(device) == self.device or torch.device(device).type == "meta":
            return self
        return self.clone(device)

    def clone(self, device: torch.device | str | None = None) -> Topology:
        """A copy with memory of its own, on `device` (default: the same)."""
        other = Topology.__new__(Topology)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if not isinstance(v, Tensor)})
        other._bind(self.index.to(device or self.device, copy=True))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Topology:
        return self.clone()

    def __getstate__(self) -> dict[str, Any]:
        # Only what defines the topology: the rest is rebuilt (and so checked) by __setstate__.
        return {
            "shape": self.shape,
            "block_size": self.block_size,
            "groups": self.groups,
            "row_ptr": self.row_ptr.cpu().clone(),
            "col_idx": self.col_idx.cpu().clone(),
            "device": str(self.device),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_geometry(state["shape"], state["block_size"], state["groups"])
        self.n_blocks = state["col_idx"].numel()
        flat = self.check_arrays(state["row_ptr"], state["col_idx"])
        self._bind(self._build(flat).to(state["device"]))

    def __repr__(self) -> str:
        kind = "CSR" if self.block_size == (1, 1) else f"BSR {self.block_size[0]}x{self.block_size[1]}"
        return f"Topology({kind}, shape={self.shape}, nnz={self.nnz}, density={self.density:.4g})"

    # contents -------------------------------------------------------------------------------

    def positions(self) -> Tensor:
        """`[n_blocks]` int64: the flat position of every active block, ascending (= value order)."""
        counts = self.row_ptr.diff().long()
        rows = torch.arange(self.rows, device=self.device).repeat_interleave(
            counts, output_size=self.n_blocks
        )
        return rows * self.cols + self.col_idx

    def mask(self) -> Tensor:
        """Bool tensor of the dense weight's shape (allocates the dense size)."""
        ones = torch.ones(self.n_blocks, *self.block_size, dtype=torch.bool, device=self.device)
        return self.to_dense(ones)

    def to_blocks(self, dense: Tensor) -> Tensor:
        """Dense weight -> `[rows, cols, b_out, b_in]` (a copy unless the block is 1x1)."""
        b_out, b_in = self.block_size
        out, inner = self.shape[0] // b_out, self.shape[1] // b_in
        parts = dense.reshape(out, b_out, inner, b_in, self.taps)
        return parts.permute(0, 2, 4, 1, 3).reshape(self.rows, self.cols, b_out, b_in)

    def to_dense(self, values: Tensor) -> Tensor:
        """Values (`[nnz]` or `[n_blocks, b_out, b_in]`) -> dense weight, zeros elsewhere. Differentiable."""
        b_out, b_in = self.block_size
        blocks = values.reshape(self.n_blocks, b_out, b_in)
        grid = blocks.new_zeros(self.rows * self.cols, b_out, b_in).index_put((self.positions(),), blocks)
        inner = self.shape[1] // b_in
        parts = grid.reshape(self.shape[0] // b_out, inner, self.taps, b_out, b_in)
        return parts.permute(0, 3, 1, 4, 2).reshape(self.shape).contiguous()

    def gather(self, dense: Tensor) -> Tensor:
        """Dense weight -> the values at the active positions, `[nnz]` or `[n_blocks, b_out, b_in]`."""
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"expected a dense weight of shape {self.shape}, got {tuple(dense.shape)}")
        blocks = self.to_blocks(dense).flatten(0, 1)[self.positions()]
        return blocks.flatten() if self.block_size == (1, 1) else blocks

    # changes --------------------------------------------------------------------------------

    def update_(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop some active positions and add as many others, in place. O(nnz + k log k).

        Args:
            drop: `[k]` int64, distinct indices into the value order (`0 <= i < n_blocks`).
            grow: `[k]` int64, distinct flat positions that are not active after the drop (a
                position dropped by the same call may be grown again: it then counts as new).

        Returns:
            source: `[n_blocks]` int64 on the topology's device: for each place in the new value
            order the place its value had before, or -1 where the position is new. Use
            `reorder_(tensor, source)` to bring values and optimizer state along.

        Raises:
            ValueError: out of range, repeated or already active positions, or `drop` and `grow` of
                different lengths. The topology is unchanged then.
            TypeError: not integer tensors.
        """
        for name, t in (("drop", drop), ("grow", grow)):
            check_integers(name, t)
        drop, grow = (t.detach().to("cpu", torch.int64).flatten() for t in (drop, grow))
        if drop.numel() != grow.numel():
            raise ValueError(
                "drop and grow must have the same length (nnz is constant), "
                f"got {drop.numel()} and {grow.numel()}"
            )
        try:
            index, source = _ops.index_update(
                self.index.cpu(),
                self.n_blocks,
                self.rows,
                self.cols,
                self.groups,
                self._plans,
                drop.sort().values,
                grow.sort().values,
            )
        except RuntimeError as error:
            # What the operator's checks found; the text before it is their place in the source.
            raise ValueError(str(error).splitlines()[0].split(", ", 2)[-1]) from None
        self.index.copy_(index)
        return source.to(self.device)

    def load_arrays_(self, row_ptr: Tensor, col_idx: Tensor) -> None:
        """Replace the contents by other CSR arrays with the same number of positions, in place.

        Raises:
            ValueError, TypeError: arrays that are not a valid topology of this shape and count.
                The topology is unchanged then.
        """
        self.index.copy_(self.build(row_ptr, col_idx))

    def build(self, row_ptr: Tensor, col_idx: Tensor) -> Tensor:
        """What `index` is for other CSR arrays; arguments and errors as in `load_arrays_`."""
        return self._build(self.check_arrays(row_ptr, col_idx))

    def check_arrays(self, row_ptr: Tensor, col_idx: Tensor) -> Tensor:
        """Check foreign CSR arrays against this shape and count; return their positions (int64, CPU)."""
        for name, t, size in (
            ("row_ptr", row_ptr, self.rows + 1),
            ("col_idx", col_idx, self.n_blocks),
        ):
            check_integers(name, t)
            if tuple(t.shape) != (size,):
                raise ValueError(f"{name} must have shape ({size},), got {tuple(t.shape)}")
        ptr, cols = row_ptr.detach().cpu().long(), col_idx.detach().cpu().long()
        if int(ptr[0]) != 0 or int(ptr[-1]) != self.n_blocks:
            raise ValueError(
                f"row_ptr must run from 0 to {self.n_blocks}, got {int(ptr[0])} to {int(ptr[-1])}"
            )
        counts = ptr.diff()
        if counts.numel() and int(counts.min()) < 0:
            raise ValueError(f"row_ptr must not decrease, but does at row {int(counts.argmin())}")
        if cols.numel() and (int(cols.min()) < 0 or int(cols.max()) >= self.cols):
            bad = int(cols.min()) if int(cols.min()) < 0 else int(cols.max())
            raise ValueError(f"col_idx holds {bad}, out of range [0, {self.cols})")
        rows = torch.arange(self.rows, device="cpu").repeat_interleave(counts)
        flat = rows * self.cols + cols
        if flat.numel() > 1 and not bool((flat[1:] > flat[:-1]).all()):
            at = int((flat[1:] <= flat[:-1]).nonzero()[0, 0]) + 1
            raise ValueError(
                f"col_idx must ascend strictly within a row, but not at entry {at} (row {int(rows[at])}): "
                "a repeated or unsorted column"
            )
        return flat

    def validate(self) -> None:
        """Check every invariant (O(nnz), synchronises). Raises ValueError naming the first broken array."""
        flat = self.check_arrays(self.row_ptr, self.col_idx)
        fresh = self._build(flat)
        old = self.index.cpu()
        if not torch.equal(fresh, old):
            at = int((fresh != old).nonzero()[0, 0])
            edge = 0
            for name, size in self._sizes().items():
                edge += size
                if at < edge:
                    raise ValueError(f"{name} is not the one that row_ptr and col_idx imply")
            raise ValueError("the kernel schedule is not the one that row_ptr and col_idx imply")


def reorder_(tensor: Tensor, source: Tensor) -> Tensor:
    """Bring a tensor in value order along an update, in place: `tensor[i] = old[source[i]]`, 0 where new.

    Args:
        tensor: `[nnz]` or `[n_blocks, ...]`: values, a gradient, or an optimizer's state.
        source: what `Topology.update_` returned.
    """
    if tensor.shape[:1] != source.shape:
        raise ValueError(
            f"expected {source.numel()} entries along dimension 0, got shape {tuple(tensor.shape)}"
        )
    source = source.to(tensor.device)
    with torch.no_grad():
        moved = tensor.index_select(0, source.clamp_min(0))
        moved[source < 0] = 0
        tensor.copy_(moved)
    return tensor
