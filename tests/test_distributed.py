"""Promise: under DDP and FSDP2 the parameters after a step are those of one process with the whole batch.

Two ranks over gloo on the CPU, each a process of its own, as torchrun would start them.
"""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from fastsoftloss import Loss

distributed = pytest.importorskip("torch.distributed")
if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

RANKS, ROWS, STEPS = 2, 8, 3
# as a target and options; `mean` over equal parts is the mean of the means
CASES = {"index": {}, "options": {"diversity": "kl", "label_smoothing": 0.1, "z_loss": 0.01}}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [(torch.randn(ROWS, 6, generator=generator), torch.randint(5, (ROWS,), generator=generator)) for _ in range(STEPS)]
    return rows


def train(net: nn.Module, options: dict[str, object], rows: slice) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    criterion = Loss(**options)  # type: ignore[arg-type]
    for inputs, target in batches():
        optimizer.zero_grad()
        criterion(net(inputs[rows]), target[rows]).backward()
        optimizer.step()


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    mine = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    for name, options in CASES.items():
        parallel = nn.parallel.DistributedDataParallel(model())
        train(parallel, options, mine)
        sharded = model()
        for layer in (sharded[0], sharded[2], sharded):
            fully_shard(layer, mesh=mesh)
        train(sharded, options, mine)
        whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in sharded.state_dict().items()}
        if rank == 0:
            torch.save({"ddp": copy.deepcopy(parallel.module.state_dict()), "fsdp": whole}, Path(folder) / f"{name}.pt")
    distributed.destroy_process_group()
    os._exit(0)  # torch's own threads now and then abort while the interpreter goes, which is not what is asked here


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.spawn(rank_main, (port, str(folder)), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_end_where_one_process_does(trained, case, how):
    alone = model()
    train(alone, CASES[case], slice(None))
    start = model().state_dict()
    for name, parameter in torch.load(trained / f"{case}.pt")[how].items():
        torch.testing.assert_close(parameter, alone.state_dict()[name])
        assert not torch.equal(parameter, start[name])
