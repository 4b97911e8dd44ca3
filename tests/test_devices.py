"""The pretended device: results are the CPU's, mixtures fail, and what waits for the device is counted."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices import DevicesMetError, pretended
from torch import nn


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(10, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 10))


def steps(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(2)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_gives_the_cpus_numbers_and_waits_for_nothing():
    tokens, targets = torch.randint(10, (2, 4, 6)).unbind()
    plain = network()
    want = steps(plain, tokens, targets)
    with pretended() as gpu:
        model = network().to(gpu.device)
        assert all(p.device == gpu.device for p in model.parameters())
        moved = [t.pin_memory().to(gpu.device, non_blocking=True) for t in (tokens, targets)]
        gpu.clear()
        losses = steps(model, *moved)
        assert losses.device == gpu.device and gpu.syncs == []
        assert torch.equal(losses.cpu(), want)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.detach().cpu(), b)


@pytest.mark.parametrize("mixture", [
    lambda x, y: x + y, lambda x, y: y @ x, lambda x, y: torch.cat([x, y]), lambda x, y: x[y.long()[:, 0]],
    lambda x, y: torch.where(x > 0, x, y), lambda x, y: F.linear(x, y), lambda x, y: x.add_(y),
    lambda x, y: x.index_select(0, y.long()[:, 0]), lambda x, y: torch.stack([x[0, 0], y[0, 0]]),
    lambda x, y: F.scaled_dot_product_attention(x, y, y),
    lambda x, y: (x.requires_grad_() * y.to("cuda:0")).sum().backward(torch.ones(())),
])
def test_two_devices_in_one_operation_fail(mixture):
    with pretended() as gpu:
        x, y = torch.rand(3, 3, device=gpu.device), torch.rand(3, 3)
        with pytest.raises((DevicesMetError, RuntimeError)):
            mixture(x, y)


def test_the_error_names_operation_line_and_devices():
    with pretended() as gpu, pytest.raises(DevicesMetError, match=r"mul .*tests/test_devices.py:\d+.*cuda:0.*on cpu"):
        torch.ones(2, device=gpu.device) * torch.ones(2)


def test_a_cpu_number_and_a_copy_are_allowed():
    with pretended("mps") as gpu:
        x = torch.ones(2, device="mps")
        assert (x * torch.tensor(3.0)).tolist() == [3.0, 3.0]
        gpu.clear()
        x.copy_(torch.tensor([4.0, 5.0]))
        assert len(gpu.syncs) == 1 and x.tolist() == [4.0, 5.0]


@pytest.mark.parametrize("waiting", [
    lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.to("cpu"),
    lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 1], lambda x: x.masked_select(x > 1),
    lambda x: x.unique(), lambda x: x.repeat_interleave(x.long()), lambda x: torch.equal(x, x),
    lambda x: torch.tensor([1], device=x.device), lambda x: torch.ones(2).to(x.device),
    lambda x: torch.ones(2).to(x.device, non_blocking=True), lambda x: torch.ones(2).to(x), lambda x: x.new_tensor([2]),
    lambda x: torch.as_tensor(np.ones(2), device=x.device), lambda x: torch.cuda.synchronize(),
    lambda x: x.__setitem__(x > 1, 0.0), lambda x: [0, 1, 2][x.long()[1]],
    lambda x: nn.utils.rnn.pad_sequence([x, torch.ones(2)]),
])
def test_what_waits_is_counted_with_its_line(waiting):
    with pretended() as gpu:
        x = torch.arange(3, device=gpu.device).float()
        assert gpu.syncs == []
        waiting(x)
        assert gpu.syncs and all("tests/test_devices.py:" in sync for sync in gpu.syncs)


@pytest.mark.parametrize("quick", [
    lambda x: x.masked_fill(x > 1, 0.0), lambda x: x[1:] + x[0], lambda x: x[torch.arange(2, device=x.device)],
    lambda x: torch.zeros_like(x), lambda x: x.new_zeros(3), lambda x: x.bfloat16().topk(2), lambda x: x.to(x.device),
    lambda x: torch.ones(2).pin_memory().to(x.device, non_blocking=True), lambda x: x.__setitem__(0, 2.0),
    lambda x: torch.full((2,), 3.0, device=x.device), lambda x: x.sort().values.cumsum(0), lambda x: x.clone().mul_(2),
    lambda x: x.repeat_interleave(x.long(), output_size=3), lambda x: x.repeat_interleave(2),
    lambda x: torch.randperm(4, generator=torch.Generator(x.device).manual_seed(1), device=x.device),
])
def test_what_does_not_wait_is_not(quick):
    with pretended() as gpu:
        made = quick(torch.arange(3, device=gpu.device).float())
        assert gpu.syncs == [] and getattr(made, "device", gpu.device) == gpu.device


def test_a_tensor_of_the_device_is_no_array():
    with pretended() as gpu, pytest.raises(TypeError, match=r"use Tensor\.cpu"):
        np.asarray(torch.ones(2, device=gpu.device))


def test_a_third_device_is_refused():
    with pretended() as gpu, pytest.raises(DevicesMetError, match="was sent to cuda:1"):
        torch.ones(2, device=gpu.device).to("cuda:1")


def test_the_generators_state_can_be_kept_and_set_back():
    with pretended() as gpu:
        state = torch.cuda.get_rng_state(gpu.device)
        first = torch.rand(3, device=gpu.device)
        torch.cuda.set_rng_state(state, gpu.device)
        assert torch.equal(torch.rand(3, device=gpu.device), first)


def test_tensors_of_the_cpu_stay_what_they_are():
    with pretended() as gpu:
        x = torch.ones(2)
        assert x.cpu() is x and x.to("cpu") is x and x.to(torch.float64).device.type == "cpu" and gpu.syncs == []


def test_outside_nothing_is_changed():
    with pretended():
        pass
    assert torch.ones(2).to("cpu").cpu().tolist() == [1.0, 1.0]
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda"):
        torch.ones(2, device="cuda:7")
