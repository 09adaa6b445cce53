"""Benchmarks: `python -m bench.run --help`. Ratios against torch's best dense, interleaved, medians."""
