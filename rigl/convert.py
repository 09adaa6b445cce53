"""From a dense model to one with sparse layers, and back."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sparse_kernels import SparseConv2d, SparseLinear
from sparse_kernels.nn import SparseLayer
from sparse_kernels.positions import normalize_block_size

from .distributions import check_sparsity, distribute, zero_count

logger = logging.getLogger("rigl")

MIN_BLOCKS = 50  # active blocks of a layer; below about this many its accuracy falls

_Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        name: the layer's (first) name.
        sparsity: planned; 0.0 where the layer stays a dense module.
        block: `(b_out, b_in)` of the sparse layer.
        zeros: inactive positions of the block grid; 0 keeps the layer dense.
        positions: size of the block grid.
    """

    name: str
    sparsity: float
    block: _Block
    zeros: int
    positions: int


def sparsify(
    model: nn.Module,
    *,
    sparsity: float,
    distribution: str = "erk",
    block_size: int | _Block = 1,
    dense: str | Collection[str] = (),
    custom: Mapping[str, float] | None = None,
    dense_first: bool | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace every `nn.Linear` and `nn.Conv2d` by a sparse layer, in place.

    Weights keep their values where the random pattern is active; biases are kept. Build the optimizer
    afterwards: the parameters are new.

    Args:
        model: changed in place. If it is a Linear or Conv2d itself, the sparse layer is returned.
        sparsity: fraction of zeros over the replaced layers together, in [0, 1).
        distribution: `"uniform"`, `"er"` or `"erk"`; see `rigl.distributions.distribute`. Layers that
            `"er"` and `"erk"` give density 1 stay dense modules.
        block_size: 1 stores single weights, `b` or `(b_out, b_in)` blocks. A layer it does not fit gets
            the largest square block that does, or stays dense. A layer that would have fewer than 50
            active blocks gets a smaller block, with a warning.
        dense: names or glob patterns of layers (or of modules that contain them) to leave alone. They
            have no part in the budget. A pattern that fits nothing warns.
        custom: name -> sparsity of single layers, likewise outside the budget.
        dense_first: keep the first layer dense. None: under `"uniform"` only, as the paper does (and
            never if it is the only layer).
        generator: a CPU generator for the random patterns. None: seeded by one draw from torch's.

    Returns:
        The model.

    Raises:
        ValueError: sparsity outside [0, 1), unknown names in `custom` or `dense`, an unknown distribution, no
            layer to replace.
        TypeError: `model` is not a module.

    Notes:
        Left dense by default: depthwise convolutions; layers whose weight is shared with another module
        or computed (weight norm, parametrizations); subclasses of Linear and Conv2d, such as the output
        projection of `nn.MultiheadAttention`, which may read `.weight`. Layers that are sparse already
        stay as they are.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> model = sparsify(model, sparsity=0.9)
        >>> print(summary(model).nnz)
        1896
    """
    layers, plans = _plan(model, sparsity, distribution, block_size, dense, custom, dense_first)
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))
    elif generator.device.type != "cpu":
        raise ValueError(f"generator must be a CPU generator, got one on {generator.device}")
    replacements: dict[nn.Module, nn.Module] = {}
    for plan in plans:
        if plan.zeros == 0:
            continue
        module = layers[plan.name]
        density = (plan.positions - plan.zeros) / plan.positions
        kind: Any = SparseLinear if isinstance(module, nn.Linear) else SparseConv2d
        replacements[module] = kind.from_dense(
            module, density=density, block_size=plan.block, generator=generator
        )
        logger.info("%s: sparsity %.4f, block %s", plan.name, plan.zeros / plan.positions, plan.block)
    return _replace(model, replacements)


def layer_sparsities(
    model: nn.Module,
    *,
    sparsity: float,
    distribution: str = "erk",
    block_size: int | _Block = 1,
    dense: str | Collection[str] = (),
    custom: Mapping[str, float] | None = None,
    dense_first: bool | None = None,
) -> dict[str, float]:
    """The sparsities that `sparsify` would give, by layer name (0.0: stays dense). Changes nothing.

    Arguments and errors as in `sparsify`. The zeros of a layer are `floor(sparsity * N)` of its N
    weights (or blocks).
    """
    _, plans = _plan(model, sparsity, distribution, block_size, dense, custom, dense_first)
    return {plan.name: plan.sparsity for plan in plans}


def densify(model: nn.Module) -> nn.Module:
    """Replace every sparse layer by the `nn.Linear` or `nn.Conv2d` of the same function, in place.

    Returns:
        The model (the dense layer, if the model is a single sparse layer).
    """
    found: dict[nn.Module, nn.Module] = {
        m: m.to_dense() for m in model.modules() if isinstance(m, (SparseLinear, SparseConv2d))
    }
    return _replace(model, found)


# which layers ---------------------------------------------------------------------------------


def _layers(model: nn.Module, named_dense: Collection[nn.Module]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can be replaced, by their first name, in the order of registration."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in model.named_modules():
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"layer {name!r} is lazy and has no shape yet: run a batch through the model first"
            )
        # Exactly these types: a subclass may use its weight in another way.
        if type(module) not in (nn.Linear, nn.Conv2d):
            continue
        weight = module._parameters.get("weight")
        if weight is None:  # computed by a hook, as with weight norm or pruning
            continue
        if len(owners[weight]) > 1:
            if module not in named_dense:
                warnings.warn(
                    f"layer {name!r} shares its weight with another module and stays dense; name it in "
                    "dense= to say so, or untie it first",
                    stacklevel=4,
                )
            continue
        layers[name] = module
    if not layers:
        raise ValueError("the model has no nn.Linear or nn.Conv2d to make sparse")
    return layers


def _matching(modules: Mapping[str, nn.Module], patterns: str | Collection[str]) -> set[nn.Module]:
    """The modules that patterns name, with all that they contain. `modules`: by every name they have."""
    found: set[nn.Module] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {
            m for name, m in modules.items() if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        }
        if not hits and any(c in pattern for c in "*?["):
            warnings.warn(f"dense={pattern!r} fits no module of the model", stacklevel=4)
        elif not hits:
            layers = [name for name, m in modules.items() if type(m) in (nn.Linear, nn.Conv2d)]
            raise ValueError(f"dense names {pattern!r}, but the layers are {', '.join(layers)}")
        found |= hits
    return found


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels


def _plan(
    model: nn.Module,
    sparsity: float,
    distribution: str,
    block_size: int | _Block,
    dense: str | Collection[str],
    custom: Mapping[str, float] | None,
    dense_first: bool | None,
) -> tuple[dict[str, nn.Linear | nn.Conv2d], list[LayerPlan]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_sparsity(sparsity)
    wanted = normalize_block_size(block_size)
    modules = dict(model.named_modules(remove_duplicate=False))
    named = _matching(modules, dense)
    layers = _layers(model, named)
    first_name: dict[nn.Module | None, str] = {module: name for name, module in layers.items()}
    custom = {first_name.get(modules.get(name), name): value for name, value in (custom or {}).items()}
    kept = {name for name, module in layers.items() if module in named}
    both = sorted(kept & custom.keys())
    if both:
        raise ValueError(f"{', '.join(both)} named both in dense and in custom: choose one")
    kept |= {name for name, m in layers.items() if _is_depthwise(m)} - custom.keys()
    if dense_first is None:
        dense_first = distribution == "uniform" and len(layers) > 1
    if dense_first:
        kept |= {next(iter(layers))} - custom.keys()
    blocks = {name: _fitting_block(m, wanted) for name, m in layers.items()}
    # Where no block fits, only a sparsity that was asked for by name is worth single weights.
    kept |= {name for name, block in blocks.items() if block is None} - custom.keys()
    shapes = {name: tuple(m.weight.shape) for name, m in layers.items()}
    solved = distribute(shapes, sparsity, distribution, dense=kept, custom=custom)
    plans = []
    for name, module in layers.items():
        block = _enough_blocks(name, module, blocks[name] or (1, 1), solved[name])
        positions = math.prod(shapes[name]) // (block[0] * block[1])
        zeros = zero_count(positions, solved[name])
        plans.append(LayerPlan(name, solved[name] if zeros else 0.0, block, zeros, positions))
    return layers, plans


def _extents(module: nn.Linear | nn.Conv2d) -> _Block:
    out, inner = module.weight.shape[:2]
    return out // getattr(module, "groups", 1), inner


def _fitting_block(module: nn.Linear | nn.Conv2d, wanted: _Block) -> _Block | None:
    """The wanted block, else the largest square one that divides both extents, None if that is 1 x 1."""
    out, inner = _extents(module)
    if out % wanted[0] == 0 and inner % wanted[1] == 0:
        return wanted
    common = math.gcd(out, inner)
    for size in range(min(max(wanted), common), 1, -1):
        if common % size == 0 and size * size <= wanted[0] * wanted[1]:
            return size, size
    return None


def _enough_blocks(name: str, module: nn.Linear | nn.Conv2d, block: _Block, sparsity: float) -> _Block:
    """The block, or the largest smaller square one of which at least `MIN_BLOCKS` are active."""
    if block == (1, 1) or sparsity == 0.0:
        return block

    def active(size: _Block) -> int:
        positions = module.weight.numel() // (size[0] * size[1])
        return positions - zero_count(positions, sparsity)

    if active(block) >= MIN_BLOCKS:
        return block
    common = math.gcd(*_extents(module))
    smaller = [s for s in range(max(block), 1, -1) if common % s == 0 and s * s < block[0] * block[1]]
    chosen = next(((s, s) for s in smaller if active((s, s)) >= MIN_BLOCKS), (1, 1))
    warnings.warn(
        f"layer {name!r}: only {active(block)} of its {block[0]}x{block[1]} blocks would be active, "
        f"and accuracy falls below about {MIN_BLOCKS}; it gets blocks of {chosen[0]}x{chosen[1]}",
        stacklevel=4,
    )
    return chosen


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each replacement wherever its original stands; the new root if that is one of them."""
    for original, fresh in replacements.items():  # the same dicts, so that their handles still remove them
        for name in _HOOKS:
            setattr(fresh, name, getattr(original, name))
    for parent in list(model.modules()):
        hit = False
        for child_name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, child_name, replacements[child])
                hit = True
        if hit and isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused inference path reads linear1.weight; this setting is how torch turns it off.
            parent.activation_relu_or_gelu = 0
    for module in model.modules():
        # An encoder reads the weights of its first layer itself, for a path that a sparse one does not take.
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, SparseLayer) for m in module.modules()
        ):
            module.use_nested_tensor = False
    return replacements.get(model, model)


# the table ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a summary."""

    name: str
    shape: tuple[int, ...]
    format: str
    density: float
    nnz: int


@dataclass(frozen=True)
class Summary:
    """The layers of a model and how sparse they are. `str()` gives a table.

    Attributes:
        rows: one per Linear and Conv2d, sparse or dense.
    """

    rows: tuple[LayerRow, ...]

    @property
    def total(self) -> int:
        """Weights of the dense network (biases not counted)."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def nnz(self) -> int:
        """Weights stored."""
        return sum(row.nnz for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all rows."""
        return 1.0 - self.nnz / self.total if self.total else 0.0

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        head = ("layer", "shape", "format", "density", "nnz")
        body = [
            (r.name or "(root)", "x".join(map(str, r.shape)), r.format, f"{r.density:.4f}", f"{r.nnz:,}")
            for r in self.rows
        ]
        foot = (
            "total",
            f"{self.total:,}",
            f"sparsity {self.sparsity:.4f}",
            f"{1 - self.sparsity:.4f}",
            f"{self.nnz:,}",
        )
        widths = [max(len(line[i]) for line in (head, *body, foot)) for i in range(5)]
        rule = "  ".join("-" * w for w in widths)

        def text(line: tuple[str, ...]) -> str:
            left = [cell.ljust(w) for cell, w in zip(line[:3], widths[:3], strict=True)]
            right = [cell.rjust(w) for cell, w in zip(line[3:], widths[3:], strict=True)]
            return "  ".join(left + right)

        return "\n".join([text(head), rule, *map(text, body), rule, text(foot)])


def summary(model: nn.Module) -> Summary:
    """The layers of a model: shape, format (`CSR`, `BSR 16x16`, `dense`), density and stored weights."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            topology = module.topology
            b_out, b_in = topology.block_size
            form = "CSR" if (b_out, b_in) == (1, 1) else f"BSR {b_out}x{b_in}"
            rows.append(LayerRow(name, topology.shape, form, topology.density, topology.nnz))
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and isinstance(module.weight, torch.Tensor):
            shape = tuple(module.weight.shape)
            rows.append(LayerRow(name, shape, "dense", 1.0, math.prod(shape)))
    return Summary(tuple(rows))
