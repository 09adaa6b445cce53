"""The CPU benchmark by pytest-benchmark: `make bench`, or `pytest bench/suites -k "linear and csr"`."""
