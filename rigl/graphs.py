"""Training steps as CUDA graphs, topology updates included.

The kernels read the topology from buffers that an update changes in place, so a graph captured before it is
right after it. What a method does through hooks is Python, and does not run when a graph is replayed: that is
made up for here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from sparse_kernels.backend import requested

from .attaching import innermost
from .tracking import Probe, Tracker
from .updater import TopologyUpdater

_WARM_UP = {False: 3, True: 1}  # eager steps of each kind (scored or not) before its capture


class Graphs(Protocol):
    """Where steps are captured: graphs that share memory, and are captured on one stream."""

    device_type: ClassVar[str]

    def __init__(self, device: torch.device) -> None: ...

    def aside(self) -> AbstractContextManager[None]:
        """A context for what is to run on that stream, after all before it and before all behind it."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work of `call` for the device, which is recorded here and not done."""


class CudaGraphs:
    """`Graphs` of CUDA."""

    device_type: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """See `Graphs`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """See `Graphs`."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: one that pins memory for a DataLoader may go on.
        recording = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        # The outer context: one that fails to record leaves the other stream current.
        here = torch.cuda.stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), here, recording:
            call()
        return graph.replay


@dataclass(frozen=True)
class _Captured:
    """A captured step.

    Attributes:
        replay: does it again, with what the batch's buffers hold by then.
        loss, grads: where it leaves its results; a gradient for each of the model's parameters.
        probes: the scorers that hold what it found, if the step is scored.
        steps: whether it includes the optimizer's step.
    """

    replay: Callable[[], None]
    loss: Tensor
    grads: list[Tensor | None]
    probes: list[tuple[Tracker, Probe]]
    steps: bool


class GraphedStep:
    """A training step that is replayed as a CUDA graph: `loss = step(x, y)`.

    A call does what this does, with the same numbers, `method` included:

        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()

    The first steps run eagerly; then there are two graphs, with one pool of memory: one of ordinary steps,
    one of the forward and backward pass of topology batches, with their scores. The update itself runs
    eagerly behind that. The host waits for nothing, unless the batch comes from it.

    The optimizer's step is part of the graph if it can be: SGD, and optimizers with `capturable=True`. It
    runs eagerly behind the graph for others, if there are more step hooks than the method's, and from the
    moment on when a setting such as the learning rate is another number. A learning rate in a CUDA tensor
    (`lr=torch.tensor(0.1, device="cuda")`, with `capturable=True`, or SGD with `fused=True`) may change and
    stay in the graph: schedulers write to it.

    What else a graph depends on is compared before every step, and captured anew when it differs: whether the
    model is in training mode, which parameters are trained, where parameters, indices and optimizer state
    lie, autocast, `use_backend`. Any other decision that Python takes in the model is not made again.

    Example:
        step = rigl.GraphedStep(model, torch.nn.functional.cross_entropy, optimizer, method)
        for x, y in batches:
            loss = step(x, y)
    """

    _graphs: ClassVar[type[Graphs]] = CudaGraphs

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        method: TopologyUpdater,
    ) -> None:
        """Nothing is run or captured yet.

        Args:
            model: on one GPU. It is called with the first tensor of a batch.
            loss_fn: called with the model's output and the batch's other tensors; returns a scalar.
            optimizer: of the model's parameters.
            method: `rigl.RigL`, `rigl.SET` or `rigl.Static`, attached to `optimizer`.

        Raises:
            ValueError: a model that is not on one GPU; a method that is not attached to this optimizer, or
                that accumulates gradients over several backward passes.
            TypeError: arguments of another type, such as a GradScaler.
        """
        optimizer = innermost(optimizer)
        _check(model, loss_fn, optimizer, method)
        devices = sorted({str(p.device) for p in model.parameters()})
        if len(devices) != 1 or torch.device(devices[0]).type != self._graphs.device_type:
            raise ValueError(
                f"the model must be on one GPU for CUDA graphs, got parameters on {', '.join(devices)}: use "
                'model.to("cuda") and build optimizer and method after it, or call model, backward() and '
                "optimizer.step() yourself, which works everywhere"
            )
        self._model, self._loss_fn, self._optimizer, self._method = model, loss_fn, optimizer, method
        self._device = torch.device(devices[0])
        self._parameters = list(model.parameters())
        self._batch: list[Tensor] = []  # what the graphs read; made for the first batch
        self._situation = self._look()
        self._steady = True  # the optimizer's settings have not changed since a graph was made of them
        self._settings: list[Any] = []
        self._done = dict.fromkeys(_WARM_UP, 0)
        self._plain: _Captured | None = None
        self._scored: _Captured | None = None
        self._memory: Graphs = self._graphs(self._device)

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        """Take a step.

        Args:
            x: what the model is called with. Copied, from any device, as are the others.
            rest: what `loss_fn` is called with besides the output.

        Returns:
            the loss, a tensor of its own without a graph.

        Raises:
            ValueError: another number of tensors, shape or dtype than the first batch had.
            TypeError: something that is not a tensor.
            RuntimeError: a step that cannot be captured, because it waits for the GPU.
        """
        self._load((x, *rest))
        self._follow()
        scored = self._method.takes_batch and self._method._due()
        # The graph of ordinary steps comes first: the other one leaves gradients where that has them.
        if self._done[scored] < _WARM_UP[scored] or (scored and self._plain is None):
            loss = self._eager()
            self._done[scored] += 1
            return loss
        captured = self._scored_graph() if scored else self._plain_graph()
        if captured.steps:
            self._method._before_step(self._optimizer, (), {})
            self._replay(captured)
            self._method._after_step(self._optimizer, (), {})
        else:
            self._replay(captured)
            self._optimizer.step()  # its hooks update the topology, and spend the batch on that
        return captured.loss.clone()

    def __repr__(self) -> str:
        return f"GraphedStep({self._method!r}, device={self._device})"

    # one step -------------------------------------------------------------------------------

    def _load(self, batch: tuple[Tensor, ...]) -> None:
        for tensor in batch:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"a batch must be made of tensors, got {type(tensor).__name__}")
        if not self._batch:
            self._batch = [torch.empty_like(t, device=self._device, requires_grad=False) for t in batch]
        wanted, got = ([(tuple(t.shape), t.dtype) for t in tensors] for tensors in (self._batch, batch))
        if got != wanted:
            raise ValueError(
                f"expected a batch like the first one, {_list(wanted)}, got {_list(got)}: a graph has fixed "
                "shapes (DataLoader(..., drop_last=True) leaves the last, smaller batch out)"
            )
        with torch.no_grad():
            for ours, theirs in zip(self._batch, batch, strict=True):
                ours.copy_(theirs)

    def _pass(self) -> Tensor:
        """Forward and backward pass of what the buffers hold."""
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights cast outside of a graph would stay as they are
        try:
            with torch.enable_grad():
                loss = self._loss_fn(self._model(self._batch[0]), *self._batch[1:])
                loss.backward()
        finally:
            torch.set_autocast_cache_enabled(cached)
        return loss.detach()

    def _eager(self) -> Tensor:
        with self._memory.aside():
            self._optimizer.zero_grad()
            loss = self._pass()
            self._optimizer.step()
        return loss.clone()

    def _replay(self, captured: _Captured) -> None:
        captured.replay()
        for parameter, grad in zip(self._parameters, captured.grads, strict=True):
            if parameter.grad is not grad:
                parameter.grad = grad
        for tracker, probe in captured.probes:
            tracker.layer.growth = probe

    # what is captured -----------------------------------------------------------------------

    def _plain_graph(self) -> _Captured:
        if self._plain is None:
            self._settings = _settings(self._optimizer)
            self._plain = self._capture(self._steady and _can_capture(self._optimizer, self._device))
        return self._plain

    def _scored_graph(self) -> _Captured:
        armed = _probes(self._method)
        if self._scored is not None and not _covers(self._scored.probes, armed):
            self._scored = None
        if self._scored is None:
            self._scored = self._capture(False, self._plain)
        return self._scored

    def _capture(self, steps: bool, before: _Captured | None = None) -> _Captured:
        """Capture a pass, and the optimizer's step if `steps`; gradients go to where `before` has them."""
        found: list[Tensor] = []
        self._optimizer.zero_grad()

        def call() -> None:
            found.append(self._pass())
            for parameter, grad in zip(self._parameters, before.grads if before else (), strict=False):
                if parameter.grad is not None and grad is not None:
                    parameter.grad = grad.copy_(parameter.grad)
            if steps:
                self._optimizer.step()

        self._method._recording = True
        try:
            replay = self._memory.capture(call)
        except Exception as error:
            self._forget()
            for tracker in self._method._trackers:  # what was seen of this pass has not happened
                tracker.end_step()
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RuntimeError(
                f"the training step could not be captured in a CUDA graph: {reason}. Model, loss and "
                "optimizer must not wait for the GPU (item(), printing, boolean masks, ...), and no loss "
                "of an earlier eager step may still be held with its graph: keep loss.detach()"
            ) from error
        finally:
            self._method._recording = False
        grads = [parameter.grad for parameter in self._parameters]
        return _Captured(replay, found[0], grads, _probes(self._method), steps)

    def _forget(self) -> None:
        """Drop the graphs. They share memory, so they go together."""
        self._plain = self._scored = None
        self._memory = self._graphs(self._device)

    def _follow(self) -> None:
        """Drop what was captured if that would do something else by now."""
        situation = self._look()
        if situation != self._situation:
            self._situation = situation
            self._forget()
            self._done = dict.fromkeys(_WARM_UP, 0)
        elif self._plain is not None and self._plain.steps and self._changed(_settings(self._optimizer)):
            self._steady = False
            self._forget()

    def _changed(self, settings: list[Any]) -> bool:
        # A tensor is read when the graph is replayed: only another one counts.
        return len(settings) != len(self._settings) or not all(
            old is new or (not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new)
            for old, new in zip(self._settings, settings, strict=True)
        )

    def _look(self) -> Any:
        """What a graph depends on, besides the shapes of a batch and the optimizer's settings."""
        kind = self._device.type
        return (
            self._model.training,
            [(p.data_ptr(), p.requires_grad) for p in self._parameters],
            [tracker.layer.topology.index.data_ptr() for tracker in self._method._trackers],
            id(self._optimizer.state),  # another dictionary after `load_state_dict`
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            requested(),
        )


def _check(model: Any, loss_fn: Any, optimizer: Any, method: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if isinstance(optimizer, torch.amp.GradScaler):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, got a GradScaler, which decides on the host whether "
            "to step and cannot be captured: use bfloat16, which needs no loss scaling"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(method, TopologyUpdater):
        raise TypeError(f"method must be a rigl.RigL, rigl.SET or rigl.Static, got {type(method).__name__}")
    if method._optimizer is not optimizer or not method._handles:
        raise ValueError(
            f"the {type(method).__name__} is not attached to this optimizer: build it with the same one"
        )
    passes = [t.passes for t in method._trackers if t.passes is not None]
    if (most := max([method._expected or 1, *passes])) > 1:
        raise ValueError(
            f"a graphed step is one backward pass, but the {type(method).__name__} accumulates gradients "
            f"over {most}: use a larger batch, or call model, backward() and optimizer.step() yourself"
        )


def _list(signature: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return " and ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in signature)


def _probes(method: TopologyUpdater) -> list[tuple[Tracker, Probe]]:
    return [(t, t.probe) for t in method._trackers if t.probe is not None]


def _covers(captured: list[tuple[Tracker, Probe]], armed: list[tuple[Tracker, Probe]]) -> bool:
    """Whether the captured scores are of the layers to update, with enough candidates for each."""
    return [t for t, _ in captured] == [t for t, _ in armed] and all(
        old.topology.is_bsr or old.k >= new.k  # for blocks all scores are there
        for (_, old), (_, new) in zip(captured, armed, strict=True)
    )


def _settings(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What a captured step makes constants of: settings (not what a scheduler notes beside them), hooks."""
    found: list[Any] = [_only_the_method_hooks(optimizer)]
    for group in optimizer.param_groups:
        for name in optimizer.defaults:
            value = group.get(name)
            found += value if isinstance(value, (tuple, list)) else [value]
    return found


def _only_the_method_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there are no more: hooks do not run when a graph is replayed."""
    return len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1


def _can_capture(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether a replayed step does what the optimizer would."""
    if not _only_the_method_hooks(optimizer):
        return False
    tensors = [value for value in _settings(optimizer) if isinstance(value, Tensor)]
    if any(t.device != device for t in tensors):  # read once, by the host
        return False
    if type(optimizer) is torch.optim.SGD:
        return not tensors or all(group["fused"] for group in optimizer.param_groups)
    return all(group.get("capturable", False) for group in optimizer.param_groups)
