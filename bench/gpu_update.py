"""What changing the topology costs on a GPU: growth scores, the update itself, their share of a training."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import rigl
import sparse_kernels as sk

from .gpu_rivals import Case, Operands, WrongResult, dense_calls, strict_float32
from .gpu_timing import Call, Clock, Sample

DELTA_T = 100  # steps between two updates, for the overhead of RigL


def growth_calls(o: Operands, score: str = "l1") -> list[Call]:
    """The fused kernel: norms of all blocks of dY^T X."""
    from sparse_kernels.triton import operators

    def call(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return operators.growth_norms(x, dy, o.case.block, o.case.block, score)

    return [lambda x=x, dy=dy: call(x, dy) for x, dy in zip(o.x, o.dy, strict=True)]  # type: ignore[misc]


def check_growth(o: Operands) -> None:
    """Norms against float32: sums over blocks, so that errors of entries average out."""
    with strict_float32():
        gradient = o.dy[0].float().t() @ o.x[0].float()
    expected = o.topology.to_blocks(gradient).abs().sum((-2, -1))
    found = growth_calls(o)[0]()
    assert isinstance(found, torch.Tensor)
    error = (found.flatten() - expected.flatten()).norm() / expected.norm()
    if not error <= 1e-2:
        raise WrongResult(f"growth scores are wrong and were not timed: relative error {error:.3g}")


def measure_growth(o: Operands, clock: Clock) -> dict[str, Sample]:
    """Ours against the dense weight gradient, which has the same multiply-adds."""
    check_growth(o)
    return clock.compare({"ours": growth_calls(o), "cuBLAS dW": dense_calls(o, "dW")})


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """Raise where the host would wait for the device. Nothing to do on a CPU."""
    if device != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Update:
    """One layer's topology update.

    Attributes:
        host: microseconds until `optimizer.step()` returns.
        device: microseconds of its work there.
        synchronisations: why there was one; empty if there was none.
    """

    host: Sample
    device: Sample
    synchronisations: str


class Training:
    """A sparse layer that RigL trains, with an update on every other batch: those can be looked at alone."""

    def __init__(self, case: Case, device: str) -> None:
        dtype = getattr(torch, case.dtype)
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.model = torch.nn.Sequential(
            sk.SparseLinear(
                case.inputs, case.outputs, False, density=case.density, block_size=case.block,
                generator=generator, device=device, dtype=dtype,
            )
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.method = rigl.RigL(
            self.model, self.optimizer, t_end=10**6, delta_t=1, schedule="constant", grad_accumulation=1
        )
        self.x = torch.randn(case.tokens, case.inputs, device=device, dtype=dtype)
        self.dy = torch.randn(case.tokens, case.outputs, device=device, dtype=dtype)

    def backward(self) -> None:
        """Forward and backward of one batch; scored, if the step to come is an update."""
        self.optimizer.zero_grad(set_to_none=False)
        self.model(self.x).backward(self.dy)

    def to_update(self) -> None:
        """Train until the next `optimizer.step()` is an update."""
        if self.method.updated:  # the batch after one is spent on the weights
            self.backward()
            self.optimizer.step()
        self.backward()

    def measure(self, clock: Clock) -> Update:
        """Updates one by one."""
        host, device, waits = [], [], ""
        with clock.on_stream(), warnings.catch_warnings():
            warnings.simplefilter("error", rigl.SkippedUpdateWarning)  # it would not be worth timing
            for turn in range(3 + clock.turns):
                self.to_update()
                before = self.method.updates
                if turn == 2:
                    waits = self._synchronisations()
                else:
                    times = clock.once(self.optimizer.step)
                    if turn > 2:
                        host.append(times[0])
                        device.append(times[1])
                if self.method.updates != before + 1:
                    raise WrongResult("an update that was due did not happen")
        return Update(_sample(host), _sample(device), waits)

    def _synchronisations(self) -> str:
        try:
            with no_synchronisation(self.device):
                self.optimizer.step()
        except RuntimeError as error:
            self.backward()  # the scores of the batch went with the attempt
            self.optimizer.step()
            return (str(error).splitlines() or ["synchronises"])[0][:120]
        return ""


def _sample(us: list[float]) -> Sample:
    fifths = statistics.quantiles(us, n=5, method="inclusive") if len(us) > 1 else us
    return Sample(statistics.median(us), fifths[0], fifths[-1], "eager")


def overhead(growth_us: float, update_us: float, step_us: float, delta_t: int = DELTA_T) -> float:
    """Share of the training time that growth scores and updates add to the products of a layer."""
    return (growth_us + update_us) / (delta_t * step_us)


def measure_host(clock: Clock, device: str, dtype: str) -> dict[str, Sample]:
    """Microseconds of Python, checks and launch of one operator call in eager mode.

    On a layer so small that the device is never behind.
    """
    o = Operands(Case(128, 256, 256, 64, 0.5, dtype), device, copies=1)
    x, values, dy = o.x[0], o.values.detach().clone().requires_grad_(), o.dy[0]
    backend = "triton" if device == "cuda" else "auto"
    with sk.use_backend(backend):
        frozen = values.detach()
        y = sk.functional.linear(x, values, o.topology)
        calls: dict[str, Call] = {
            "forward, no gradient": lambda: sk.functional.linear(x, frozen, o.topology),
            "forward": lambda: sk.functional.linear(x, values, o.topology),
            "dW": lambda: torch.autograd.grad(y, values, dy, retain_graph=True),
            "nn.functional.linear": lambda: torch.nn.functional.linear(x, o.dense),
        }
        for call in calls.values():
            call()
        return {name: clock.host(call) for name, call in calls.items()}
