"""`SparseConv2d`: `nn.Conv2d` that stores and multiplies its active weights only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import _conv2d, _pair
from ..topology import Topology
from ._layer import SparseLayer

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class SparseConv2d(SparseLayer):
    """2-D convolution with a sparse weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as
            in `nn.Conv2d`.
        density, block_size, generator, device, dtype: as in `SparseLinear`. A block spans output
            channels x input channels inside one filter tap.

    Raises:
        ValueError: density outside [0, 1]; a block that does not divide the channels of a group; sizes
            that `nn.Conv2d` refuses.
    """

    transposed, output_padding = False, (0, 0)  # for code that reads them off an `nn.Conv2d`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        density: float,
        block_size: int | tuple[int, int] = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        device = torch.get_default_device() if device is None else torch.device(device)
        topology = Topology.random(shape, density, block_size, groups, generator, device)
        self._setup(topology, bias, device, dtype)
        self.reset_parameters(generator)

    def _set_geometry(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int] | str,
        dilation: int | tuple[int, int],
        groups: int,
        padding_mode: str,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels and out_channels, "
                f"got {groups} for {in_channels} and {out_channels}"
            )
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair(kernel_size, "kernel_size", 1)
        self.stride, self.dilation = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f'padding must be an int, a pair, "same" or "valid", got {padding!r}')
            if padding == "same" and max(self.stride) > 1:
                raise ValueError(f'padding="same" needs stride 1, got {self.stride}')
        self.padding: tuple[int, int] | str = (
            padding if isinstance(padding, str) else _pair(padding, "padding", 0)
        )
        self.padding_mode = padding_mode

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        mask: Tensor | None = None,
        density: float | None = None,
        block_size: int | tuple[int, int] = 1,
        generator: torch.Generator | None = None,
    ) -> SparseConv2d:
        """From an `nn.Conv2d`, keeping its values at the active positions; see `SparseLinear.from_dense`."""
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"expected an nn.Conv2d, got {type(module).__name__}")
        topology = cls._topology_for(module.weight, mask, density, block_size, module.groups, generator)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_geometry(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            module.padding_mode,
        )
        layer._setup(topology, module.bias is not None, module.weight.device, module.weight.dtype)
        layer._adopt(module)
        return layer

    def to_dense(self) -> nn.Conv2d:
        """An `nn.Conv2d` with the same function (zeros where inactive)."""
        module = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]  # a str that the constructor has checked
            device=self.values.device,
            dtype=self.values.dtype,
        )
        return self._fill_dense(module)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, in_channels, h, w]` or `[in_channels, h, w]` -> the same with the output's sizes."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pad_amounts(), mode=self.padding_mode), (0, 0)
        return _conv2d(
            x,
            self.values,
            self.topology,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self._ticket,
        )

    def _pad_amounts(self) -> list[int]:
        """(left, right, top, bottom), as `nn.Conv2d` distributes them."""
        amounts: list[int] = []
        for axis in (1, 0):
            if self.padding == "valid":
                low = high = 0
            elif self.padding == "same":
                total = self.dilation[axis] * (self.kernel_size[axis] - 1)
                low, high = total // 2, total - total // 2
            else:
                low = high = int(self.padding[axis])
            amounts += [low, high]
        return amounts

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        extra = "" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode!r}"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}{extra}, "
            f"{self._describe()}"
        )
