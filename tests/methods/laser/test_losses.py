"""Both losses against loops written from the paper (Eq. 3, 8-12)."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.data.histories import Pairs
from laserrec.methods.laser.losses import contrast_of_some, item_contrast, load_balance
from laserrec.methods.laser.mformer import Route, Router


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_item_contrast_is_equation_8(temperature):
    users, items, targets = torch.randn(4, 6) * 3, torch.randn(9, 6), torch.tensor([0, 8, 3, 3])
    losses = []
    for user, target in zip(users.tolist(), targets.tolist(), strict=True):
        e = [math.exp(cosine(user, item) / temperature) for item in items.tolist()]
        losses.append(-math.log(e[target] / sum(e)))
    assert float(item_contrast(users, items, targets, temperature)) == pytest.approx(sum(losses) / 4, rel=1e-4)


def test_lengths_of_embeddings_do_not_matter():
    users, items, targets = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([0, 8, 3, 3])
    same = item_contrast(users * torch.tensor([[1.0], [5.0], [0.1], [9.0]]), items * 7, targets, 0.1)
    assert float(same) == pytest.approx(float(item_contrast(users, items, targets, 0.1)), rel=1e-5)


def test_items_left_out_are_no_negatives_but_the_target_stays():
    users, items, targets = torch.randn(2, 6), torch.randn(5, 6), torch.tensor([0, 3])
    left_out = tiny.histories([0, 1, 4, 1], [2]).distinct()
    got = float(item_contrast(users, items, targets, 0.5, left_out))
    losses = [float(item_contrast(users[b : b + 1], items[keep], torch.tensor([at]), 0.5))
              for b, keep, at in ((0, [0, 2, 3], 0), (1, [0, 1, 3, 4], 2))]
    assert got == pytest.approx(sum(losses) / 2, rel=1e-5)


@pytest.mark.parametrize("columns", [1, 4, 7, 50, 200])
@pytest.mark.parametrize("seen", ["negatives", "left out", "offset"])
def test_chunks_give_the_loss_and_gradients_of_the_direct_computation(columns, seen):
    users, items, targets = torch.randn(6, 5), torch.randn(50, 5), torch.tensor([0, 49, 3, 3, 7, 20])
    histories = [[0, 1, 2], [49], [3, 8], [4], [7, 0, 7], range(50)]
    there = torch.zeros(6, 50, dtype=torch.bool)
    for row, history in enumerate(histories):
        there[row, list(history)] = True
    left_out = there.scatter(1, targets[:, None], False) & (seen == "left out")
    given = [users, items, torch.tensor(-0.3)][: 3 if seen == "offset" else 2]
    inputs = [x.double().clone().requires_grad_() for x in given]
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in inputs[:2]]
    cosines = unit[0] @ unit[1].T + (there * inputs[2] if seen == "offset" else 0)
    direct = torch.nn.functional.cross_entropy((cosines / 0.1).masked_fill(left_out, -torch.inf), targets)
    direct.backward()
    mine = [x.double().clone().requires_grad_() for x in given]
    pairs = None if seen == "negatives" else tiny.histories(*histories).distinct()
    loss = item_contrast(*mine[:2], targets, 0.1, pairs, *mine[2:], columns=columns)
    (loss * 3).backward()
    assert float(loss.detach()) == pytest.approx(float(direct.detach()), rel=1e-9)
    for ours, theirs in zip(mine, inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad * 3, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("seen", ["negatives", "left out", "offset"])
def test_a_temperature_that_is_a_tensor_gets_the_gradient_of_finite_differences(seen):
    users, items, targets = torch.randn(3, 5).double(), torch.randn(9, 5).double(), torch.tensor([0, 8, 3])
    pairs = None if seen == "negatives" else tiny.histories([0, 1], [4], [3, 8]).distinct()
    offset = torch.tensor(-0.3).double() if seen == "offset" else None
    tau = torch.tensor(0.2).double().requires_grad_()
    item_contrast(users, items, targets, tau, pairs, offset).backward()
    ends = [float(item_contrast(users, items, targets, 0.2 + step, pairs, offset)) for step in (-1e-5, 1e-5)]
    assert float(tau.grad) == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-5)


def naive_balance(probabilities: list[list[float]]) -> float:
    """One user's items, no padding."""
    n, k = len(probabilities), len(probabilities[0])
    total = 0.0
    for j in range(k):
        f = sum(row.index(max(row)) == j for row in probabilities) / n  # Eq. 10
        p = sum(row[j] for row in probabilities) / n  # Eq. 11
        total += f * p
    return k * total  # Eq. 9


@pytest.mark.parametrize("lengths", [(5,), (5, 2, 1), (3, 0, 6), (1, 1, 0, 0, 4)])
def test_load_balance_is_equations_9_to_11_over_real_items(lengths):
    width = max(lengths) + 2
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    route = Router(8, 4)(torch.randn(len(lengths), width, 8) * 5, mask)
    expected = [naive_balance(route.probabilities[b, :n].tolist()) for b, n in enumerate(lengths) if n]
    assert float(load_balance(route).detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_balance_is_one_when_even_and_k_when_all_go_to_one():
    even = torch.eye(4).repeat(1, 2).T[None] * 0.4 + 0.15
    mask = torch.ones(1, 8, dtype=torch.bool)
    assert float(load_balance(Route(even, mask, even.mean(1), even.mean(1).argmax(1)))) == pytest.approx(1.0)
    one = torch.zeros(1, 8, 4)
    one[..., 2] = 1.0
    assert float(load_balance(Route(one, mask, one.mean(1), one.mean(1).argmax(1)))) == pytest.approx(4.0)


def test_balance_trains_the_router_towards_even_use():
    router, states = Router(8, 4), torch.randn(16, 6, 8) + 1.0
    with torch.no_grad():
        router.weight.weight[0] += 0.5
    mask = torch.ones(16, 6, dtype=torch.bool)
    before = float(load_balance(router(states, mask)).detach())
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        load_balance(router(states, mask)).backward()
        optimizer.step()
    assert float(load_balance(router(states, mask)).detach()) < before - 0.2


def test_users_without_items_alone_give_zero_and_no_nan():
    router = Router(8, 4)
    loss = load_balance(router(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not router.weight.weight.grad.any()


def test_contrast_of_some_by_hand():
    torch.manual_seed(0)
    users, items, tau = torch.randn(4, 5), torch.randn(3, 5), 0.3
    targets, share = torch.tensor([2, 0, 2, 1]), torch.tensor([0.5, 0.2, 0.3]).log()
    losses = []
    for user, target in zip(users, targets, strict=True):
        logits = [float(F.cosine_similarity(user, item, dim=0)) / tau - float(s) for item, s in zip(items, share,
                                                                                                    strict=True)]
        losses.append(-logits[target] + math.log(sum(map(math.exp, logits))))
    assert float(contrast_of_some(users, items, targets, tau, share[None])) == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_contrast_of_all_without_a_correction_is_the_full_softmax():
    torch.manual_seed(0)
    users, items, targets = torch.randn(4, 5), torch.randn(6, 5), torch.tensor([2, 0, 5, 1])
    seen, offset = Pairs(torch.tensor([0, 0, 2]), torch.tensor([2, 3, 1])), torch.tensor(-0.7)
    for more in ((), (seen,), (seen, offset)):
        whole = item_contrast(users, items, targets, 0.2, *more)
        assert float(contrast_of_some(users, items, targets, 0.2, torch.zeros(1, 6), *more)) == pytest.approx(
            float(whole), rel=1e-5)
