"""One block-sparse Linear and its rivals on a GPU, as calls to be timed, and the check that comes before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_kernels as sk

from .gpu_timing import Call
from .roofline import Product

OPS = ("forward", "dX", "dW", "step")
COPIES = 3  # of activations, taken in rotation
FORWARD_ERROR, BACKWARD_ERROR = 2, 3  # times the error of the dense library in the same dtype


class WrongResult(RuntimeError):
    """A result that is not worth timing."""


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement: X is `[tokens, inputs]`, blocks are `block x block`."""

    tokens: int
    inputs: int
    outputs: int
    block: int
    density: float
    dtype: str = "bfloat16"

    @property
    def shape(self) -> str:
        """For tables."""
        return f"{self.tokens} x {self.inputs} -> {self.outputs}"

    @property
    def product(self) -> Product:
        """For the roofline."""
        size = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        return Product(self.tokens, self.inputs, self.outputs, self.block, self.block, self.density, size)

    @property
    def fits(self) -> bool:
        """Whether the block divides the weight."""
        return self.inputs % self.block == 0 and self.outputs % self.block == 0


class Operands:
    """Tensors of a case: one weight, sparse and dense, and several batches.

    Attributes:
        topology, values, dense: the weight.
        x, dy: batches.
    """

    def __init__(self, case: Case, device: str, copies: int = COPIES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        on_device = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, case.dtype)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=on_device, device=device, dtype=torch.float32)
            return (drawn * scale).to(dtype)

        self.case = case
        self.topology = sk.Topology.random(
            (case.outputs, case.inputs), case.density, case.block, generator=generator, device=device
        )
        fan_in = max(1.0, case.density * case.inputs)
        self.values = normal(*self.topology.values_shape, scale=fan_in**-0.5)
        self.dense = self.topology.to_dense(self.values)
        self.x = [normal(case.tokens, case.inputs) for _ in range(copies)]
        self.dy = [normal(case.tokens, case.outputs) for _ in range(copies)]


# ours -------------------------------------------------------------------------------------------


def sparse_calls(o: Operands, op: str, backend: str) -> list[Call]:
    """Our layer with one backend, by way of autograd."""
    return [_sparse_call(o, op, backend, x, dy) for x, dy in zip(o.x, o.dy, strict=True)]


def _sparse_call(o: Operands, op: str, backend: str, x: Tensor, dy: Tensor) -> Call:
    # Detached tensors share memory; each product gets the leaves that it needs gradients of, and no others.
    x = x.detach().requires_grad_(op in ("dX", "step"))
    values = o.values.detach().requires_grad_(op in ("dW", "step"))

    def forward() -> Tensor:
        with sk.use_backend(backend):
            return sk.functional.linear(x, values, o.topology)

    if op == "forward":
        return forward
    wanted = [t for t in (x, values) if t.requires_grad]
    if op == "step":
        return lambda: torch.autograd.grad(forward(), wanted, dy)
    y = forward()
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


# rivals -----------------------------------------------------------------------------------------


def dense_calls(o: Operands, op: str) -> list[Call]:
    """The dense library: cuBLAS on a GPU."""
    w = o.dense
    makers: dict[str, Callable[[Tensor, Tensor], Call]] = {
        "forward": lambda x, dy: lambda: F.linear(x, w),
        "dX": lambda x, dy: lambda: dy @ w,
        "dW": lambda x, dy: lambda: dy.t() @ x,
        "step": lambda x, dy: lambda: (F.linear(x, w), dy @ w, dy.t() @ x),
    }
    return [makers[op](x, dy) for x, dy in zip(o.x, o.dy, strict=True)]


def torch_bsr_calls(o: Operands, tune: bool) -> list[Call]:
    """The block-sparse kernel of torch, forward only: it has no backward. `tune`: by its own tuner, first."""
    from torch.sparse import _triton_ops, _triton_ops_meta

    weight = _torch_sparse(o, torch.sparse_bsr_tensor)
    meta = None  # what torch would choose
    if tune:  # nothing is stored: the untuned rival would find it
        dense = o.x[0].t()
        nothing = dense.new_zeros(weight.shape[0], dense.shape[1])
        meta = _triton_ops_meta.tune_bsr_dense_addmm(nothing, weight, dense, beta=0, store=False)

    def call(x: Tensor) -> Tensor:
        y = x.new_empty(weight.shape[0], x.shape[0])
        return _triton_ops.bsr_dense_addmm(y, weight, x.t(), beta=0, out=y, meta=meta).t()

    return [lambda x=x: call(x) for x in o.x]  # type: ignore[misc]


def torch_csr_calls(o: Operands) -> list[Call]:
    """By way of torch, cuSPARSE: the same weight, entry by entry."""
    weight = o.dense.to_sparse_csr()
    return [lambda x=x: (weight @ x.t()).t() for x in o.x]  # type: ignore[misc]


def _torch_sparse(o: Operands, make: Callable[..., Tensor]) -> Tensor:
    t = o.topology
    values = o.values if t.slot is None else o.values[t.slot.long()]
    return make(t.row_ptr.long(), t.col_idx.long(), values, size=t.shape, device=o.values.device)


PEERS: dict[str, Callable[[Operands], list[Call]]] = {
    "torch BSR": lambda o: torch_bsr_calls(o, tune=False),
    "torch BSR tuned": lambda o: torch_bsr_calls(o, tune=True),
    "torch CSR (cuSPARSE)": torch_csr_calls,
}


def peer_calls(o: Operands, names: list[str]) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """Forward of the peers that run here and are right, and why the others are left out."""
    found: dict[str, list[Call]] = {}
    refused: dict[str, str] = {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of beta features, and of parameters that are not optimal
            try:
                calls = PEERS[name](o)
                expected, dense = _references(o)["forward"]
                check(name, calls[0](), expected, dense, FORWARD_ERROR)  # type: ignore[arg-type]
                found[name] = calls
            # Whatever a peer raises is its answer: versions differ in what they support.
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return found, refused


# check ------------------------------------------------------------------------------------------


@contextmanager
def strict_float32() -> Any:
    """Without tf32: references must be better than what they judge."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check(name: str, actual: Tensor, expected: Tensor, rival: Tensor, factor: float) -> None:
    """Raise `WrongResult` if the largest error is above `factor` times that of the dense library.

    Args:
        name: for the message.
        actual: to be judged.
        expected: in float32.
        rival: the dense library's, in the dtype of `actual`. One unit in the last place of the largest entry
            is granted in any case; in float32, where the order of a sum decides, 16 of them.
    """
    if actual.shape != expected.shape:
        raise WrongResult(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    units = 16 if actual.dtype == torch.float32 else 1
    ulp = units * torch.finfo(actual.dtype).eps * expected.abs().max().item()
    error, granted = ((t.float() - expected).abs().max().item() for t in (actual, rival))
    if not error <= factor * max(granted, ulp):  # NaN is not
        raise WrongResult(
            f"{name} is wrong and was not timed: largest error {error:.3g}, more than {factor} times that of "
            f"the dense library in {actual.dtype}, {granted:.3g}"
        )


def _references(o: Operands) -> dict[str, tuple[Tensor, Tensor]]:
    """Of the first batch: product -> float32, and the dense library in the dtype of the case."""
    x, dy, w = o.x[0], o.dy[0], o.dense
    with strict_float32():
        wide = {
            "forward": F.linear(x.float(), w.float()),
            "dX": dy.float() @ w.float(),
            "dW": o.topology.gather(dy.float().t() @ x.float()),
        }
    narrow = {"forward": F.linear(x, w), "dX": dy @ w, "dW": o.topology.gather(dy.t() @ x)}
    return {op: (wide[op], narrow[op]) for op in wide}


def check_ours(o: Operands, backend: str) -> None:
    """All three products against float32, alone and together."""
    references = _references(o)
    found: dict[str, Any] = {op: sparse_calls(o, op, backend)[0]() for op in OPS}
    found |= {"dX": found["dX"][0], "dW": found["dW"][0]}
    found["step, dX"], found["step, dW"] = found.pop("step")
    for name, actual in found.items():
        op = name.removeprefix("step, ")
        factor = FORWARD_ERROR if op == "forward" else BACKWARD_ERROR
        check(f"{o.case.shape}, block {o.case.block}: {name}", actual, *references[op], factor)
