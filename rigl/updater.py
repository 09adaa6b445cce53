"""What all training methods share: when they act, on which layers, and that an update is whole."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_kernels.growth import BLOCK_SCORES
from sparse_kernels.nn import SparseLayer

from .attaching import attach, check_layers, check_objects, detach, evaluate_closure, innermost
from .checkpoint import check_state
from .device import DeviceUpdate, Verdict
from .optimizer_state import HostUpdate, Plan
from .outcomes import NonFiniteWarning, NotFinite, NotReady, SkippedUpdateWarning, not_finite
from .schedules import Schedule, Window, drop_fraction, replaced
from .selection import finite, signed, weakest
from .tracking import Tracker

logger = logging.getLogger("rigl")


class TopologyUpdater:
    """Base of the training methods: attaches to an optimizer through its step hooks.

    Subclasses say whether they act before the optimizer step (in its place) or after it, and what grows.
    """

    takes_batch: ClassVar[bool]  # an update takes the place of the optimizer step
    changes_topology: ClassVar[bool] = True
    on_device: ClassVar[bool] = False  # layers on a GPU are updated there

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        t_end: int,
        delta_t: int = 100,
        alpha: float = 0.3,
        schedule: str | Schedule = "cosine",
        begin: int = 0,
        seed: int = 0,
        power: float = 3.0,
        block_score: str = "l1",
        grad_accumulation: int | None = None,
    ) -> None:
        """Attach to `optimizer`. The training loop stays as it is.

        Args:
            model: with sparse layers, from `rigl.sparsify`.
            optimizer: of its parameters, built after `sparsify`. Any whose state has the parameter's shape.
            t_end: last step of a topology update, usually 75 % of the training steps.
            delta_t: optimizer steps between two updates.
            alpha: fraction of a layer's weights replaced at the first update.
            schedule: `"cosine"`, `"constant"`, `"linear"`, `"inverse_power"`, or a callable step -> fraction.
            begin: step of the first update.
            seed: of what is random in the method.
            power: exponent of `"inverse_power"`.
            block_score: how |w| and |g| of a block are summed up: `"l1"` or `"l2"`.
            grad_accumulation: backward passes in one optimizer step. None: found out by itself; then
                the first update, when nothing is known yet, keeps inputs and output gradients of the
                sparse layers (or their dense gradients, where those are smaller) until
                `optimizer.step()`, which `grad_accumulation=1` avoids.

        Raises:
            ValueError: settings out of range; no sparse layer; a sparse layer that the optimizer
                does not hold; an optimizer with a method attached already.
            TypeError: not a module or optimizer; LBFGS, whose state cannot follow a topology.
        """
        optimizer = innermost(optimizer)
        check_objects(model, optimizer, self.changes_topology)
        self._window = Window(begin, t_end, delta_t)
        self._fraction = drop_fraction(schedule, alpha=alpha, begin=begin, t_end=t_end, power=power)
        if block_score not in BLOCK_SCORES:
            raise ValueError(f'block_score must be "l1" or "l2", got {block_score!r}')
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {seed!r}")
        if grad_accumulation is not None and (
            not isinstance(grad_accumulation, int) or grad_accumulation < 1
        ):
            raise ValueError(f"grad_accumulation must be a positive int or None, got {grad_accumulation!r}")
        # By the names in the model itself, whether or not it is compiled.
        layers = {
            n.replace("_orig_mod.", ""): m for n, m in model.named_modules() if isinstance(m, SparseLayer)
        }
        check_layers(layers, optimizer)
        self._optimizer, self._trackers = optimizer, [Tracker(n, m) for n, m in layers.items()]
        self._seed, self._block_score, self._expected = seed, block_score, grad_accumulation
        self.step_count = 0
        self._updates = 0
        self._failed_updates = 0
        self._pending: Verdict | None = None  # of the latest update, if it was made on a GPU
        self._replaced_here = (0, 0)  # weights and layers that it changed on the host
        self.updated = False
        self._last_update = self._window.never
        self._replaced = 0
        self._skip_step = False
        self._recording = False  # the optimizer's step is being captured in a CUDA graph, not taken
        self._set_aside: list[tuple[Tensor, Tensor]] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        attach(self, (optimizer, *layers.values()))
        try:
            for tracker in self._trackers:
                tracker.watch()
            self._arm()
        except BaseException:
            self.remove()
            raise

    # what a method decides ------------------------------------------------------------------

    def _exchange(self, tracker: Tracker, drop: Tensor, dropped: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What is left to drop, and as many positions to grow: inactive ones.

        Args:
            tracker: the layer.
            drop: where the values of the weakest stand.
            dropped: their positions, ascending. They may be grown again, and then simply stay.
            step: of the update.
        """
        raise NotImplementedError

    def _check_ready(self, tracker: Tracker) -> bool:
        """Whether the layer takes part. Raises NotReady or NotFinite."""
        return True

    # hooks ----------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._recording:
            return None
        self.updated, self._set_aside = False, None
        # A fused optimizer is called by GradScaler even when it must not step; it looks at this itself.
        overflow = getattr(optimizer, "found_inf", None)
        self._skip_step = overflow is not None and bool(overflow)
        if self._skip_step or not self.takes_batch or not self._due():
            return None
        args, kwargs = evaluate_closure(args, kwargs)
        if self._update():
            self._set_aside = [
                (p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            for parameter, _ in self._set_aside:  # what has no gradient takes no step: no decay, no momentum
                parameter.grad = None
        return args, kwargs

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._skip_step or self._recording:
            return
        if self._set_aside is not None:
            for parameter, grad in self._set_aside:
                parameter.grad = grad
            self._set_aside = None
        else:
            self.step_count += 1
        for tracker in self._trackers:
            tracker.end_step()
        if self.takes_batch:
            self._arm()
        elif self._due():
            self._update()

    def _due(self) -> bool:
        return self.changes_topology and self._window.due(self.step_count, self._last_update)

    def _arm(self) -> None:
        """Have the coming backward passes scored if the next step is spent on an update."""
        for tracker in self._trackers:
            tracker.disarm()
            if self.takes_batch and self._due() and (k := self._count(tracker, self.step_count)):
                tracker.arm(k, self._block_score, self._expected)

    # the update -----------------------------------------------------------------------------

    def _count(self, tracker: Tracker, step: int) -> int:
        if not tracker.can_change:
            return 0
        return replaced(tracker.layer.topology.n_blocks, self._fraction(step))

    def _update(self) -> bool:
        """Update all layers or none. Whether the attempt used up its turn (and batch, if it takes one)."""
        self._settle()
        step, problem, update, here = self.step_count, "", None, None
        try:
            plans, update = self._plan_all(step)
            for tracker in self._trackers:  # what the scorers hold is not needed any more
                tracker.disarm()
            verdict = None if update is None else update.verdict(step)
            if plans and verdict is not None and (bad := verdict.read()[0]):
                raise NotFinite(bad)  # the layers on the host must know
            here = HostUpdate(plans, self._optimizer)
        except NotReady as reason:
            if str(reason):
                message = f"topology update postponed by a step at step {step}: {reason}"
                warnings.warn(message, SkippedUpdateWarning, stacklevel=2)
            return False
        except NotFinite as reason:
            verdict, problem = None, str(reason)
        except BaseException:
            self._arm()  # nothing has changed; the next batch is the next attempt
            raise
        self._last_update, self.updated = step, True
        replaced, layers = (0, 0) if here is None else (here.replaced, here.layers)
        if verdict is None:
            self._conclude(step, problem, replaced, layers)
        else:
            self._pending, self._replaced_here = verdict, (replaced, layers)
        if here is not None:
            here.apply()
        if verdict is not None:
            assert update is not None
            update.apply()
        return True

    def _settle(self) -> None:
        """Take note of how the latest update went, if only a GPU knows so far."""
        verdict, self._pending = self._pending, None
        if verdict is not None:
            problem, replaced = verdict.read()
            here, layers = self._replaced_here
            self._conclude(verdict.step, problem, here + replaced, layers + verdict.layers)

    def _conclude(self, step: int, problem: str, replaced: int, layers: int) -> None:
        if problem:
            self._failed_updates += 1
            spent = " and the optimizer took no step on this batch" if self.takes_batch else ""
            message = f"topology update at step {step} skipped: {problem}; no layer's topology changed{spent}"
            warnings.warn(message, NonFiniteWarning, stacklevel=3)
            return
        self._updates += 1
        self._replaced = replaced
        logger.debug("step %d: %d weights replaced in %d layers", step, replaced, layers)

    def _plan_all(self, step: int) -> tuple[list[Plan], DeviceUpdate | None]:
        """The plans of layers on the host, and the update of those on GPUs, if there are any."""
        wanted = [(tracker, k) for tracker in self._trackers if (k := self._count(tracker, step))]
        there = [(t, k) for t, k in wanted if self.on_device and t.on_device]
        here = [pair for pair in wanted if pair not in there]
        plans = [self._plan(tracker, k, step) for tracker, k in here if self._check_ready(tracker)]
        there = [(tracker, k) for tracker, k in there if self._check_ready(tracker)]
        if wanted and not plans and not there:
            raise NotReady("no sparse layer has a gradient")
        return plans, DeviceUpdate(there, self._optimizer, self._block_score) if there else None

    def _plan(self, tracker: Tracker, k: int, step: int) -> Plan:
        layer, topology = tracker.layer, tracker.layer.topology
        scores = signed(layer.values, self._block_score)
        if not finite(scores):
            raise NotFinite(not_finite("weight", tracker.name))
        drop, dropped = weakest(topology, scores, k)
        return Plan(tracker.name, layer, *self._exchange(tracker, drop, dropped, step))

    # for the user ---------------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Topology updates done. Waits for a GPU that has not finished the latest one."""
        self._settle()
        return self._updates

    @property
    def failed_updates(self) -> int:
        """Updates refused because of numbers that are not finite. Waits as `updates` does."""
        self._settle()
        return self._failed_updates

    def metrics(self) -> dict[str, float]:
        """Figures for a log.

        Keys: `step_count`, `updates`, `failed_updates`, `drop_fraction` (the schedule's value now; 0
        outside `begin .. t_end`), `replaced` (weights exchanged by the last update), `sparsity` (of the
        sparse layers together).
        """
        self._settle()
        inside = self.changes_topology and self._window.begin <= self.step_count <= self._window.t_end
        topologies = [tracker.layer.topology for tracker in self._trackers]
        total = sum(math.prod(t.shape) for t in topologies)
        return {
            "step_count": float(self.step_count),
            "updates": float(self.updates),
            "failed_updates": float(self.failed_updates),
            "drop_fraction": self._fraction(self.step_count) if inside else 0.0,
            "replaced": float(self._replaced),
            "sparsity": 1.0 - sum(t.nnz for t in topologies) / total if total else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on as if it had not been interrupted: plain numbers, by name.

        Save it with the states of model and optimizer. Settings (`t_end`, `alpha`, ...) are not in it: give
        them to the constructor.
        """
        return {
            "method": type(self).__name__,
            "seed": self._seed,
            "step_count": self.step_count,
            "last_update": self._last_update,
            "updates": self.updates,
            "failed_updates": self.failed_updates,
            "updated": self.updated,
            "replaced": self._replaced,
            "passes": {t.name: t.passes for t in self._trackers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Load model and optimizer, too.

        Raises:
            ValueError: the state of another method, or lacking something. Nothing is changed then.
        """
        passes = check_state(state, self.state_dict())
        self._seed, self._last_update, self.step_count = (
            state[key] for key in ("seed", "last_update", "step_count")
        )
        self._updates, self._failed_updates = state["updates"], state["failed_updates"]
        self._replaced = state["replaced"]
        self.updated = bool(state["updated"])
        for tracker in self._trackers:
            tracker.passes = passes[tracker.name]
        self._arm()

    def remove(self) -> None:
        """Detach from optimizer and layers. The topology stays as it is. A second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for tracker in self._trackers:
            tracker.release()
        detach((self._optimizer, *(tracker.layer for tracker in self._trackers)))
        self._settle()

    def __repr__(self) -> str:
        w = self._window
        return (
            f"{type(self).__name__}(layers={len(self._trackers)}, step_count={self.step_count}, "
            f"updates={self._updates}, begin={w.begin}, t_end={w.t_end}, delta_t={w.delta_t})"
        )
