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
def _kept(address: int, dtype: torch.dtype, shape: tuple[int, int], box: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(Address(address, dtype), list(shape), [shape[1], 1], list(box))


def tensor_map(matrix: Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """The descriptor of boxes of a contiguous matrix, whose memory starts and whose rows end on 16 bytes."""
    if matrix.device.type != "cuda":  # the interpreter reads the tensor itself
        return TensorDescriptor.from_tensor(matrix, list(box))
    return _kept(matrix.data_ptr(), matrix.dtype, (matrix.shape[0], matrix.shape[1]), box)
