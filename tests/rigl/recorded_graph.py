"""Stand-in for CUDA graphs on the CPU: `RecordedGraphs`, to be put in the place of `rigl.graphs.CudaGraphs`.

It repeats the operations of torch that a call made, on the same tensors, and nothing else: no Python of the
call runs again, hooks included. As with a CUDA graph, capture computes nothing (what was written is put back,
what was computed is spoilt), and must read nothing on the host. Graphs share memory: a replay spoils the
results of graphs that were captured later, which may stand where this one computes. Tensors are known by
their address: one that has moved since is an error here, where a CUDA graph would use the old memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_kernels import growth

_READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim")
_MEMORY_ONLY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class RecordedGraphs:
    """What `GraphedStep` captures with. Counts what was captured and replayed, and steps aside."""

    device_type: ClassVar[str] = "cpu"
    log: ClassVar[list[str]] = []

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self._records: list[Record] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.log.append("eager")
        yield

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        record, before = Record(), len(self._records)
        try:
            with record:
                call()
        finally:
            record.undo()
        self._records.append(record)

        def replay() -> None:
            self.log.append("replay")
            for later in self._records[before + 1 :]:
                later.spoil()
            record.replay()

        return replay


class Record(TorchDispatchMode):
    """Notes every operation, in-place ones and views among them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # what was written to, and what it held
        self._addresses: list[list[int]] = []  # of what each operation takes
        self._made: dict[int, Tensor] = {}  # by address of their memory; kept, so that no address comes twice
        self._tickets: list[Tensor] = []
        self._random = torch.get_rng_state()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "observe":  # runs Python on the host, which calls operators
            self._tickets.append(args[0])
            with self:
                return growth._observe(*args)
        inputs = _tensors((args, kwargs))
        if _waits(name, args, kwargs):
            if not any(t is ticket for t in inputs for ticket in self._tickets):  # those are on the CPU
                raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        self._before += [(t, t.detach().clone()) for t in written if _address(t) not in self._made]
        out = func(*args, **kwargs)
        outputs = _tensors(out)
        known = {_address(t) for t in inputs}
        for t in outputs:
            if _address(t) not in known:
                self._made[_address(t)] = t
        if name not in _MEMORY_ONLY:
            self._calls.append((func, args, kwargs, outputs))
            self._addresses.append([t.data_ptr() for t in inputs])
        return out

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what the call has written; spoil what it has computed."""
        for tensor, old in reversed(self._before):
            tensor.copy_(old)
        self._before.clear()
        torch.set_rng_state(self._random)
        self.spoil()

    @torch.no_grad()
    def spoil(self) -> None:
        """Overwrite all that the call has computed."""
        for tensor in self._made.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

    @torch.no_grad()
    def replay(self) -> None:
        for (func, args, kwargs, outputs), there in zip(self._calls, self._addresses, strict=True):
            assert there == [t.data_ptr() for t in _tensors((args, kwargs))], (
                f"an operand of {func} has moved"
            )
            for old, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if old is not new and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operation reads a value on the host, or has a shape that depends on one."""
    by_mask = name in ("index", "index_put", "index_put_") and any(
        isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    )
    unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
    return name in _READS or by_mask or unsized


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() or id(t)  # that of nothing is 0


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found
