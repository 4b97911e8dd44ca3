"""Which way tensors travel between processes, and that they arrive; fits of several are tested in tests/training."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from laserrec.util import device, distributed


@pytest.fixture
def machine(monkeypatch):
    """(gpus, processes, local_rank, nccl) -> a machine with so many GPUs, as process local_rank of several."""
    chosen = []

    def have(gpus: int, processes: int, local_rank: int = 0, nccl: bool = True) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        return chosen

    return have


def test_a_gpu_for_each_process_takes_nccl(machine):
    chosen = machine(gpus=2, processes=2, local_rank=1)
    assert distributed._backend() == "cpu:gloo,cuda:nccl"
    assert chosen == [torch.device("cuda", 1)] == [device.own_gpu()] == [device.choose("auto")]


@pytest.mark.parametrize("has", [{"gpus": 0}, {"gpus": 1}, {"gpus": 2, "nccl": False}])
def test_else_all_travels_by_gloo(machine, has):
    chosen = machine(processes=2, **has)
    assert distributed._backend() == "gloo" and chosen == []


def test_without_a_launcher_no_gpu_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert device.own_gpu() is None


def test_own_randomness_sets_the_own_gpu_back_too(machine, monkeypatch):
    """A CPU generator stands in for the GPU's."""
    machine(gpus=2, processes=2, local_rank=1)
    gpu = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, gpu))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: gpu.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: gpu.set_state(state))
    before, drawn = gpu.get_state(), []
    for rank in (0, 1):
        with distributed.World(rank, 2).own_randomness(7):
            drawn.append((torch.rand(3), torch.rand(3, generator=gpu)))
        assert torch.equal(gpu.get_state(), before)
    assert not torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][1], drawn[1][1])


def test_without_a_gpu_of_its_own_no_gpu_is_touched(monkeypatch):
    """As with --device cpu on a machine whose GPUs are full."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("get_rng_state", "set_rng_state", "manual_seed_all", "_lazy_call"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("a GPU is touched"))
    before, drawn = torch.get_rng_state(), []
    for _ in range(2):
        with device.seeded(device.CPU, 3):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn) and torch.equal(torch.get_rng_state(), before)


TWO = """
import json
import torch
from laserrec.util.distributed import join

world = join()
p, never = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
table = torch.nn.Parameter(torch.zeros(4, 2))
table.grad = torch.sparse_coo_tensor([[world.rank, 2, 2]], [[1.0, 0.0]] * 3, (4, 2))
if world.rank == 1:  # the other has no gradient at all
    p.grad = torch.tensor([1.0, 2.0])
numbers = world.sum_gradients([p, never, table], torch.tensor([0.5 + world.rank, 3.0]))
tensors, value = world.from_main(lambda: ({"half": torch.ones(2, dtype=torch.bfloat16), "none": torch.empty(0, 3)}, 7))
rows = torch.tensor([[float(i)] for i in world.even_share(5)])
print(json.dumps([p.grad.tolist(), never.grad is None, numbers.tolist(), value,
                  {n: [str(t.dtype), list(t.shape), str(t.device)] for n, t in tensors.items()},
                  world.gather_rows(rows, 5).tolist(),
                  table.grad.coalesce().indices().tolist(), table.grad.to_dense().tolist()]))
"""


def test_two_processes_sum_send_and_gather():
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        port = at.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", TWO], env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE,
                             text=True) for rank in (0, 1)]
    found = [json.loads(process.communicate(timeout=240)[0]) for process in both]
    assert found[0] == found[1] == [
        [1.0, 2.0], True, [2.0, 6.0], 7,
        {"half": ["torch.bfloat16", [2], "cpu"], "none": ["torch.float32", [0, 3], "cpu"]}, [[0.0], [1], [2], [3], [4]],
        [[0, 1, 2]], [[1.0, 0.0], [1.0, 0.0], [4.0, 0.0], [0.0, 0.0]]]
