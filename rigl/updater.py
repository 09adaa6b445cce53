"""What all training methods share: when they act, on which layers, and that an update is whole."""

from __future__ import annotations

import gc
import logging
import math
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_kernels.growth import BLOCK_SCORES
from sparse_kernels.nn import SparseLayer

from .optimizer_state import Plan, apply_plans
from .schedules import Schedule, Window, drop_fraction, replaced
from .selection import magnitudes, rewire, smallest
from .tracking import Tracker

logger = logging.getLogger("rigl")

# Who acts on an optimizer or layer; weak on both sides, so that none of them is kept alive.
_attached: weakref.WeakKeyDictionary[Any, weakref.ref[TopologyUpdater]] = weakref.WeakKeyDictionary()


class SkippedUpdateWarning(RuntimeWarning):
    """A topology update that was due did not happen; nothing changed."""


class NonFiniteWarning(SkippedUpdateWarning):
    """The reason was a weight, gradient or growth score that is NaN or infinite."""


class _NotFinite(Exception):
    """A layer's numbers forbid the update of all."""


class _NotReady(Exception):
    """The gradients seen do not suffice to decide; try again at the next step."""


class TopologyUpdater:
    """Base of the training methods: attaches to an optimizer through its step hooks.

    Subclasses say whether they act before the optimizer step (in its place) or after it, and what grows.
    """

    takes_batch: ClassVar[bool]  # an update takes the place of the optimizer step
    changes_topology: ClassVar[bool] = True

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
        optimizer = _innermost(optimizer)
        self._check_objects(model, optimizer)
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
        self._check_layers(layers, optimizer)
        self._optimizer, self._trackers = optimizer, [Tracker(n, m) for n, m in layers.items()]
        self._seed, self._block_score, self._expected = seed, block_score, grad_accumulation
        self.step_count = 0
        self.updates = 0
        self.failed_updates = 0
        self.updated = False
        self._last_update = self._window.never
        self._replaced = 0
        self._skip_step = False
        self._set_aside: list[tuple[Tensor, Tensor]] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        for held in (optimizer, *layers.values()):
            _attached[held] = weakref.ref(self)
        try:
            for tracker in self._trackers:
                tracker.watch()
            self._arm()
        except BaseException:
            self.remove()
            raise

    def _check_objects(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if self.changes_topology and isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS keeps one flat history over all parameters, which cannot follow a change of topology; "
                "use SGD, Adam, AdamW, RMSprop, ..., or rigl.Static"
            )
        _check_free(optimizer, "this optimizer")

    @staticmethod
    def _check_layers(layers: Mapping[str, SparseLayer], optimizer: torch.optim.Optimizer) -> None:
        if not layers:
            raise ValueError(
                "the model has no sparse layer; make some with model = rigl.sparsify(model, sparsity=...)"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [n for n, m in layers.items() if m.values.requires_grad and id(m.values) not in held]
        if missing:
            raise ValueError(
                f"the optimizer does not hold the values of sparse layer {missing[0]!r} ({len(missing)} of "
                f"{len(layers)} layers): build the optimizer after rigl.sparsify, from model.parameters()"
            )

        for name, layer in layers.items():
            _check_free(layer, f"layer {name!r}")

    # what a method decides ------------------------------------------------------------------

    def _grow(self, tracker: Tracker, drop: Tensor, dropped: Tensor, step: int) -> Tensor:
        """As many positions as `drop` has, out of those inactive or just dropped."""
        raise NotImplementedError

    def _check_ready(self, tracker: Tracker) -> bool:
        """Whether the layer takes part. Raises `_NotReady` or `_NotFinite`."""
        return True

    # hooks ----------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.updated, self._set_aside = False, None
        # A fused optimizer is called by GradScaler even when it must not step; it looks at this itself.
        overflow = getattr(optimizer, "found_inf", None)
        self._skip_step = overflow is not None and bool(overflow)
        if self._skip_step or not self.takes_batch or not self._due():
            return None
        args, kwargs = _evaluate_closure(args, kwargs)
        if self._update():
            self._set_aside = [
                (p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            for parameter, _ in self._set_aside:  # what has no gradient takes no step: no decay, no momentum
                parameter.grad = None
        return args, kwargs

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._skip_step:
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
        step, plans, problem = self.step_count, list[Plan](), ""
        try:
            plans = self._plan_all(step)
            for tracker in self._trackers:  # what the scorers hold is not needed any more
                tracker.disarm()
            apply_plans(plans, self._optimizer)
        except _NotReady as reason:
            if str(reason):
                message = f"topology update postponed by a step at step {step}: {reason}"
                warnings.warn(message, SkippedUpdateWarning, stacklevel=2)
            return False
        except _NotFinite as reason:
            problem = str(reason)
        except BaseException:
            self._arm()  # nothing has changed; the next batch is the next attempt
            raise
        self._last_update, self.updated = step, True
        if problem:
            self.failed_updates += 1
            spent = " and the optimizer took no step on this batch" if self.takes_batch else ""
            message = f"topology update at step {step} skipped: {problem}; no layer's topology changed{spent}"
            warnings.warn(message, NonFiniteWarning, stacklevel=2)
            return True
        self.updates += 1
        self._replaced = sum(plan.drop.numel() * plan.layer.topology.block_numel for plan in plans)
        logger.debug("step %d: %d weights replaced in %d layers", step, self._replaced, len(plans))
        return True

    def _plan_all(self, step: int) -> list[Plan]:
        wanted = [(tracker, k) for tracker in self._trackers if (k := self._count(tracker, step))]
        plans = [self._plan(tracker, k, step) for tracker, k in wanted if self._check_ready(tracker)]
        if wanted and not plans:
            raise _NotReady("no sparse layer has a gradient")
        return plans

    def _plan(self, tracker: Tracker, k: int, step: int) -> Plan:
        layer = tracker.layer
        scores = magnitudes(layer.values, self._block_score)
        if not bool(scores.isfinite().all()):
            raise _NotFinite(f"a weight of layer {tracker.name!r} is not finite")
        drop = smallest(scores, k)
        dropped = layer.topology.positions()[drop]
        drop, grow = rewire(drop, dropped, self._grow(tracker, drop, dropped, step))
        return Plan(tracker.name, layer, drop, grow)

    # for the user ---------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Figures for a log.

        Keys: `step_count`, `updates`, `failed_updates`, `drop_fraction` (the schedule's value now; 0
        outside `begin .. t_end`), `replaced` (weights exchanged by the last update), `sparsity` (of the
        sparse layers together).
        """
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
        keys = self.state_dict().keys()
        if not isinstance(state, Mapping) or not keys <= state.keys():
            got = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"expected the state of a {type(self).__name__}, with {', '.join(keys)}; got {got}"
            )
        if state["method"] != type(self).__name__:
            raise ValueError(f"this is the state of a {state['method']}, not of a {type(self).__name__}")
        counts = ("step_count", "updates", "failed_updates", "replaced")
        numbers = ("seed", "last_update", *counts)
        for key in numbers:
            if isinstance(state[key], bool) or not isinstance(state[key], int):
                raise ValueError(f"{key} must be an int, got {state[key]!r}")
            if key in counts and state[key] < 0:
                raise ValueError(f"{key} must not be negative, got {state[key]}")
        if state["last_update"] > state["step_count"]:
            raise ValueError(
                f"last_update must not be after step_count, got {state['last_update']} and "
                f"{state['step_count']}"
            )
        passes, names = state["passes"], {tracker.name for tracker in self._trackers}
        if not isinstance(passes, Mapping) or passes.keys() != names:
            other = ", ".join(sorted(names ^ set(passes))) if isinstance(passes, Mapping) else repr(passes)
            raise ValueError(f"the state is of a model with other sparse layers; not in both: {other}")
        for name, n in passes.items():
            if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
                raise ValueError(f"passes of layer {name!r} must be a positive int or None, got {n!r}")
        self._seed, self._last_update, self.step_count, self.updates, self.failed_updates, self._replaced = (
            state[key] for key in numbers
        )
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
        for held in (self._optimizer, *(tracker.layer for tracker in self._trackers)):
            del _attached[held]

    def __repr__(self) -> str:
        w = self._window
        return (
            f"{type(self).__name__}(layers={len(self._trackers)}, step_count={self.step_count}, "
            f"updates={self.updates}, begin={w.begin}, t_end={w.t_end}, delta_t={w.delta_t})"
        )


def _innermost(optimizer: Any) -> Any:
    """The optimizer that steps, out of wrappers such as Accelerate's: its hooks run when it really does."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _check_free(held: Any, name: str) -> None:
    """Raise ValueError if an updater acts on an optimizer or layer already."""

    def owner() -> TopologyUpdater | None:
        return _attached[held]() if held in _attached else None

    if owner() is not None:
        gc.collect()  # one that nobody can reach any more may be waiting for this
    if (other := owner()) is not None:
        raise ValueError(f"{type(other).__name__} is attached to {name} already; call its .remove() first")


def _evaluate_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call `step`'s closure, if it has one, and hand its loss on to the optimizer's first call of it.

    The update must come after the closure's backward pass, and before the optimizer's own step.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return args, kwargs
    with torch.enable_grad():
        losses = [closure()]

    def evaluated() -> Any:
        return losses.pop() if losses else closure()

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluated}
    return (args[0], evaluated, *args[2:]), kwargs
