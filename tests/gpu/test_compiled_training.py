"""RigL with a model compiled in one piece: products are operators to the compiler, and updates reach them."""

from __future__ import annotations

import warnings
from typing import Any

import drill_cases as dc
import pytest
import torch
from torch import Tensor, nn

import rigl
import sparse_kernels as sk


def train(device: str, dtype: torch.dtype, compile_model: Any) -> tuple[list[Tensor], rigl.RigL]:
    """Output and gradients of every step, and what training left."""
    torch.manual_seed(0)
    side = 256 if device == "cuda" else 64
    layers = [dc.layer(device, side, side, b, 0.4, dtype=dtype) for b in (16, 32)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    function = compile_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"alpha": 0.5, "schedule": "constant", "grad_accumulation": 1}
    method = rigl.RigL(model, optimizer, t_end=200, delta_t=2, **settings)  # type: ignore[arg-type]
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(dc.few(device, 40, 8)):
        x = torch.randn(96, side, generator=generator).to(device, dtype)
        optimizer.zero_grad()
        y = function(x)
        (y - x).square().mean().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    for layer in layers:
        layer.topology.validate()
        found.append(layer.topology.index)
    return [*found, *(p.detach() for p in model.parameters())], method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_in_two_compilations_is_the_eager_one(device: str, dtype: torch.dtype) -> None:
    """One of ordinary steps, one of those that are scored, whatever the topology becomes; no graph break."""
    if dtype == torch.bfloat16 and device != "cuda":
        pytest.skip("the interpreter knows no bfloat16")
    inner, compilations = "inductor" if device == "cuda" else "aot_eager", []

    def counting(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return torch._dynamo.lookup_backend(inner)(graph, inputs)

    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, fullgraph=True, dynamic=False, backend=counting)

    torch._dynamo.reset()
    with warnings.catch_warnings(), sk.use_backend("triton"):
        warnings.simplefilter("ignore")  # the compiler's own
        eager, method = train(device, dtype, lambda model: model)
        ours, other = train(device, dtype, compiled)
    torch._dynamo.reset()
    assert len(compilations) == 2, f"{len(compilations)} compilations"
    assert method.updates == other.updates >= 3
    assert method.metrics() == other.metrics()
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a, b)
