"""What a training method watches in a layer: backward passes, and on a topology batch their scores."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.growth import GradientSum, GrowthScorer
from sparse_kernels.nn import SparseLayer


class Probe(GrowthScorer):
    """A growth scorer whose score is always that of the gradient that `values.grad` holds the active part of.

    What the layer's backward shows counts once it has arrived in `values.grad`: a pass that asks for other
    gradients only (`torch.autograd.grad` of an input, a frozen layer) does not. What was there before the
    gradients were zeroed is forgotten: a pass whose step was skipped (`GradScaler`), or that was thrown away.

    Attributes:
        unseen: whether `values.grad` holds a pass of which nothing was shown.
    """

    def __init__(self, layer: SparseLayer, k: int, block_score: str, defer: bool) -> None:
        self._layer = layer
        self._pass = -1  # the backward pass under way
        super().__init__(layer.topology, k, block_score, defer)

    def reset(self) -> None:
        """Forget what was shown."""
        super().reset()
        self.unseen = False
        self._version: int | None = None  # of values.grad after the last backward pass
        self._shown = GradientSum(self.topology)  # in the one under way

    def observe(self, x: Tensor, dy: Tensor, *conf: Any) -> None:
        """Take one pair; see `GrowthScorer.observe`."""
        current = torch._C._current_graph_task_id()
        if current != self._pass:  # a new backward pass
            self._pass = current
            self.topology = self._layer.topology  # another object after `model.to(device)`
            self._shown = GradientSum(self.topology)
            grad = self._layer.values.grad
            if self.observed > 0 and self._zeroed(grad):
                self.reset()
            if self.observed == 0:
                self.unseen = grad is not None and bool(grad.any())
        self._shown.add(x, dy, *conf)

    def end_backward(self, grad: Tensor | None) -> None:
        """The gradient of one backward pass has arrived in `values.grad`."""
        if self._shown and self._pass == torch._C._current_graph_task_id():
            self.take(self._shown)
            self._shown = GradientSum(self.topology)
        self._version = None if grad is None else grad._version

    def _zeroed(self, grad: Tensor | None) -> bool:
        if grad is None:
            return True
        # An untouched gradient is not read: it may be zero without having been zeroed.
        return grad._version != self._version and not bool(grad.any())


class Tracker:
    """One sparse layer under a training method.

    Attributes:
        name, layer: the layer.
        passes: backward passes in a step, the most so far; None before the first.
    """

    def __init__(self, name: str, layer: SparseLayer) -> None:
        self.name, self.layer = name, layer
        self.passes: int | None = None
        self._count = 0
        self._handle: Any = None

    @property
    def probe(self) -> Probe | None:
        """The scorer, if the layer is armed."""
        return self.layer.growth if isinstance(self.layer.growth, Probe) else None

    @property
    def on_device(self) -> bool:
        """Whether it lies on a GPU."""
        return self.layer.topology._gpu

    @property
    def can_change(self) -> bool:
        """Neither frozen, nor empty, nor wholly active."""
        topology = self.layer.topology
        return self.layer.values.requires_grad and 0 < topology.n_blocks < topology.rows * topology.cols

    def arm(self, k: int, block_score: str, expected: int | None) -> None:
        """Have the next backward passes scored.

        Args:
            k: how many candidates to keep.
            block_score: `"l1"` or `"l2"`.
            expected: backward passes in a step if the user said so; None: as many as in those before.
        """
        self.watch()
        known = [n for n in (self.passes, expected) if n is not None]
        self.layer.growth = Probe(self.layer, k, block_score, defer=not known or max(known) > 1)

    def disarm(self) -> None:
        """Let the scorer go."""
        self.layer.growth = None

    def watch(self) -> None:
        """Count backward passes from now on (a frozen layer has none: it is watched once it is not)."""
        if self._handle is None and self.layer.values.requires_grad:
            self._handle = self.layer.values.register_post_accumulate_grad_hook(_Weakly(self))

    def end_step(self) -> None:
        """The optimizer has stepped: what comes now is the next step's."""
        if self._count:
            self.passes = max(self._count, self.passes or 0)
        self._count = 0

    def release(self) -> None:
        """Stop watching."""
        self.layer.growth = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def accumulated(self, values: Tensor) -> None:
        """A backward pass has reached `values.grad`."""
        self._count += 1
        if self.probe is not None:
            self.probe.end_backward(values.grad)


class _Weakly:
    """The hook of a tracker. Hooks of a tensor are out of the garbage collector's sight: a reference from one
    back to its layer would keep that for ever.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = weakref.ref(tracker)

    def __call__(self, values: Tensor) -> None:
        tracker = self._tracker()
        if tracker is not None:
            tracker.accumulated(values)
