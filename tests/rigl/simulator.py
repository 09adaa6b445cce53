"""RigL on dense float64 weights and masks, written from the specification: the oracle of the training tests.

Shares no code with the package. Optimizers act on active entries only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Layer:
    weight: Tensor
    bias: Tensor
    mask: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class MaskedMLP:
    """A ReLU network of masked layers under SGD with momentum, or AdamW."""

    layers: list[Layer]
    optimizer: str
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    steps: int = 0

    def gradients(self, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Of the summed loss, with respect to the effective (masked) weights and the biases."""
        effective = [(layer.weight * layer.mask).requires_grad_() for layer in self.layers]
        biases = [layer.bias.clone().requires_grad_() for layer in self.layers]
        loss = torch.zeros((), dtype=torch.float64)
        for x, y in batches:
            for i, (w, b) in enumerate(zip(effective, biases, strict=True)):
                x = F.linear(x if i == 0 else x.relu(), w, b)
            loss = loss + F.cross_entropy(x, y) / len(batches)
        grads = torch.autograd.grad(loss, [*effective, *biases])
        return list(zip(grads[: len(effective)], grads[len(effective) :], strict=True))

    def train_step(self, grads: list[tuple[Tensor, Tensor]]) -> None:
        self.steps += 1
        for layer, (dw, db) in zip(self.layers, grads, strict=True):
            layer.weight = self._stepped(layer, "w", layer.weight, dw * layer.mask) * layer.mask
            layer.bias = self._stepped(layer, "b", layer.bias, db)

    def _stepped(self, layer: Layer, key: str, p: Tensor, g: Tensor) -> Tensor:
        def slot(name: str) -> Tensor:
            return layer.state.setdefault(f"{key}.{name}", torch.zeros_like(p))

        if self.optimizer == "sgd":
            g = g + self.weight_decay * p
            velocity = slot("momentum").mul_(self.momentum).add_(g)
            return p - self.lr * velocity
        p = p * (1 - self.lr * self.weight_decay)
        first = slot("first").mul_(0.9).add_(0.1 * g)
        second = slot("second").mul_(0.999).add_(0.001 * g * g)
        size = (second / (1 - 0.999**self.steps)).sqrt() + 1e-8
        return p - self.lr * first / (1 - 0.9**self.steps) / size

    def update_topology(self, grads: list[tuple[Tensor, Tensor]], fraction: float) -> None:
        for layer, (dw, _) in zip(self.layers, grads, strict=True):
            weight, score = layer.weight.flatten().tolist(), dw.abs().flatten().tolist()
            active = layer.mask.flatten().nonzero().flatten().tolist()
            k = math.trunc(
                (torch.tensor(float(len(active))) * torch.tensor(fraction, dtype=torch.float32)).item()
            )
            kept = set(sorted(active, key=lambda i: (abs(weight[i]), i))[k:])
            candidates = sorted(set(range(len(weight))) - kept, key=lambda i: (-score[i], i))
            new = torch.zeros_like(layer.mask).flatten()
            new[sorted(kept | set(candidates[:k]))] = True
            new = new.reshape(layer.mask.shape)
            stays = new & layer.mask
            layer.mask = new
            layer.weight = torch.where(stays, layer.weight, 0.0)
            for name, slot in layer.state.items():
                if name.startswith("w."):
                    slot.mul_(stays)
