"""Choosing a device: what is taken, what is refused, on machines that this one only pretends to be."""

import pytest
import torch

from laserrec.util import device
from laserrec.util.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """(gpus, mps, processes, local_rank) -> what the machine has from now on."""

    def have(gpus: int = 0, mps: bool = False, processes: int = 1, local_rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        for name, value in (("LOCAL_WORLD_SIZE", processes), ("LOCAL_RANK", local_rank)):
            monkeypatch.setenv(name, str(value)) if processes > 1 else monkeypatch.delenv(name, raising=False)

    return have


@pytest.mark.parametrize(("has", "name", "chosen"), [
    ({}, "auto", "cpu"), ({"gpus": 2}, "auto", "cuda:0"), ({"mps": True}, "auto", "mps"),
    ({"gpus": 2}, "cpu", "cpu"), ({"gpus": 2}, "cuda", "cuda:0"), ({"gpus": 2}, "cuda:1", "cuda:1"),
    ({"mps": True}, "mps", "mps"), ({"gpus": 1, "mps": True}, "auto", "cuda:0"),
    ({"gpus": 2, "processes": 2, "local_rank": 1}, "auto", "cuda:1"),
    ({"gpus": 2, "processes": 2, "local_rank": 1}, "cuda", "cuda:1"),
    ({"gpus": 1, "processes": 2}, "auto", "cpu"), ({"mps": True, "processes": 2}, "auto", "cpu"),
])
def test_chosen(machine, has, name, chosen):
    machine(**has)
    assert device.choose(name) == torch.device(chosen)


@pytest.mark.parametrize(("has", "name", "there"), [
    ({}, "cuda", "has cpu. "), ({}, "mps", "has cpu. "), ({"gpus": 2}, "cuda:2", "has cpu, cuda:0, cuda:1. "),
    ({"gpus": 1}, "gpu", "has cpu, cuda:0. "), ({"mps": True}, "cuda", "has cpu, mps. "), ({}, "", "has cpu. "),
    ({"gpus": 1}, "cuda:-1", "has cpu, cuda:0. "), ({"gpus": 1}, "cuda:00000", "has cpu, cuda:0. "),
    ({"gpus": 1, "processes": 2}, "cuda", "has cpu, cuda:0, for 2 processes"),
    ({"gpus": 2, "processes": 2}, "cuda:1", "one GPU each"),
])
def test_refused_with_what_there_is(machine, has, name, there):
    machine(**has)
    with pytest.raises(UserError, match=f"device {name!r} is not there") as error:
        device.choose(name)
    assert there in str(error.value)


def test_move_keeps_what_is_there_already():
    tensor = torch.arange(3)
    assert device.move(tensor, device.CPU) is tensor
