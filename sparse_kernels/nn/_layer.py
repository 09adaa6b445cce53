"""What SparseLinear and SparseConv2d share: values and index arrays, conversions, state, updates."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..growth import GrowthScorer
from ..rewiring import reorder_
from ..topology import Topology

_Self = TypeVar("_Self", bound="SparseLayer")

_INDEX_KEYS = ("row_ptr", "col_idx")
# Of a state, beside the parameters. weight_shape only tells a mix-up; slot is there where values do not stand
# in the order of their positions.
_KEYS = ("weight_shape", *_INDEX_KEYS, "slot")


class SparseLayer(nn.Module):
    """A layer whose weight is stored as its active values and their topology.

    Attributes:
        values: `nn.Parameter`, `[nnz]` (CSR) or `[n_blocks, b_out, b_in]` (BSR). Keeps its identity,
            shape and memory for the layer's whole life, topology updates included.
        bias: `nn.Parameter` `[out]`, or None.
        topology: where the values stand.
        growth: set by a training method on a topology batch: what the backward shows its gradient to.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    topology: Topology

    def _setup(
        self, topology: Topology, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(
                f"dtype must be floating point (float32, float64, bfloat16 or float16), got {dtype}"
            )
        self.topology = topology
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(topology.values_shape, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(topology.shape[0], **factory))
        else:
            self.register_parameter("bias", None)
        self.growth: GrowthScorer | None = None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The initialisation of `nn.Linear` and `nn.Conv2d` (by dense fan-in), at the active positions."""
        fan_in = self.topology.shape[1] * self.topology.taps
        bound = fan_in**-0.5 if fan_in else 0.0
        with torch.no_grad():
            for parameter in (self.values, self.bias):
                if parameter is not None:
                    _draw(parameter, bound, generator)

    # views ----------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """Active weights."""
        return self.topology.nnz

    @property
    def density(self) -> float:
        """Active fraction of the weight."""
        return self.topology.density

    @property
    def block_size(self) -> int | tuple[int, int]:
        """`b` for square blocks (1 for CSR), else `(b_out, b_in)`."""
        b_out, b_in = self.topology.block_size
        return b_out if b_out == b_in else (b_out, b_in)

    def mask(self) -> Tensor:
        """Bool tensor of the dense weight's shape: True where active."""
        return self.topology.mask()

    def dense_weight(self) -> Tensor:
        """The dense weight, zeros where inactive. Differentiable with respect to `values`."""
        return self.topology.to_dense(self.values)

    @property
    def _ticket(self) -> Tensor | None:
        """What the backward names the growth scorer by."""
        return None if self.growth is None else self.growth.ticket

    # conversion -----------------------------------------------------------------------------

    @classmethod
    def _topology_for(
        cls,
        weight: Tensor,
        mask: Tensor | None,
        density: float | None,
        block_size: int | tuple[int, int],
        groups: int,
        generator: torch.Generator | None,
    ) -> Topology:
        if (mask is None) == (density is None):
            raise ValueError("give exactly one of mask= and density=")
        if mask is None:
            assert density is not None
            return Topology.random(tuple(weight.shape), density, block_size, groups, generator, weight.device)
        if mask.shape != weight.shape:
            raise ValueError(
                f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
            )
        active = mask.detach() != 0
        if not torch.equal(active.to(mask.dtype), mask.detach()):
            raise ValueError("mask must be a bool tensor, or hold 0 and 1 only")
        topology = Topology.from_mask(active, block_size, groups).to(weight.device)
        if not torch.equal(topology.mask(), active.to(topology.device)):
            raise ValueError(
                f"the mask is not made of whole blocks of {topology.block_size}; "
                "use block_size=1 or a mask that is"
            )
        return topology

    def _adopt(self, module: nn.Linear | nn.Conv2d) -> None:
        """Copy values at the active positions, bias, and what a module carries besides its weights."""
        with torch.no_grad():
            if not self.values.is_meta:
                self.values.copy_(self.topology.gather(module.weight.detach()))
            if self.bias is not None and module.bias is not None:
                self.bias.copy_(module.bias)
        self.values.requires_grad_(module.weight.requires_grad)
        if self.bias is not None and module.bias is not None:
            self.bias.requires_grad_(module.bias.requires_grad)
        self.train(module.training)

    def _fill_dense(self, module: Any) -> Any:
        """The inverse of `_adopt`."""
        with torch.no_grad():
            if not self.values.is_meta:
                module.weight.copy_(self.dense_weight())
            if self.bias is not None:
                module.bias.copy_(self.bias)
        module.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            module.bias.requires_grad_(self.bias.requires_grad)
        return module.train(self.training)

    # topology -------------------------------------------------------------------------------

    def update_topology(self, drop: Tensor, grow: Tensor) -> Tensor:
        """Drop active positions and grow others in place; kept values stay, grown ones are zero.

        See `Topology.update_` for arguments, errors and what is returned. Bring optimizer state along
        with `reorder_(state, source)`.
        """
        source = self.topology.update_(drop, grow)
        reorder_(self.values.data, source)
        if self.values.grad is not None:
            reorder_(self.values.grad, source)
        return source

    # state ----------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Clones: a checkpoint must not change when the topology later does, and safetensors refuses
        # tensors that share memory.
        for key in _INDEX_KEYS:
            destination[prefix + key] = getattr(self.topology, key).clone()
        if self.topology._slots_moved:
            assert self.topology.slot is not None
            destination[prefix + "slot"] = self.topology.slot.clone()
        destination[prefix + "weight_shape"] = torch.tensor(self.topology.shape, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {key: state_dict[prefix + key] for key in _KEYS if prefix + key in state_dict}
        needed = ("values", *_INDEX_KEYS)
        lacking = [key for key in needed if prefix + key not in state_dict]
        if strict:
            missing_keys.extend(prefix + key for key in _INDEX_KEYS if key not in found)
        index, problem = None, ""
        if not lacking:
            # All is checked before anything changes: indices and values belong together.
            try:
                self._check_state(state_dict, prefix)
                index = self.topology.build(found["row_ptr"], found["col_idx"], found.get("slot"))
            except (ValueError, TypeError) as error:
                problem = str(error)
        elif len(lacking) < len(needed) or "slot" in found:
            present = ", ".join(key for key in (*needed, "slot") if prefix + key in state_dict)
            problem = f"{present} without {', '.join(lacking)}: values and indices belong together"
            if strict and "values" in lacking:
                missing_keys.append(prefix + "values")
        if problem:
            error_msgs.append(f"{prefix or type(self).__name__}: {problem}; the layer is unchanged")
            return
        before = {name: (p, p.detach().clone()) for name, p in self._parameters.items() if p is not None}
        count = len(error_msgs)
        rest = {k: v for k, v in state_dict.items() if k not in {prefix + key for key in _KEYS}}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) == count:
            if index is not None:
                self.topology.index.copy_(index)
            return
        with torch.no_grad():  # a tensor could not be copied
            for name, (parameter, old) in before.items():
                self._parameters[name] = parameter
                parameter.copy_(old)

    def _check_state(self, state: dict[str, Any], prefix: str) -> None:
        """Raise ValueError or TypeError if the shapes in a state are not those of this layer."""
        shape = state.get(prefix + "weight_shape")
        if shape is not None and (not isinstance(shape, Tensor) or shape.tolist() != [*self.topology.shape]):
            got = shape.tolist() if isinstance(shape, Tensor) else shape
            raise ValueError(
                f"this is the state of a layer with a weight of shape {got}, not {[*self.topology.shape]}"
            )
        for name, parameter in self._parameters.items():
            value = state.get(prefix + name, parameter)
            if parameter is None:
                continue
            if not (isinstance(value, Tensor) and value.shape == parameter.shape):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {got}")
            if value.layout != torch.strided:
                raise TypeError(f"{name} must be a dense (strided) tensor, got {value.layout}")

    def _apply(self: _Self, fn: Any, recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)
        self.topology = self.topology.to(self.values.device)
        if self.values.is_shared():  # by share_memory(): values and indices belong together
            self.topology.index.share_memory_()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "growth": None}

    def _describe(self) -> str:
        topology = self.topology
        b_out, b_in = topology.block_size
        kind = "CSR" if (b_out, b_in) == (1, 1) else f"BSR {b_out}x{b_in}"
        return f"bias={self.bias is not None}, {kind}, density={topology.density:.4g}, nnz={topology.nnz}"


def _draw(parameter: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Uniform values; those of a generator are drawn on its device, and so are the same on every other."""
    if generator is None or generator.device.type == parameter.device.type or parameter.is_meta:
        parameter.uniform_(-bound, bound, generator=generator)
    else:
        drawn = torch.empty_like(parameter, device=generator.device)
        parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))
