"""Two processes on gloo: DistributedDataParallel, and a group whose ranks stop together."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tritondeq import DEQ, Implicit, OneStep, fixed_point
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


def test_data_parallel_gradients_and_a_common_stop():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        out = manager.dict()
        mp.spawn(_ddp, args=(port, out), nprocs=2)
        out = dict(out)
    for i, adjoint in enumerate((Implicit(), OneStep())):
        layer = _layer(adjoint)
        layer(_data()).sin().sum().backward()
        for a, b in zip(out[i], layer.parameters(), strict=True):
            torch.testing.assert_close(2 * a, b.grad, rtol=1e-4, atol=1e-5)  # DDP averages over ranks
    assert out["calls0"] == out["calls1"] == out["steps1"] > out["steps0"]
