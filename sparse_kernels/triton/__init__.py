"""Triton kernels for NVIDIA GPUs, behind the same operators as the CPU kernels.

Importing this package imports no Triton; the kernel modules do, and are imported with the first product on a
GPU. Each holds device code and a launcher over plain tensors; `configs` says with which tile.
"""
