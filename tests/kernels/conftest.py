"""What a run on a forced instruction set (tests/instruction_sets.py) is worth: that it was in force."""

from __future__ import annotations

import os

import pytest
import torch

import sparse_kernels


@pytest.fixture(scope="session", autouse=True)
def _the_set_asked_for() -> None:
    asked = os.environ.get("SPARSE_KERNELS_ISA")
    found = torch.ops.sparse_kernels.cpu_isa()
    assert asked in (None, "", found), f"{sparse_kernels.__file__}: {found} where {asked} was asked for"
