"""Topology updates on the device: no host synchronisation, no shape that depends on data.

`plan_rewiring` decides an update and builds all that it changes; `Rewiring.apply_` writes it into the tensors
that are there. Both may be captured in a CUDA graph: k and the permission to change anything may be tensors.
They run on any device, for topologies in the layout of a GPU (layout.py).

Blocks: those that come take over the slots of those that go. Nothing moves; the slots taken over are zeroed
in values, gradient and optimizer state. Single weights: all of these are permuted into the new order.

With Triton, blocks on a GPU go through its kernels (`takes_kernels`, triton/rewire.py). What is written in
torch here decides the same, and is their oracle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ops, backend, layout
from .topology import Topology

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Rewiring:
    """An update that is decided and not made.

    Attributes:
        index: the new contents of the topology's index.
        replaced: 0-d int64: how many positions are new.
        steps: the tensors that follow, with what to write: a bool mask of what becomes zero, or new contents.
        taken: slots of which the first `replaced` become zero in `words`, for the kernels.
        words: tensors that follow besides, as their 32-bit words.
    """

    topology: Topology
    index: Tensor
    replaced: Tensor
    steps: tuple[tuple[Tensor, Tensor], ...]
    taken: Tensor | None = None
    words: tuple[Tensor, ...] = ()

    def apply_(self) -> None:
        """Make the update, in place. Allocates nothing, and may be repeated: the result is the same."""
        with torch.no_grad():
            self.topology.index.copy_(self.index)
            for tensor, what in self.steps:
                if what.dtype == torch.bool:
                    tensor.masked_fill_(what.view(-1, *(1 for _ in tensor.shape[1:])), 0)
                else:
                    tensor.copy_(what)
            if self.taken is not None:
                from .triton import slots

                for first in range(0, len(self.words), slots.TENSORS):
                    some = self.words[first : first + slots.TENSORS]
                    slots.clear_(self.taken, self.replaced, some)


def rewire_(
    topology: Topology,
    drop_scores: Tensor,
    active: Tensor | None,
    positions: Tensor | None,
    scores: Tensor,
    k: int | Tensor,
    ok: Tensor,
    followers: Sequence[Tensor] = (),
) -> Tensor:
    """`plan_rewiring` and `Rewiring.apply_` in one. Returns how many positions are new, as a 0-d tensor."""
    plan = plan_rewiring(topology, drop_scores, active, positions, scores, k, ok, followers)
    plan.apply_()
    return plan.replaced


@torch.no_grad()
def plan_rewiring(
    topology: Topology,
    drop_scores: Tensor,
    active: Tensor | None,
    positions: Tensor | None,
    scores: Tensor,
    k: int | Tensor,
    ok: Tensor,
    followers: Sequence[Tensor] = (),
) -> Rewiring:
    """Drop the k active positions of smallest score, grow the k best among those inactive or just dropped.

    Equal scores go by position, the lowest first. What is dropped and grown again stays as it is, with value
    and state. If `ok` is False everything keeps its contents, bit for bit, whatever the scores.

    Args:
        topology: in the layout of a GPU, with at least one active position.
        drop_scores: `[n]`, in value order.
        active: `[n]` growth scores of the active single weights, in value order (not read for blocks).
        positions: `[c]` int64 candidates to grow, distinct, with at least min(k, inactive) good ones; those
            that are active have no part in it. None: all positions of the grid in order, for blocks.
        scores: `[c]` their scores, >= 0, -inf where there is no candidate. All `[rows * cols]` for blocks.
        k: how many, int or 0-d integer tensor, in `[0, n]`.
        ok: 0-d bool.
        followers: what has an entry per position along dimension 0: values, gradient, optimizer state.

    Raises:
        ValueError: the layout of a CPU, or shapes that do not fit.
    """
    _check(topology, drop_scores, active, positions, scores, followers)
    if topology.is_bsr:
        by_kernels = takes_kernels(topology, drop_scores, scores)
        plan_blocks = _plan_blocks_by_kernels if by_kernels else _plan_blocks
        return plan_blocks(topology, drop_scores, scores, k, ok, followers)
    assert active is not None
    assert positions is not None
    return _plan_weights(topology, drop_scores, active, positions, scores, k, ok, followers)


def _check(
    topology: Topology,
    drop_scores: Tensor,
    active: Tensor | None,
    positions: Tensor | None,
    scores: Tensor,
    followers: Sequence[Tensor],
) -> None:
    n = topology.n_blocks
    if not topology._gpu:
        raise ValueError(
            f"updates on the device need a topology in the layout of a GPU, got {topology} on "
            f"{topology.device} in that of a CPU: use Topology.update_"
        )
    if n == 0:
        raise ValueError("the topology has no active position to replace")
    if (positions is None) != topology.is_bsr or (active is None and not topology.is_bsr):
        raise ValueError(
            "active and positions are for single weights (CSR); for blocks give the scores of all instead"
        )
    candidates = topology.rows * topology.cols if positions is None else positions.numel()
    wanted = {"drop_scores": (drop_scores, n), "scores": (scores, candidates)}
    if active is not None and not topology.is_bsr:
        wanted["active"] = (active, n)
    for name, (tensor, size) in wanted.items():
        if tuple(tensor.shape) != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")
    for tensor in followers:
        if tensor.shape[:1] != (n,):
            raise ValueError(f"expected {n} entries along dimension 0, got shape {tuple(tensor.shape)}")


def takes_kernels(topology: Topology, *scores: Tensor) -> bool:
    """Whether the Triton kernels decide updates of this topology from scores of these dtypes.

    Backend "reference" never uses them.
    """
    if not backend.has_triton(topology.device.type):
        return False
    if backend.requested() == "reference" or any(t.dtype is not torch.float32 for t in scores):
        return False
    from .triton import rewire

    return topology.is_bsr and topology.rows * topology.cols <= rewire.POSITIONS


def survey(
    topology: Topology, values: Tensor, gradient: Tensor, block_score: str
) -> tuple[Tensor, Tensor] | None:
    """What an update of blocks asks of values and gradient, in two launches; None if no kernel takes them.

    Args:
        topology: of the values.
        values, gradient: `[n, b_out, b_in]`.
        block_score: `"l1"` or `"l2"`.

    Returns:
        scores: `[n]` float32, the norms of the blocks.
        finite: `[2]` bool, whether the gradient is and whether the scores are.
    """
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    if values.numel() == 0 or not takes_kernels(topology):
        return None
    if not all(t.dtype in kinds and t.is_contiguous() for t in (values, gradient)):
        return None
    from .triton import slots

    return slots.survey(values, gradient, block_score)


def _plan_blocks_by_kernels(
    topology: Topology,
    drop_scores: Tensor,
    scores: Tensor,
    k: int | Tensor,
    ok: Tensor,
    followers: Sequence[Tensor],
) -> Rewiring:
    """The same as `_plan_blocks`, in 8 launches."""
    from .triton import rewire

    n, device = topology.n_blocks, topology.device
    if isinstance(k, Tensor) and k.device != device:
        k = int(k)  # on the CPU: nothing waits for the device
    index, replaced, taken = rewire.plan(
        topology.index, n, topology.rows, topology.cols, topology.groups, topology.block_size[1],
        drop_scores, scores, k, ok.to(device),
    )  # fmt: skip
    words = [_words(t, n) for t in followers]
    rest = tuple(t for t, w in zip(followers, words, strict=True) if w is None)
    steps = tuple(zip(rest, itertools.repeat(_mask(taken, replaced)))) if rest else ()
    return Rewiring(topology, index, replaced, steps, taken, tuple(w for w in words if w is not None))


def _mask(taken: Tensor, count: Tensor) -> Tensor:
    """A bool for each slot: whether it is among the first `count` taken."""
    n = taken.numel()
    slot = torch.where(torch.arange(n, device=taken.device) < count, taken, n).long()
    return torch.zeros(n + 1, dtype=torch.bool, device=taken.device).scatter_(0, slot, True)[:n]


def _words(tensor: Tensor, n: int) -> Tensor | None:
    """A tensor of `n` entries as 32-bit words; None if an entry is not made of such or does not lie so."""
    if not tensor.is_contiguous() or tensor.nbytes // n % 4 or tensor.nbytes // n >= 2**31:
        return None
    if tensor.data_ptr() % 16:
        return None
    return tensor.detach().view(-1).view(torch.int32)


# Both plans work on an array of positions in ascending order, with a bool for each: active before, active
# after. Its set bits, numbered by a running sum, are the new list. `ok` enters there and nowhere else: if it
# is False the bits are the old ones, and all that follows reproduces what there is. Whatever the scores, n
# bits are set, for k good candidates are there: those just dropped.
#
# Integers are int64 up to the end, where one kernel joins the arrays and one writes them as int32.


def _plan_blocks(
    topology: Topology,
    drop_scores: Tensor,
    scores: Tensor,
    k: int | Tensor,
    ok: Tensor,
    followers: Sequence[Tensor],
) -> Rewiring:
    """The array of positions is the whole grid.

    About 55 launches, most of them over n blocks:
    [n]: positions, gather and sort of scores, scatter of what is kept;
    [grid]: fill and scatter what is kept, mask scores, sort, scatter what is grown, scatter old slots, sum;
    [n]: search the new list, gather its slots, sum what goes and comes, search, scatter what is taken over;
    then those of `_index`.
    """
    n, total, device = topology.n_blocks, topology.rows * topology.cols, topology.device
    assert topology.slot is not None
    slot, flat = topology.slot.long(), _positions(topology)
    rank = torch.arange(max(n, total), device=device)
    order = drop_scores[slot].sort(stable=True).indices
    stays = torch.empty(n, dtype=torch.bool, device=device).scatter_(0, order, rank[:n] >= k)
    kept = torch.zeros(total, dtype=torch.bool, device=device).scatter_(0, flat, stays)
    order = scores.masked_fill(kept, -torch.inf).sort(descending=True, stable=True).indices
    after = torch.empty_like(kept).scatter_(0, order, rank[:total] < k).logical_or_(kept)
    place = torch.full((total,), -1, dtype=torch.int64, device=device).scatter_(0, flat, slot)
    after = torch.where(ok, after, place >= 0)

    new_flat = torch.searchsorted(after.cumsum(0), rank[:n], right=True)
    new_slot = place[new_flat]
    fresh = new_slot < 0
    # The i-th block that comes takes the slot of the i-th that goes.
    goes, comes = after[flat].logical_not_().cumsum(0), fresh.cumsum(0)
    new_slot = torch.where(fresh, slot[torch.searchsorted(goes, comes)], new_slot)
    taken = torch.empty_like(fresh).scatter_(0, new_slot, fresh)
    index = _index(topology, new_flat, new_slot)
    return Rewiring(topology, index, comes[-1], tuple((t, taken) for t in followers))


def _plan_weights(
    topology: Topology,
    drop_scores: Tensor,
    active: Tensor,
    positions: Tensor,
    scores: Tensor,
    k: int | Tensor,
    ok: Tensor,
    followers: Sequence[Tensor],
) -> Rewiring:
    """The array of positions is that of the active ones and the candidates."""
    n, total = topology.n_blocks, topology.rows * topology.cols
    flat = _positions(topology)
    rank = torch.arange(n + positions.numel(), device=topology.device)
    order = drop_scores.sort(stable=True).indices
    stays = torch.empty(n, dtype=torch.bool, device=topology.device).scatter_(0, order, rank[:n] >= k)
    at = torch.searchsorted(flat, positions).clamp_(max=n - 1)
    score = torch.cat(
        [
            active.masked_fill(stays, -torch.inf),
            scores.to(active.dtype).masked_fill(flat[at] == positions, -torch.inf),
        ]
    )
    # Stable: of equal positions, which only a candidate that is active has, the active one comes first.
    both = torch.cat([flat, positions])
    both, order = both.to(torch.int32 if total < _INT32 else torch.int64).sort(stable=True)
    best = score[order].sort(descending=True, stable=True).indices
    before = order < n
    kept = before & stays[order.clamp(max=n - 1)]
    after = torch.empty_like(before).scatter_(0, best, rank < k).logical_or_(kept)
    chosen = torch.searchsorted(torch.where(ok, after, before).cumsum(0), rank[:n], right=True)

    source = order[chosen]
    fresh = source >= n
    source = source.clamp_(max=n - 1)
    steps = tuple(
        (t, t.index_select(0, source).masked_fill_(fresh.view(-1, *(1 for _ in t.shape[1:])), 0))
        for t in followers
    )
    return Rewiring(topology, _index(topology, both[chosen].long(), None), fresh.sum(), steps)


def _positions(topology: Topology) -> Tensor:
    """`[n]` int64: the active positions, ascending."""
    entry = torch.arange(topology.n_blocks, dtype=torch.int32, device=topology.device)
    row = torch.searchsorted(topology.row_ptr[1:], entry, right=True)
    return torch.add(topology.col_idx, row, alpha=topology.cols)


def _index(topology: Topology, flat: Tensor, slot: Tensor | None) -> Tensor:
    """The index of sorted positions (`[n]` int64), and slots for blocks; in int64.

    Kernels that are not elementwise: sort, 2 gathers, 2 searches; for blocks 2 sorts, a sum, a search and a
    gather for the tail; one that joins the arrays.
    """
    rows, cols, groups = topology.rows, topology.cols, topology.groups
    row, col = flat.div(cols, rounding_mode="floor"), flat.remainder(cols)
    # Positions are in row order, so a stable sort by columns leaves rows ascending within a column.
    column, order = layout.column_keys(row, col, rows, cols, groups).sort(stable=True)
    place = torch.arange(max(rows, groups * cols) + 1, device=flat.device)
    row_ptr = torch.searchsorted(row, place[: rows + 1])
    col_ptr = torch.searchsorted(column, place[: groups * cols + 1])
    parts = [row_ptr, col, col_ptr, row[order], order if slot is None else slot[order]]
    if slot is not None:
        parts += [slot, *layout.tail(row_ptr, col_ptr, topology.n_blocks, topology.block_size[1])]
    return torch.cat(parts)


def reordered(tensor: Tensor, source: Tensor) -> Tensor:
    """A tensor in value order brought along an update: `new[i] = tensor[source[i]]`, 0 where that is -1.

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
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            return _ops.reordered(tensor, source)  # type: ignore[no-any-return]
        moved = tensor.index_select(0, source.clamp_min(0))
        moved[source < 0] = 0
        return moved


def reorder_(tensor: Tensor, source: Tensor) -> Tensor:
    """The same in place."""
    with torch.no_grad():
        return tensor.copy_(reordered(tensor, source))
