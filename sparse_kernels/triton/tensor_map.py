"""Descriptors for the tensor memory accelerator (TMA), made on the host and kept.

A descriptor is address, shape, strides and box; the launcher encodes it into a kernel argument. It holds no
reference to memory here, so that a kept one keeps no activation alive; activations of a training loop come
back at the same addresses, and the entry of an address that is used otherwise is never asked for.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Address:
    """What a launcher asks of a descriptor's base: a tensor's address and dtype, without the tensor."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        """The address."""
        return self._address


@functools.lru_cache(maxsize=4096)
def _kept(address: int, dtype: torch.dtype, rows: int, cols: int, box: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(Address(address, dtype), [rows, cols], [cols, 1], list(box))


def tensor_map(tensor: Tensor, rows: int, cols: int, box: tuple[int, int]) -> TensorDescriptor:
    """The descriptor of boxes of a contiguous tensor, seen as a matrix `[rows, cols]`.

    Its memory must start, and its rows must end, on 16 bytes.
    """
    if not tensor.is_cuda:  # the interpreter reads the tensor itself
        return TensorDescriptor.from_tensor(tensor.view(rows, cols), list(box))
    return _kept(tensor.data_ptr(), tensor.dtype, rows, cols, box)
