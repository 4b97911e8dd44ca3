"""Steps on the rows of a table: which rows change, that with all of them it is AdamW, and that it can be stopped."""

import pytest
import torch
from torch import nn

from laserrec.training.optimizer import RowAdamW, clip_gradients
from laserrec.util import checkpoint

SETTINGS = {"lr": 0.05, "weight_decay": 0.1}


def model(sparse: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(6, 4, sparse=sparse), nn.Linear(4, 3))


def step(net: nn.Sequential, optimizer: torch.optim.Optimizer, rows: list[int]) -> None:
    optimizer.zero_grad()
    weights = torch.arange(1.0, 3 * len(rows) + 1).view(len(rows), 3).sin()
    (net(torch.tensor(rows)) * weights).sum().backward()
    optimizer.step()


def test_with_dense_gradients_it_is_adamw():
    ours, theirs = model(False), model(False)
    for net, kind in ((ours, RowAdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(net.parameters(), **SETTINGS)
        for rows in ([0, 1, 1], [2], [0, 5]):
            step(net, optimizer, rows)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_with_all_rows_in_each_step_it_is_adamw():
    """Rows that come twice in a step included."""
    ours, theirs = model(True), model(False)
    for net, kind in ((ours, RowAdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(net.parameters(), **SETTINGS)
        for rows in ([5, 4, 3, 2, 1, 0, 3], [0, 0, 1, 2, 3, 4, 5], [1, 3, 5, 0, 2, 4]):
            step(net, optimizer, rows)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_without_a_gradient_stay_and_the_others_are_stepped_as_if_alone():
    """Without weight decay row 2 has the trajectory that it has in a table of its own."""
    net = model(True)
    before = net[0].weight.detach().clone()
    optimizer = RowAdamW([net[0].weight], lr=0.05, weight_decay=0.0)
    alone = nn.Parameter(before[2:3].clone())
    dense = torch.optim.AdamW([alone], lr=0.05, weight_decay=0.0)
    for rows in ([2], [0], [0, 4], [2], [4], [2]):
        step(net, optimizer, rows)
        if rows == [2]:
            alone.grad = net[0].weight.grad.to_dense()[2:3]
            dense.step()
    now = net[0].weight.detach()
    assert torch.equal(now[[1, 3, 5]], before[[1, 3, 5]]) and not torch.equal(now[[0, 2, 4]], before[[0, 2, 4]])
    torch.testing.assert_close(now[2:3], alone.detach())


def test_the_weight_decay_of_steps_between_is_made_up_for():
    """Row 3 is met in the first and in the fifth step; AdamW without the gradients of the others decays as much."""
    found = []
    for weight_decay in (0.1, 0.0):
        net = model(True)
        optimizer = RowAdamW([net[0].weight], lr=0.05, weight_decay=weight_decay)
        rows = [net[0].weight.detach()[3].clone()]
        for met in ([3], [0], [1], [0], [3]):
            step(net, optimizer, met)
            rows.append(net[0].weight.detach()[3].clone())
        found.append(rows)
    decayed, plain = found
    first, second = plain[1] - plain[0], plain[5] - plain[4]  # what the gradients add: they don't depend on the table
    expected = (decayed[0] * 0.995 + first) * 0.995**4 + second
    torch.testing.assert_close(decayed[5], expected)
    assert torch.equal(decayed[4], decayed[1])


def test_it_goes_on_from_its_saved_state():
    steps = [[0, 1], [2, 2], [1], [0, 3], [2]]
    whole, cut = model(True), model(True)
    optimizer = RowAdamW(whole.parameters(), **SETTINGS)
    for rows in steps:
        step(whole, optimizer, rows)
    first = RowAdamW(cut.parameters(), **SETTINGS)
    for rows in steps[:3]:
        step(cut, first, rows)
    second = RowAdamW(cut.parameters(), **SETTINGS)
    checkpoint.restore_optimizer(second, checkpoint.optimizer_tensors(first))
    for rows in steps[3:]:
        step(cut, second, rows)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


@pytest.mark.parametrize("limit", [None, 0.5, 100.0])
def test_the_norm_of_sparse_gradients_is_that_of_dense_ones(limit):
    found = []
    for sparse in (True, False):
        net = model(sparse)
        step(net, torch.optim.SGD(net.parameters(), lr=0.0), [0, 3, 3, 1])
        found.append((clip_gradients(net.parameters(), limit), [p.grad.to_dense() for p in net.parameters()]))
    (norm, own), (want, dense) = found
    assert float(norm) == pytest.approx(float(want)) and float(want) > 0.5
    for a, b in zip(own, dense, strict=True):
        torch.testing.assert_close(a, b)
    total = torch.cat([g.flatten() for g in own]).norm()
    assert float(total) == pytest.approx(min(float(want), limit or 100.0), rel=1e-4)
