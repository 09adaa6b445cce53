"""RigL under CUDA graphs: `rigl.GraphedStep` does what the eager loop does, bit for bit.

What it decides is tested without a GPU in `tests/rigl/test_graphed_*.py`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rigl
import sparse_kernels as sk

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # a prototype, says torch
]

STEPS = 60
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "capturable": lambda p: torch.optim.AdamW(p, lr=0.001, capturable=True),
    "lr in a tensor": lambda p: torch.optim.Adam(
        p, lr=torch.tensor(0.001, device="cuda"), capturable=True, fused=True
    ),
    "fused": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05, device="cuda"), momentum=0.9, fused=True),
    "behind the graph": lambda p: torch.optim.AdamW(p, lr=0.001),
}


def net(block_size: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        sk.SparseLinear(512, 1024, density=0.25, block_size=block_size),
        nn.ReLU(),
        nn.Dropout(0.1),
        sk.SparseLinear(1024, 256, density=0.25, block_size=block_size),
    ).to("cuda", dtype)


def batches(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = torch.randn(200, 512, generator=g), torch.randint(256, (200,), generator=g)
        yield x.to("cuda", dtype), y.cuda()


def train(
    block_size: int,
    dtype: torch.dtype,
    optimizer: str,
    graphed: bool,
    method: Any = rigl.RigL,
    wrap: Any = None,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Losses, and all that training has changed; the log of the method."""
    model = net(block_size, dtype)
    used = model if wrap is None else wrap(model)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    updater = method(used, stepper, t_end=200, delta_t=5, alpha=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(stepper, 25)
    step = rigl.GraphedStep(used, F.cross_entropy, stepper, updater) if graphed else None
    losses = []
    for i, (x, y) in enumerate(batches(dtype)):
        torch.manual_seed(i)
        # Once all is captured nothing waits (at 25 the learning rate changes). SET chooses on the host.
        quiet = graphed and method is rigl.RigL and i > 12 and not 25 <= i <= 31
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            if step is not None:
                losses.append(step(x, y))
            else:
                stepper.zero_grad()
                loss = F.cross_entropy(used(x), y)
                loss.backward()
                stepper.step()
                losses.append(loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scheduler.step()
    assert updater.updates >= 5
    found = [torch.stack(losses), *(p.detach() for p in model.parameters())]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    for layer in (model[0], model[3]):
        layer.topology.validate()
        found.append(layer.topology.index)
        found += [t for t in stepper.state[layer.values].values() if isinstance(t, Tensor)]
    if graphed:
        assert step._plain is not None
        assert (step._scored is not None) == (method is rigl.RigL)
    return found, updater.state_dict()


def same(one: tuple[list[Tensor], dict[str, Any]], other: tuple[list[Tensor], dict[str, Any]]) -> None:
    assert one[1] == other[1]
    assert len(one[0]) == len(other[0])
    for i, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
        assert torch.equal(a, b), f"tensor {i} differs"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_60_steps_as_the_eager_loop(optimizer: str, dtype: torch.dtype) -> None:
    with sk.use_backend("triton"):
        same(train(64, dtype, optimizer, False), train(64, dtype, optimizer, True))


@pytest.mark.parametrize("method", [rigl.RigL, rigl.SET])
@pytest.mark.parametrize("block_size", [1, 16])
def test_other_blocks_and_methods(block_size: int, method: Any) -> None:
    """With the products that the library chooses."""
    runs = [train(block_size, torch.float32, "momentum", graphed, method) for graphed in (False, True)]
    same(*runs)


def test_a_compiled_model_in_a_graph() -> None:
    """In one piece, topology batches included."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    def wrap(model: nn.Module) -> Any:
        model[2].p = 0.0  # the compiler draws other numbers
        return torch.compile(model, fullgraph=True, dynamic=False, backend=counting)

    with sk.use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        runs = [train(64, torch.bfloat16, "momentum", graphed, wrap=wrap) for graphed in (False, True)]
    torch._dynamo.reset()
    same(*runs)
    assert len(graphs) <= 4, f"{len(graphs)} compilations for two models"


def test_graphs_share_their_memory() -> None:
    """The second graph finds most of its memory in the first one's."""
    model = net(64, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = rigl.RigL(model, optimizer, t_end=200, delta_t=8)
    step, held = rigl.GraphedStep(model, F.cross_entropy, optimizer, method), []
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(1 << 14, 512, generator=g), torch.randint(256, (1 << 14,), generator=g)
    x, y = x.to("cuda", torch.bfloat16), y.cuda()
    with sk.use_backend("triton"):
        for _ in range(12):
            step(x, y)
            if step._plain is not None and (not held or (step._scored is not None and len(held) < 2)):
                torch.cuda.empty_cache()
                held.append(torch.cuda.memory_reserved())
    one, both = held
    activation = x.shape[0] * 1024 * x.element_size()  # of which a pass keeps several
    assert both - one < activation, "as if nothing were shared"


def test_the_example_of_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "gpu.md"
    for code in re.findall(r"^```python gpu\n(.*?)^```", page.read_text(), flags=re.S | re.M):
        scope: dict[str, Any] = {"__name__": "snippet"}
        exec(compile(code, "gpu.md", "exec"), scope)
        assert scope["method"].updates > 2
    assert "'updates': 4.0" in capsys.readouterr().out
