"""Which way tensors travel between processes; how processes behave together is tested in tests/training."""

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
