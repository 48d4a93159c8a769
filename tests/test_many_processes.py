"""Training over two processes on gloo equals training in one with the whole batch, however the weights are spread."""

import datetime
import functools
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tritondeq import DEQ, cells

pytestmark = [
    pytest.mark.slow,  # two processes that import torch
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]
LIMIT = 150  # seconds for all cases; a rank that waits for the other fails after HANGS
HANGS = datetime.timedelta(seconds=30)
CLOSE = {"rtol": 1e-8, "atol": 1e-10}  # solves end at 1e-10; sums over ranks have another order
STEPS = 6


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, z, x):
        return self.norm(x + self.down(torch.tanh(self.up(z))))


def net(cell=Block) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), DEQ(cell(8), tol=1e-10, max_steps=200), nn.Linear(8, 2)).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Samples for rank 0 and rank 1 in turn, of scales so different that the ranks take other numbers of steps."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0::2] *= 1e-3
    return x, 1 + torch.stack([x.sum(1), x.sum(1).sin()], 1)


def trained(model, layer, x, y) -> tuple[torch.Tensor, list[int]]:
    """(loss of each step, evaluations that the slowest sample took in each step)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses, evaluations = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        assert layer.last.converged.all()
        losses.append(loss.detach())
        evaluations.append(layer.last.steps.max().item())
    return torch.stack(losses), evaluations


def sharded(*parts):
    """FSDP2 of these parts, innermost first; without group= the ranks of a sharded cell still stop together."""

    def shard(model, mesh):
        from torch.distributed.fsdp import fully_shard

        for part in parts:
            fully_shard(model.get_submodule(part), mesh=mesh)
        return model

    return shard


def sharded_built_in(model, mesh):
    """A `cells.Cell` computes its injection outside of `forward`, so FSDP2 has to be told of `inject`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    sharded("1.cell", "")(model, mesh)
    register_fsdp_forward_method(model[1].cell, "inject")
    return model


def tensor_parallel(model, mesh):
    """Each rank holds half of the hidden features; all ranks get the whole batch."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model[1].cell, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


CASES = {
    "ddp": (Block, lambda model, mesh: DistributedDataParallel(model)),
    "fsdp of the root": (Block, sharded("")),
    "fsdp of the layer": (Block, sharded("1", "")),
    "fsdp of the cell": (Block, sharded("1.cell", "1", "")),
    "fsdp of a built-in cell": (cells.MLP, sharded_built_in),
    "tensor parallel": (Block, tensor_parallel),
}


def work(rank: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    meet = (folder / "meet").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=HANGS)
    try:
        mesh = init_device_mesh("cpu", (2,))
        out, (x, y) = {}, data()
        for name, (cell, spread) in CASES.items():
            print(f"rank {rank}: {name}", flush=True)  # the last one is the one that hangs
            model = net(cell)
            layer = model[1]
            model = spread(model, mesh)
            mine = slice(None) if name == "tensor parallel" else slice(rank, None, 2)
            losses, evaluations = trained(model, layer, x[mine], y[mine])
            dist.all_reduce(losses)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            out[name] = losses / 2, evaluations, state
        torch.save(out, folder / f"{rank}.pt")
        dist.barrier()  # a rank that leaves while the other still talks to it may abort in gloo's destructor
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank got in each case; fails, and ends the processes, where they take longer than LIMIT."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = mp.spawn(work, args=(folder,), nprocs=2, join=False)
    end = time.monotonic() + LIMIT
    try:
        while not processes.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                pytest.fail(f"two ranks did not end within {LIMIT} s")
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@functools.cache
def alone(cell) -> tuple[torch.Tensor, dict]:
    """(losses, weights) of one process."""
    model, threads = net(cell), torch.get_num_threads()
    torch.set_num_threads(1)  # threads spend more time waiting for one another than they save on tensors this small
    losses, _ = trained(model, model[1], *data())
    torch.set_num_threads(threads)
    return losses, model.state_dict()


@pytest.mark.parametrize("name", CASES)
def test_training_over_ranks_is_training_with_the_whole_batch(name, ranks):
    losses, weights = alone(CASES[name][0])
    assert losses[-1] < 0.5 * losses[0]
    for rank in ranks:
        torch.testing.assert_close(rank[name][0], losses, **CLOSE)
        torch.testing.assert_close(rank[name][2], weights, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_the_same_weights_though_their_samples_stop_apart(name, ranks):
    (_, one, weights), (_, other, others) = (rank[name] for rank in ranks)
    if name == "tensor parallel":
        assert one == other
    else:
        assert all(a != b for a, b in zip(one, other, strict=True))
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
