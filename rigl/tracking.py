"""What a training method watches in a layer: backward passes, and on a topology batch their scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_kernels.growth import GrowthScorer
from sparse_kernels.nn import SparseLayer


class Probe(GrowthScorer):
    """A growth scorer that forgets what was shown before the gradients were last zeroed.

    So its score is always that of the gradient that `values.grad` holds the active part of: a backward
    pass whose step was skipped (`GradScaler`) or whose gradient was thrown away does not count.
    """

    def __init__(self, layer: SparseLayer, k: int, block_score: str, defer: bool) -> None:
        super().__init__(layer.topology, k, block_score, defer)
        self._layer = layer
        self.backwards = 0
        self._version: int | None = None  # of values.grad after the last backward pass

    def reset(self) -> None:
        """Forget what was shown."""
        super().reset()
        self.backwards, self._version = 0, None

    def observe(self, x: Tensor, dy: Tensor, *conf: Any) -> None:
        """Take one pair; see `GrowthScorer.observe`."""
        if self._zeroed():
            self.reset()
        self.topology = self._layer.topology  # another object after `model.to(device)`
        super().observe(x, dy, *conf)

    def end_backward(self, grad: Tensor | None) -> None:
        """The gradient of one backward pass has arrived in `values.grad`."""
        self.backwards += 1
        self._version = None if grad is None else grad._version

    def _zeroed(self) -> bool:
        if self.backwards == 0:
            return False
        grad = self._layer.values.grad
        if grad is None:
            return True
        # An untouched gradient is not read: it may be zero without having been zeroed.
        return grad._version != self._version and not bool(grad.any())


class Tracker:
    """One sparse layer under a training method.

    Attributes:
        name, layer: the layer.
        passes: backward passes that made up its last step; None before the first.
        shared: whether one backward pass was seen to reach the layer more than once.
    """

    def __init__(self, name: str, layer: SparseLayer) -> None:
        self.name, self.layer = name, layer
        self.passes: int | None = None
        self.shared = False
        self._count = 0
        self._handle: Any = None

    @property
    def probe(self) -> Probe | None:
        """The scorer, if the layer is armed."""
        return self.layer.growth if isinstance(self.layer.growth, Probe) else None

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
            expected: backward passes in a step if the user said so; None: as many as in the last one.
        """
        self.watch()
        passes = self.passes if self.passes is not None else expected
        several = self.shared or passes != 1 or (expected or 1) > 1
        self.layer.growth = Probe(self.layer, k, block_score, defer=several)

    def disarm(self) -> None:
        """Let the scorer go, and note what it saw."""
        probe = self.probe
        if probe is not None and probe.backwards and probe.observed != probe.backwards:
            self.shared = True
        self.layer.growth = None

    def watch(self) -> None:
        """Count backward passes from now on (a frozen layer has none: it is watched once it is not)."""
        if self._handle is None and self.layer.values.requires_grad:
            self._handle = self.layer.values.register_post_accumulate_grad_hook(self._accumulated)

    def end_step(self) -> None:
        """The optimizer has stepped: what comes now is the next step's."""
        if self._count:
            self.passes = self._count
        self._count = 0

    def release(self) -> None:
        """Stop watching."""
        self.layer.growth = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _accumulated(self, values: Tensor) -> None:
        self._count += 1
        if self.probe is not None:
            self.probe.end_backward(values.grad)
