"""`Topology`: the index arrays of one sparse weight, rebuilt in place at every update.

A weight of shape `[out, in]` (Linear) or `[out, in/groups, kh, kw]` (Conv2d) is seen as a grid of
`rows x cols` blocks: `rows = out / b_out`, `cols = (in / b_in) * kh * kw`, in the order of the dense
weight's memory. With `block_size = (1, 1)` that grid is the weight itself, and a *position*
(`row * cols + col`) is the flat index into it. Stored are CSR arrays over that grid for the products
that run along rows (forward, weight gradient) and their transpose for the input gradient.

All arrays are views of one int32 tensor, `index` (layout.py). An update builds a complete new one on the
side, checks it, and copies it over in a single `copy_`: addresses never change, and an error anywhere
leaves the old topology intact.

The values of blocks stand in *slots*: an update on a GPU gives the slots of the blocks that go to those that
come, and moves none. "Value order" is the order of the slots; only after an update on the CPU, and for CSR
weights, is it the order of the positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _ops, cost, layout
from .positions import (
    active_count,
    block_grid,
    check_count,
    check_csr,
    check_integers,
    check_positions,
    check_slot,
    draw_positions,
)

_VIEWS = ("index", "row_ptr", "col_idx", "col_ptr", "slot", "_arrays")  # what `_bind` sets
_OWN = (*_VIEWS, "growth_guess")  # what a copy must not share: it is written to in place


class Topology:
    """Which positions of one weight are active, as int32 index arrays in both directions.

    Attributes:
        shape: shape of the dense weight, `(out, in)` or `(out, in/groups, kh, kw)`.
        block_size: `(b_out, b_in)`; `(1, 1)` is CSR, anything else BSR.
        groups: convolution groups (1 for Linear).
        rows, cols: the block grid.
        n_blocks: active positions (blocks). Constant for the topology's whole life.
        values_shape: shape of the values: `(nnz,)` for CSR, `(n_blocks, b_out, b_in)` for BSR.
        index: `[*]` int32, the one buffer behind the arrays below.
        row_ptr: `[rows + 1]`; the positions of row r are `row_ptr[r]:row_ptr[r+1]`.
        col_idx: `[n_blocks]`; the column of each position, ascending within a row.
        col_ptr: `[groups * cols + 1]`; the same by columns (each group has its own columns).
        slot: `[n_blocks]`; where each block in row order has its values. None for CSR.
    """

    growth_guess: Tensor | None = None  # a score that the best inactive weights may reach (growth.py)
    _gpu = False  # whether `index` is laid out as on a GPU

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
        check_count(flat.numel())
        check_positions(flat, self.rows * self.cols)
        self.n_blocks = flat.numel()
        self._gpu = device.type == "cuda"
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
        check_count(count)
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
        grid = block_grid(shape, block_size, groups)
        self.shape, self.block_size, self.groups = grid.shape, grid.block_size, groups
        self.rows, self.cols, self.taps = grid.rows, grid.cols, grid.taps

    def _build(self, flat: Tensor, slot: Tensor | None = None) -> Tensor:
        """A CPU index of sorted positions; `slot`: where their values stand, if not in this order."""
        index = _ops.index_build(flat, self.rows, self.cols, self.groups, self._plans)
        if slot is not None:
            arrays = layout.split(index, *self._grid, gpu=False)
            assert arrays.slot is not None
            assert arrays.perm is not None
            arrays.slot.copy_(slot)
            arrays.perm.copy_(slot[arrays.perm.long()])
        return self._with_tail(index)

    def _with_tail(self, index: Tensor) -> Tensor:
        """The index of a GPU's layout from the part that is the same everywhere."""
        if not (self._gpu and self.is_bsr):
            return index
        arrays = layout.split(index, *self._grid, gpu=False)
        tail = layout.tail(arrays.row_ptr, arrays.col_ptr, self.n_blocks, self.block_size[1])
        return torch.cat([index, *(t.int() for t in tail)])

    @property
    def _tail_size(self) -> int:
        return sum(array.numel() for array in self._arrays[6:] if array is not None)

    @property
    def is_bsr(self) -> bool:
        """Whether the positions are blocks."""
        return self.block_size != (1, 1)

    @property
    def _plans(self) -> int:
        """What `index` holds besides the arrays of every topology (`Plans` in csrc/common/index.h)."""
        if self.is_bsr:
            return 3
        return 0 if self._gpu else 2 if len(self.shape) == 2 else 1

    @property
    def _grid(self) -> tuple[int, int, int, int, bool]:
        return self.n_blocks, self.rows, self.cols, self.groups, self.is_bsr

    def _bind(self, index: Tensor) -> None:
        self.index = index
        self._arrays = layout.split(index, *self._grid, self._gpu, self.block_size[1], self._plans != 2)
        self.row_ptr, self.col_idx, self.col_ptr = self._arrays[:3]
        self.slot = self._arrays.slot
        # What "auto" on the CPU (backend.py) needs to know, and has chosen: updates keep the density.
        kind = "linear" if len(self.shape) == 2 else "conv2d"
        self.may_be_dense = cost.may_pay(kind, self.rows, self.cols, self.n_blocks)
        self.choices: dict[Any, str] = {}
        # A plain attribute, because every product asks for it.
        self.values_shape = (self.n_blocks, *self.block_size) if self.is_bsr else (self.n_blocks,)

    @property
    def row_idx(self) -> Tensor:
        """`[n_blocks]` int32: the row of each position in column order, ascending within a column.

        This and `perm` are computed here for CSR weights of a Linear, whose kernels have no use for them.
        """
        if self._arrays.row_idx is not None:
            return self._arrays.row_idx
        rows = torch.arange(self.rows, dtype=torch.int32, device=self.device)
        return rows.repeat_interleave(self.row_ptr.diff(), output_size=self.n_blocks)[self.perm]

    @property
    def perm(self) -> Tensor:
        """`[n_blocks]` int32: where the value of each position in column order stands."""
        perm = self._arrays.perm
        return self.col_idx.argsort(stable=True).int() if perm is None else perm

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
        device = torch.device(device or self.device)
        return self._copy(device, self._gpu if device == self.device else device.type == "cuda")

    def _with_layout(self, name: str) -> Topology:
        """A copy on the same device, laid out as for the "cpu" or the "gpu": CPU tensors can have both."""
        return self._copy(self.device, name == "gpu")

    def _copy(self, device: torch.device, gpu: bool) -> Topology:
        other = Topology.__new__(Topology)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k not in _OWN})
        other._gpu = gpu
        if gpu == self._gpu:
            index = self.index.to(device, copy=True)
        else:
            index = other._build(*self._contents()).to(device)
        other._bind(index)
        return other

    def _contents(self) -> tuple[Tensor, Tensor | None]:
        """What defines the topology: positions in row order, and slots if there are any. On the CPU."""
        return self.row_positions().cpu(), None if self.slot is None else self.slot.cpu()

    @property
    def _slots_moved(self) -> bool:
        """Whether value order is not the order of the positions. Synchronises with a GPU."""
        slot = self.slot
        return slot is not None and not torch.equal(slot, torch.arange(len(slot), device=slot.device).int())

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
            "slot": None if self.slot is None else self.slot.cpu().clone(),
            "gpu": self._gpu,
            "device": str(self.device),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_geometry(state["shape"], state["block_size"], state["groups"])
        self.n_blocks = state["col_idx"].numel()
        self._gpu = state.get("gpu", False)
        index = self.build(state["row_ptr"], state["col_idx"], state.get("slot"))
        self._bind(index.to(state["device"]))

    def __repr__(self) -> str:
        kind = f"BSR {self.block_size[0]}x{self.block_size[1]}" if self.is_bsr else "CSR"
        return f"Topology({kind}, shape={self.shape}, nnz={self.nnz}, density={self.density:.4g})"

    # contents -------------------------------------------------------------------------------

    def positions(self) -> Tensor:
        """`[n_blocks]` int64: the flat position of every active block, in value order."""
        flat = self.row_positions()
        return flat if self.slot is None else torch.empty_like(flat).scatter_(0, self.slot.long(), flat)

    def row_positions(self) -> Tensor:
        """The same in row order: ascending."""
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
        return blocks if self.is_bsr else blocks.flatten()

    # changes --------------------------------------------------------------------------------

    def update_(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop some active positions and add as many others, in place. O(nnz + k log k), on the CPU.

        Args:
            drop: `[k]` int64, distinct indices into the value order (`0 <= i < n_blocks`).
            grow: `[k]` int64, distinct flat positions that are not active after the drop (a
                position dropped by the same call may be grown again: it then counts as new).

        Returns:
            source: `[n_blocks]` int64 on the topology's device: for each place in the new value
            order the place its value had before, or -1 where the position is new. Use
            `reorder_(tensor, source)` to bring values and optimizer state along. The new value order
            is that of the positions.

        Raises:
            ValueError: out of range, repeated or already active positions, or `drop` and `grow` of
                different lengths. The topology is unchanged then.
            TypeError: not integer tensors.
        """
        index, source = self.updated(drop, grow)
        self.index.copy_(index)
        return source

    def updated(self, drop: Tensor, grow: Tensor) -> tuple[Tensor, Tensor]:
        """What `update_` would write into `index`, and what it would return. Changes nothing."""
        for name, t in (("drop", drop), ("grow", grow)):
            check_integers(name, t)
        drop, grow = (t.detach().to("cpu", torch.int64).flatten().contiguous() for t in (drop, grow))
        if drop.numel() != grow.numel():
            raise ValueError(
                "drop and grow must have the same length (nnz is constant), "
                f"got {drop.numel()} and {grow.numel()}"
            )
        try:
            index, source = _ops.index_update(*self._on_cpu(), drop, grow)
        except RuntimeError as error:
            # What the operator's checks found; the text before it is their place in the source.
            raise ValueError(str(error).splitlines()[0].split(", ", 2)[-1]) from None
        return self._with_tail(index), source.to(self.device)

    def _on_cpu(self) -> tuple[Tensor, int, int, int, int, int]:
        """What the operators of the CPU take for a topology: the index without its tail, and its grid."""
        index = self.index[: self.index.numel() - self._tail_size].cpu()
        return index, self.n_blocks, self.rows, self.cols, self.groups, self._plans

    def load_arrays_(self, row_ptr: Tensor, col_idx: Tensor, slot: Tensor | None = None) -> None:
        """Replace the contents by other CSR arrays with the same number of positions, in place.

        Args:
            row_ptr: `[rows + 1]` integers.
            col_idx: `[n_blocks]` integers, ascending within a row.
            slot: `[n_blocks]` integers, for blocks: a permutation. None: values are in the order of the
                positions.

        Raises:
            ValueError, TypeError: arrays that are not a valid topology of this shape and count.
                The topology is unchanged then.
        """
        self.index.copy_(self.build(row_ptr, col_idx, slot))

    def build(self, row_ptr: Tensor, col_idx: Tensor, slot: Tensor | None = None) -> Tensor:
        """What `index` is for other CSR arrays; arguments and errors as in `load_arrays_`."""
        flat = self.check_arrays(row_ptr, col_idx)
        if slot is not None:
            if not self.is_bsr:
                raise ValueError("slot is for blocks, but these are single weights (CSR): leave it out")
            slot = check_slot(slot, self.n_blocks)
        return self._build(flat, slot)

    def check_arrays(self, row_ptr: Tensor, col_idx: Tensor) -> Tensor:
        """Check foreign CSR arrays against this shape and count; return their positions (int64, CPU)."""
        return check_csr(row_ptr, col_idx, self.rows, self.cols, self.n_blocks)

    def validate(self) -> None:
        """Check every invariant (O(nnz), synchronises). Raises ValueError naming the first broken array."""
        fresh = self.build(self.row_ptr, self.col_idx, self.slot)
        old = self.index.cpu()
        if not torch.equal(fresh, old):
            at = int((fresh != old).nonzero()[0, 0])
            edge = 0
            for name, array in zip(layout.Arrays._fields, self._arrays, strict=True):
                edge += 0 if array is None else array.numel()
                if at < edge:
                    raise ValueError(f"{name} is not the one that row_ptr and col_idx imply")
            raise ValueError("the kernel schedule is not the one that row_ptr and col_idx imply")
