"""Benchmarks: of the CPU `make bench` (docs/benchmarks.md), of GPUs `python -m bench.gpu` (docs/gpu.md)."""
