"""Launching a kernel again without asking Triton which one it is.

Triton looks at the type and alignment of every argument at every launch, which takes longer than small
kernels do. Here a launch is known by its compile-time arguments, dtypes and device. Its callers see to the
rest: pointers start on 16 bytes, sizes that vary are not compiled in. So one compiled kernel fits all calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

#: Whether this is the Triton that code without a stable interface was written for: launching, and Gluon.
KNOWN = triton.__version__.startswith("3.6.")
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function of tensors with the device of the first as the current one: Triton launches there."""

    @functools.wraps(function)
    def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(first, *args, **kwargs)
        return function(first, *args, **kwargs)

    return run


def aligned(t: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that is contiguous and starts on 16 bytes, as TMA and repeated launches want."""
    t = t.contiguous()  # the gradient of a sum, for one, has strides of 0
    return t if t.data_ptr() % 16 == 0 else t.clone()


class Launch:
    """One kernel with its compile-time arguments, on one device.

    Args:
        kernel: a `triton.jit` function.
        constants: its compile-time arguments, and options.
    """

    __slots__ = ("_compiled", "_constants", "_fixed", "_kernel")

    def __init__(self, kernel: Any, constants: Mapping[str, Any]) -> None:
        self._kernel, self._constants = kernel, dict(constants)
        self._fixed = tuple(constants[n] for n in kernel.arg_names if n in constants and n not in _OPTIONS)
        self._compiled: CompiledKernel | None = None

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on the current stream. `args`: the run-time arguments, which come first."""
        if self._compiled is None:
            found = self._kernel[grid](*args, **self._constants)
            if isinstance(found, CompiledKernel):  # the interpreter has none
                self._compiled = found
            return
        compiled, hooks = self._compiled, knobs.runtime
        if not KNOWN or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # of profilers
            compiled[grid](*args, *self._fixed)
            return
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        # Behind the function: packed metadata, what hooks are told, and two hooks.
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *self._fixed
        )
