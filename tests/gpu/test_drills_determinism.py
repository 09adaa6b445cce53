"""The same bits every time (D11, D12, D14), and ties decided as on the CPU (D13)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import drill_cases as dc
import pytest
import torch
from product_cases import gpu_topology

import rigl
import sparse_kernels as sk
from rigl.schedules import replaced
from sparse_kernels import layout, testing
from sparse_kernels.triton import bsr_sddmm, configs, growth, operators


def large_case(device, block):
    """Tokens enough that the weight gradient is split over them and summed up in parts."""
    generator = torch.Generator().manual_seed(block)
    tokens, side = (8192, 1024) if device == "cuda" else (970 if block == 16 else 130, 2 * block)
    topology = testing.random_topology((side, side), "skew", 0.2, block, generator=generator)
    dtype = dc.half_dtypes(device)[0]
    x, dy = (torch.randn(tokens, side, generator=generator).to(device, dtype) for _ in range(2))
    values = torch.randn(topology.values_shape, generator=generator).to(device, dtype)
    bias = torch.randn(side, generator=generator).to(device, dtype)
    return dc.Case(f"block {block}", x, values, gpu_topology(topology, device), bias, dy)


@pytest.mark.parametrize("block", [16, 64, 128])
def test_d11_repeats_are_equal(device, block):
    case = large_case(device, block)
    first = dc.run(case)
    dc.check_half(case, first)
    for repeat in range(dc.few(device, 250, 1)):
        assert not dc.same_bits(first, dc.run(case)), f"repeat {repeat}"


def test_d11_a_gradient_alone_has_the_bits_it_has_among_others(device):
    case = large_case(device, 64)
    together = dc.run(case)
    for name in ("x", "values"):
        x, values = case.x.clone(), case.values.clone()
        leaf = {"x": x, "values": values}[name].requires_grad_()
        with sk.use_backend("triton"):
            y = sk.functional.linear(x, values, case.topology, case.bias)
            (alone,) = torch.autograd.grad(y, leaf, case.dy)
        assert torch.equal(alone, together["d" + name])


def launch(op, config, case, processors=132):
    """A launcher with this configuration: the name of a product and its result."""
    t, x, dy, values = case.topology, case.x, case.dy, case.values
    b_out, b_in = t.block_size
    offsets = layout.offsets(t.n_blocks, t.rows, t.cols, b_in)
    if op == "growth_norms":
        return "norms", growth.block_norms(x, dy, b_out, b_in, "l1", config=config)
    if op == "sddmm":
        out = torch.full_like(values, float("nan"))
        bsr_sddmm.bsr_sddmm(dy, x, out, t.index, offsets, config=config, processors=processors)
        return "dvalues", out
    transposed = op == "spmmt"
    source, like = (dy, x) if transposed else (x, dy)
    out = torch.full_like(like, float("nan"))
    operators.launch_spmm(source, values, None, t.index, offsets, out, transposed=transposed, config=config)
    return "dx" if transposed else "y", out


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("op", ["spmm", "spmmt", "sddmm", "growth_norms"])
def test_d12_every_candidate_is_right_and_repeats(device, op, block):
    """Exact on integers (D02), and the same bits for the same configuration."""
    dtype = dc.half_dtypes(device)[0]
    generator = torch.Generator().manual_seed(block)
    tokens, side = (1000, 512) if device == "cuda" else (70, 2 * block)
    topology = testing.random_topology((side, side), "uniform", 0.5, block, generator=generator)
    draw = [(tokens, side), topology.values_shape, (tokens, side)]
    x, values, dy = (torch.randint(-2, 3, s, generator=generator).to(device, dtype) for s in draw)
    case = dc.Case(op, x, values, gpu_topology(topology, device), None, dy)
    expected = dc.dense(case, torch.float64)
    gradient = dy.double().t() @ x.double()
    expected["norms"] = topology.to_blocks(gradient).abs().sum((-2, -1)).view(side // block, side // block)
    problem = configs.Problem(
        op.removesuffix("t"),
        block,
        block,
        str(dtype).removeprefix("torch."),
        tokens,
        transposed=op == "spmmt",
    )
    candidates = configs.candidates(problem)
    if device == "cuda":
        candidates += configs.warp_specialised(problem)
    assert candidates
    for config in candidates[: dc.few(device, len(candidates), 2)]:
        name, actual = launch(op, config, case)
        assert torch.equal(actual, expected[name].to(actual.dtype)), f"{op} {config}"
        for _ in range(3):
            assert torch.equal(launch(op, config, case)[1], actual), f"{op} {config} differs from itself"


def digest(device):
    """Of all products of two cases, as launched by default."""
    sha = hashlib.sha256()
    for block in (16, 64)[: dc.few(device, 2, 1)]:
        for value in dc.run(large_case(device, block)).values():
            sha.update(value.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return sha.hexdigest()


def test_d12_cold_and_warm_starts_agree(device, tmp_path):
    """Nothing tunes at run time: processes with an empty and a filled cache of kernels give the same bits."""
    code = f"import test_drills_determinism as t; print('digest', t.digest({device!r}))"
    found = {"here": digest(device)}
    for name in ("cold", "warm"):
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = done.stdout.split()[-1]
    assert len(set(found.values())) == 1, found


# ties ---------------------------------------------------------------------------------------------


def by_sorting(weights, gradients, active, k):
    """The update in plain Python: scores of all positions, and which are active -> which are then."""
    ordered = sorted(active, key=lambda p: (weights[p], p))
    dropped = set(ordered[:k])
    pool = [p for p in range(len(gradients)) if p not in active or p in dropped]
    grown = sorted(pool, key=lambda p: (-gradients[p], p))[:k]
    return (set(active) - dropped) | set(grown)


def test_d13_ties_go_to_the_lowest_position(device):
    """Scores out of few values, -0.0 among them: the device, the CPU and `sorted` take the same blocks."""
    block, side, tokens = 16, 96, 16
    layers = {"device": dc.layer(device, side, side, block, 0.4, bias=False)}
    layers["cpu"] = sk.SparseLinear(
        side, side, False, density=0.4, block_size=block, generator=torch.Generator().manual_seed(0)
    )
    methods, optimizers = {}, {}
    for name, layer in layers.items():
        optimizers[name] = torch.optim.SGD(layer.parameters(), lr=0.0)
        methods[name] = rigl.RigL(
            layer, optimizers[name], t_end=10**6, delta_t=1, schedule="constant", grad_accumulation=1
        )
    generator = torch.Generator().manual_seed(1)
    grid = (side // block) ** 2
    for turn in range(dc.few(device, 1000, 10)):
        kind = turn % 3  # all equal, from {0, 1, 2}, with negative zeros
        scores = torch.randint(0, 1 if kind == 0 else 3, (grid,), generator=generator).float()
        weights = torch.full((grid,), -0.0) if kind == 2 else scores.clone()
        # Token t of dY is a unit vector, X holds one row of blocks a token: block scores as they were drawn.
        wanted = torch.randint(0, 1 if turn % 5 == 0 else 3, (grid,), generator=generator).float()
        rows = side // block
        x, dy = torch.zeros(tokens, side), torch.zeros(tokens, side)
        for r in range(rows):
            dy[r, r * block] = 1
            x[r, ::block] = wanted.view(rows, -1)[r]
        before = layers["cpu"].topology.positions().tolist()
        masks = {}
        for name, layer in layers.items():
            on = layer.values.device
            with torch.no_grad():
                chosen = weights.to(on)[layer.topology.positions().to(on)]
                layer.values.zero_()
                layer.values[:, 0, 0] = chosen
            for _ in range(2):  # the update, and the step on the weights after it
                optimizers[name].zero_grad(set_to_none=False)
                with sk.use_backend("triton" if name == "device" else "cpu"):
                    layer(x.to(on)).backward(dy.to(on))
                optimizers[name].step()
                if methods[name].updated:
                    masks[name] = set(layer.topology.positions().tolist())
        k = replaced(len(before), 0.3)
        expected = by_sorting(weights.abs().tolist(), wanted.tolist(), before, k)
        assert masks == {"device": expected, "cpu": expected}, f"turn {turn}"
    for name, layer in layers.items():
        layer.topology.validate()
        assert methods[name].updates == dc.few(device, 1000, 10), name


# training -----------------------------------------------------------------------------------------


def train(device, optimizer_of, steps):
    """Losses, and what the network and its optimizer end with."""
    torch.manual_seed(0)
    side = 256 if device == "cuda" else 64
    model = torch.nn.Sequential(
        dc.layer(device, side, side, 16, 0.3), torch.nn.ReLU(), dc.layer(device, side, side, 32, 0.5)
    )
    optimizer = optimizer_of(model.parameters())
    method = rigl.RigL(model, optimizer, t_end=10 * steps, delta_t=max(1, steps // 12), seed=0)
    generator = torch.Generator().manual_seed(1)
    losses = []
    with sk.use_backend("triton"):
        for _ in range(steps):
            x = torch.randn(100, side, generator=generator).to(device)
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert method.updates >= dc.few(device, 10, 4)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return [torch.stack(losses), *model.state_dict().values(), *state], method


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_d14_a_training_repeats(device, name):
    makers = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    }
    steps = dc.few(device, 300, 8)
    (first, method), (second, _) = (train(device, makers[name], steps) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert method.failed_updates == 0
