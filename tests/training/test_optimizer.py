"""Steps on the rows of a table: which rows change, that they end where AdamW brings them, and what stopping does."""

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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rows_that_are_met_now_and_then_end_where_adamw_brings_them(weight_decay):
    """Among them rows that are met once, early or late, and rows that rest for longer than momentum lasts."""
    steps = [[0, 1], [0], [2, 0], [0], *([0, 4] if n % 9 == 3 else [0] for n in range(120)), [1], [3, 0], [0], [4]]
    ours, theirs, start = model(True), model(False), model(False)[0].weight.detach()
    for net, kind in ((ours, RowAdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind([net[0].weight], lr=0.01, weight_decay=weight_decay)
        for rows in steps:
            step(net, optimizer, rows)
        before = net[0].weight.detach().clone()
        if kind is RowAdamW:
            optimizer.catch_up()
            assert torch.equal(before[4], net[0].weight[4]) and not torch.equal(before[2], net[0].weight[2])
            caught_up = net[0].weight.detach().clone()
            optimizer.catch_up()
            assert torch.equal(caught_up, net[0].weight), "once is enough"
    found, wanted = ours[0].weight.detach(), theirs[0].weight.detach()
    assert (wanted - start)[:5].abs().amax(dim=1).min() > 0.02
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.0005)


def test_a_step_changes_the_rows_in_its_gradient_alone():
    net = model(True)
    optimizer = RowAdamW(net.parameters(), **SETTINGS)
    step(net, optimizer, [0, 1])
    before = net[0].weight.detach().clone()
    step(net, optimizer, [4, 0])
    changed = (net[0].weight.detach() != before).any(dim=1)
    assert changed.tolist() == [True, False, False, False, True, False]


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
