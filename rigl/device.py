"""RigL's update of layers on a GPU: decided and made there, without a read on the host.

k comes from the schedule, on the host. Whether all numbers are finite is known on the device only: it is a
flag, of all layers together, that every write depends on. The host learns it later, from a `Verdict`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels.growth import DeviceGrowth
from sparse_kernels.rewiring import plan_rewiring, survey
from sparse_kernels.topology import Topology

from .optimizer_state import state_tensors
from .outcomes import NotReady, not_finite
from .selection import magnitudes
from .tracking import Tracker

_WHAT = ("gradient", "weight", "score")  # in the order in which they are blamed


class DeviceUpdate:
    """The update of all layers on GPUs, decided and not made.

    Args:
        wanted: the layers, each with the number of positions to replace. They have been scored.
        optimizer: of their values.
        block_score: `"l1"` or `"l2"`.

    Raises:
        RuntimeError: optimizer state that cannot follow.
    """

    def __init__(
        self, wanted: Sequence[tuple[Tracker, int]], optimizer: torch.optim.Optimizer, block_score: str
    ) -> None:
        self._names = [tracker.name for tracker, _ in wanted]
        home = wanted[0][0].layer.values.device
        parts, flags = [], []
        for tracker, k in wanted:
            layer = tracker.layer
            values, grad = layer.values.data, layer.values.grad
            assert grad is not None  # what makes a layer ready
            growth = _scores(tracker)
            drop, finite = _survey(layer.topology, values, grad, block_score)
            state = state_tensors(optimizer, tracker.name, layer)
            flags += [finite, growth.finite.view(1)]
            parts.append((layer.topology, drop, growth, k, [values, grad, *state]))
        self._flags = torch.cat([flag.to(home, non_blocking=True) for flag in flags])
        ok = self._flags.all()
        self._rewirings = []
        for topology, drop, growth, k, followers in parts:
            allowed = ok.to(topology.device, non_blocking=True)
            scores = (growth.active, growth.positions, growth.scores)
            self._rewirings.append(plan_rewiring(topology, drop, *scores, k, allowed, followers))
        counts = [r.replaced * r.topology.block_numel for r in self._rewirings]
        self._replaced = torch.stack([count.to(home, non_blocking=True) for count in counts]).sum()

    def verdict(self, step: int) -> Verdict:
        """What the host will want to know about it."""
        return Verdict(step, self._names, torch.cat([self._flags.long(), self._replaced.view(1)]))

    def apply(self) -> None:
        """Make it. If something breaks in, it is made to the end before that goes on."""
        try:
            for rewiring in self._rewirings:
                rewiring.apply_()
        except BaseException:
            for rewiring in self._rewirings:
                rewiring.apply_()
            raise


class Verdict:
    """How an update went, known to the device first.

    Attributes:
        step: the update's.
        layers: how many took part.
    """

    def __init__(self, step: int, names: Sequence[str], report: Tensor) -> None:
        self.step, self.layers = step, len(names)
        self._names, self._event = names, None
        if report.is_cuda:
            # On its way to the host from now on: reading it later does not wait for what comes between.
            self._report = torch.empty(report.shape, dtype=report.dtype, device="cpu", pin_memory=True)
            self._report.copy_(report, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(report.device))
        else:
            self._report = report

    def read(self) -> tuple[str, int]:
        """What was not finite ("" if all was), and how many weights were replaced."""
        if self._event is not None:
            self._event.synchronize()
        *flags, replaced = self._report.tolist()
        for i, flag in enumerate(flags):
            if not flag:
                return not_finite(_WHAT[i % len(_WHAT)], self._names[i // len(_WHAT)]), 0
        return "", replaced


def _survey(topology: Topology, values: Tensor, grad: Tensor, block_score: str) -> tuple[Tensor, Tensor]:
    """Drop scores, and `[2]` bool: whether the gradient is finite, and whether the weights are."""
    found = survey(topology, values, grad, block_score)
    if found is not None:
        return found
    drop = magnitudes(values, block_score)
    return drop, torch.stack([grad.isfinite().all(), drop.isfinite().all()])


def _scores(tracker: Tracker) -> DeviceGrowth:
    assert tracker.probe is not None  # what makes a layer ready
    growth = tracker.probe.result()
    if not isinstance(growth, DeviceGrowth):
        raise NotReady(f"layer {tracker.name!r} was moved to a GPU after it was scored")
    tracker.disarm()
    return growth
