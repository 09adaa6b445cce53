"""Two networks trained side by side, epoch by epoch in turn, so that noise of the machine hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_kernels.nn import SparseConv2d, SparseLinear


def count_weights(model: nn.Module) -> int:
    """Stored weights of Linear and Conv2d layers, dense or sparse, biases not counted."""
    total = 0
    for module in model.modules():
        if isinstance(module, (SparseLinear, SparseConv2d)):
            total += module.nnz
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            total += module.weight.numel()
    return total


def training_flops(dense: int, sparse: int, method: str, delta_t: int) -> float:
    """FLOPs of a training step with topology updates, relative to dense, averaged over the update period.

    A dense step costs 3 f_D (output, input gradient, weight gradient). RigL spends, per `delta_t` steps,
    one more batch on the whole gradient: (3 f_S delta_t + 2 f_S + f_D) / (delta_t + 1).

    Args:
        dense, sparse: forward multiply-adds per sample of either network.
        method: "rigl", or one that never needs the dense gradient.
        delta_t: steps between updates.
    """
    if method != "rigl":
        return sparse / dense
    return (3 * sparse * delta_t + 2 * sparse + dense) / (delta_t + 1) / (3 * dense)


@dataclass
class Contestant:
    """A network, what trains it, and what it cost so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    updater: Any = None
    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    update_steps: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def train_epoch(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """One step per batch, each timed as a whole: forward, backward, optimizer, topology update."""
        self.model.train()
        for x, y in batches:
            begin = time.perf_counter()
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            took = time.perf_counter() - begin
            self.seconds += took
            updated = self.updater is not None and self.updater.updated
            (self.update_steps if updated else self.steps).append(took)
            self.scheduler.step()

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> float:
        """Accuracy in [0, 1], noted with the training time that it took to get there."""
        self.model.eval()
        accuracy = (self.model(x).argmax(1) == y).double().mean().item()
        self.times.append(self.seconds)
        self.accuracies.append(accuracy)
        return accuracy

    def memory(self) -> dict[str, int]:
        """Bytes of live tensors: weights, gradients, optimizer state and (sparse layers) index arrays."""
        parameters = list(self.model.parameters())
        state = [
            value
            for slots in self.optimizer.state.values()
            for value in slots.values()
            if isinstance(value, Tensor)
        ]
        sparse = [m for m in self.model.modules() if isinstance(m, (SparseLinear, SparseConv2d))]
        return {
            "weights": _bytes(parameters),
            "gradients": _bytes([p.grad for p in parameters if p.grad is not None]),
            "optimizer": _bytes(state),
            "index": _bytes([m.topology.index for m in sparse]),
        }

    def result(self) -> dict[str, Any]:
        """The figures of the report."""
        memory = self.memory()
        everything = self.steps + self.update_steps
        return {
            "test_accuracy": self.accuracies[-1],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "step_ms": 1e3 * statistics.median(self.steps),
            "update_step_ms": 1e3 * statistics.median(self.update_steps) if self.update_steps else None,
            "mean_step_ms": 1e3 * statistics.fmean(everything),
            "train_seconds": self.seconds,
            "batches": len(everything),
            "updates": len(self.update_steps),
            "memory_bytes": sum(memory.values()),
            "memory": memory,
            "curve": {"seconds": self.times, "test_accuracy": self.accuracies},
        }


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
