"""Two processes on gloo: DistributedDataParallel, and a group whose ranks stop together."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tritondeq import DEQ, Implicit, Neumann, OneStep, Phantom, Unrolled, fixed_point
from tritondeq.cells import Affine

pytestmark = [
    pytest.mark.slow,  # two processes that import torch
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]


def _data():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(8, 6, generator=gen)


def _layer(adjoint):
    torch.manual_seed(0)
    return DEQ(Affine(6), adjoint=adjoint, tol=1e-6, max_steps=100)


def _ddp(rank: int, port: int, out) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for i, adjoint in enumerate((Implicit(), OneStep())):
            layer = DistributedDataParallel(_layer(adjoint))
            layer(_data()[rank::2]).sin().sum().backward()
            if rank == 0:
                out[i] = [p.grad.clone() for p in layer.parameters()]
        rates = torch.tensor([[0.2], [0.9]])[rank]
        calls = []

        def f(z):
            calls.append(1)
            sync = torch.zeros(())
            dist.all_reduce(sync)  # hangs unless every rank makes as many calls
            return rates * z + 1

        with torch.no_grad():
            solution = fixed_point(f, torch.zeros(1, 3), tol=1e-4, max_steps=200, group=dist.group.WORLD)
        out[f"calls{rank}"], out[f"steps{rank}"] = len(calls), solution.steps.item()
        dist.barrier()  # a rank that leaves while the other still talks to it may abort in gloo's destructor
    finally:
        dist.destroy_process_group()


def _on_two_ranks(work) -> dict:
    """Returns what the ranks put into `out`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        out = manager.dict()
        mp.spawn(work, args=(port, out), nprocs=2)
        return dict(out)


def test_data_parallel_gradients_and_a_common_stop():
    out = _on_two_ranks(_ddp)
    for i, adjoint in enumerate((Implicit(), OneStep())):
        layer = _layer(adjoint)
        layer(_data()).sin().sum().backward()
        for a, b in zip(out[i], layer.parameters(), strict=True):
            torch.testing.assert_close(2 * a, b.grad, rtol=1e-4, atol=1e-5)  # DDP averages over ranks
    assert out["calls0"] == out["calls1"] == out["steps1"] > out["steps0"]


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.linear.weight.data.mul_(0.5)

    def forward(self, z):
        return torch.tanh(self.linear(self.norm(z)))


class _Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = _Block(6), _Block(6)

    def forward(self, z, x):
        return 0.5 * self.two(self.one(z)) + x


ADJOINTS = {"implicit": Implicit(), "onestep": OneStep(), "phantom": Phantom(4, 0.8), "neumann": Neumann(4)}
ADJOINTS["unrolled"] = Unrolled(6)
SHARDED = {
    "layer": lambda layer: [layer],
    "cell": lambda layer: [layer.cell, layer],
    "blocks": lambda layer: [layer.cell.one, layer.cell.two, layer],
}


def _sharded_layer(adjoint):
    torch.manual_seed(0)
    return DEQ(_Cell(), adjoint=adjoint, tol=1e-9, max_steps=200).double()


def _fsdp(rank: int, port: int, out) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for what, parts in SHARDED.items():
            for name, adjoint in ADJOINTS.items():
                layer = _sharded_layer(adjoint)
                for part in parts(layer):
                    fully_shard(part, mesh=mesh)
                for _ in range(2):  # a second step, after the weights were sharded again
                    layer.zero_grad()
                    layer(_rank_data(rank)).sin().sum().backward()
                grads = [p.grad.full_tensor().clone() for p in layer.parameters()]
                if rank == 0:
                    out[what, name] = grads
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _rank_data(rank: int):
    """Of scales so different that the ranks stop apart."""
    return _data().double()[rank::2] * (1.0 if rank else 1e-3)


def test_a_sharded_cell_has_the_gradients_of_one_process():
    """FSDP2 of the layer, of its cell, and of blocks in it, without group=: no rank waits for good."""
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    out = _on_two_ranks(_fsdp)
    for (what, name), grads in out.items():
        layer = _sharded_layer(ADJOINTS[name])
        for rank in range(2):
            layer(_rank_data(rank)).sin().sum().backward()
        for got, p in zip(grads, layer.parameters(), strict=True):
            torch.testing.assert_close(
                2 * got, p.grad, rtol=1e-6, atol=1e-8, msg=lambda m, w=what, n=name: f"{w} {n}: {m}"
            )
