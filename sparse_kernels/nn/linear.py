"""`SparseLinear`: `nn.Linear` that stores and multiplies its active weights only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import _linear
from ..topology import Topology
from ._layer import SparseLayer


class SparseLinear(SparseLayer):
    """`y = x @ W.T + bias` with a sparse W.

    Args:
        in_features, out_features: as in `nn.Linear`.
        bias: learn an additive bias.
        density: fraction of positions (weights or blocks) that are active: `N - floor((1 - density) * N)`
            of them, uniformly at random, exactly.
        block_size: 1 stores single weights (CSR); `b` or `(b_out, b_in)` stores blocks (BSR).
        generator: source of the random positions and initial values.
        device, dtype: of the values.

    Raises:
        ValueError: density outside [0, 1]; a block that does not divide its dimension (the message
            names those that do).

    Example:
        >>> layer = SparseLinear(64, 32, density=0.1)
        >>> layer(torch.randn(8, 64)).shape, layer.nnz
        (torch.Size([8, 32]), 205)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float,
        block_size: int | tuple[int, int] = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        device = torch.get_default_device() if device is None else torch.device(device)
        topology = Topology.random(
            (out_features, in_features), density, block_size, generator=generator, device=device
        )
        self._setup(topology, bias, device, dtype)
        self.reset_parameters(generator)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        mask: Tensor | None = None,
        density: float | None = None,
        block_size: int | tuple[int, int] = 1,
        generator: torch.Generator | None = None,
    ) -> SparseLinear:
        """From an `nn.Linear`, keeping its values at the active positions.

        Args:
            module: the dense layer (unchanged).
            mask: bool, of the weight's shape: exactly that pattern.
            density: alternatively, a random pattern of this density.
            block_size: as in the constructor.
            generator: source of the random pattern.

        Raises:
            ValueError: not exactly one of `mask` and `density`; a mask not made of whole blocks.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"expected an nn.Linear, got {type(module).__name__}")
        topology = cls._topology_for(module.weight, mask, density, block_size, 1, generator)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = module.in_features, module.out_features
        layer._setup(topology, module.bias is not None, module.weight.device, module.weight.dtype)
        layer._adopt(module)
        return layer

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same function (zeros where inactive)."""
        module = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        return self._fill_dense(module)

    def forward(self, x: Tensor) -> Tensor:
        """`[*, in_features]` -> `[*, out_features]`."""
        # Asked of `_parameters`, where they usually are: an attribute of a module costs 0.6 us more.
        own: Any = self._parameters
        values = own["values"] if "values" in own else self.values  # noqa: SIM401
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        ticket = None if self.growth is None else self.growth.ticket
        return _linear(x, values, self.topology, bias, ticket)

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"
