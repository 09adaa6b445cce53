"""The training methods: RigL, SET, and a static mask. They differ in when they act and in what grows."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sparse_kernels.growth import Growth

from .outcomes import NotFinite, NotReady, not_finite
from .selection import exchange, finite, random_outside, rewire
from .tracking import Tracker
from .updater import TopologyUpdater


class RigL(TopologyUpdater):
    """Drop the weights of smallest magnitude, grow where the gradient of the loss is largest.

    Every `delta_t` steps one batch is spent on an update: its gradients choose the new topology, and the
    optimizer takes no step (`step_count` stands still). Grown weights start at zero, as does their
    optimizer state. A weight that is dropped and chosen again simply stays.

    Example:
        >>> import rigl
        >>> model = rigl.sparsify(torch.nn.Linear(64, 64), sparsity=0.9)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> rigl.RigL(model, optimizer, t_end=7500)
        RigL(layers=1, step_count=0, updates=0, begin=0, t_end=7500, delta_t=100)

    Notes:
        If a weight, gradient or score is not finite, no layer changes, a `NonFiniteWarning` names layer and
        step, and the batch is spent all the same; the next attempt comes `delta_t` steps later. A layer
        without a gradient on a topology batch stays as it is. Gradient accumulation is seen without being
        told: the scores are those of the sum of all backward passes since the gradients were zeroed.

        Layers on a GPU are updated there, and the host does not wait. Whether the numbers were finite it
        learns, and warns of, when it next asks: at the next topology batch, or in `metrics()`, `updates`,
        `failed_updates` or `state_dict()`.
    """

    takes_batch = True
    on_device = True

    def _check_ready(self, tracker: Tracker) -> bool:
        grad, probe = tracker.layer.values.grad, tracker.probe
        if grad is None:
            return False
        if probe is None:  # not armed, because of a state just loaded or an error in the last step
            raise NotReady
        name = f"layer {tracker.name!r}"
        if probe.observed == 0:
            if not bool(grad.any()):  # zeroed, and not used since
                return False
            raise NotReady(f"{name} has a gradient, but no backward pass of it was seen")
        if probe.unseen:
            raise NotReady(
                f"the gradient of {name} holds a backward pass that was not seen (left from an earlier "
                "step, or of a run resumed within an accumulation)"
            )
        if probe.refusal:
            raise NotReady(f"the gradient of {name} cannot be scored: {probe.refusal}")
        if not probe.defer and probe.observed > 1:
            raise NotReady(
                f"{name} was reached by {probe.observed} backward passes where one was expected; "
                "say how many with grad_accumulation="
            )
        if not tracker.on_device and not finite(grad):
            raise NotFinite(not_finite("gradient", tracker.name))
        return True

    def _exchange(self, tracker: Tracker, drop: Tensor, dropped: Tensor, step: int) -> tuple[Tensor, Tensor]:
        assert tracker.probe is not None  # _check_ready saw it
        growth = tracker.probe.result()
        if not isinstance(growth, Growth):
            raise NotReady(f"layer {tracker.name!r} was moved to the CPU after it was scored")
        if not growth.finite:
            raise NotFinite(not_finite("score", tracker.name))
        tracker.disarm()
        return exchange(drop, dropped, growth)


class SET(TopologyUpdater):
    """Drop the weights of smallest magnitude, grow as many at random.

    The update follows the optimizer step of the same iteration, numbered by the steps taken; no batch is
    spent. What grows depends on `seed`, the layer's name and the step only: every process chooses the same.
    The choice is made on the host, so an update waits for a GPU.
    """

    takes_batch = False

    def _exchange(self, tracker: Tracker, drop: Tensor, dropped: Tensor, step: int) -> tuple[Tensor, Tensor]:
        topology = tracker.layer.topology
        kept = torch.ones(topology.n_blocks, dtype=torch.bool, device=drop.device)
        kept[drop] = False
        kept = kept if topology.slot is None else kept[topology.slot.long()]  # in the order of the positions
        # `hash` differs between processes; a digest does not.
        digest = hashlib.blake2b(f"{self._seed}/{tracker.name}/{step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        total = topology.rows * topology.cols
        grown = random_outside(topology.row_positions()[kept], total, drop.numel(), generator)
        return rewire(drop, dropped, grown)


class Static(TopologyUpdater):
    """The topology never changes: the baseline. Takes the arguments of the others, and counts steps."""

    takes_batch = False
    changes_topology = False
