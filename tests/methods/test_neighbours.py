"""Item-to-item regression against its normal equations, the pull of a history against sums, new items' lenders."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.config import NeighboursConfig
from laserrec.methods.neighbours import Neighbours, check_size, regress, weigh
from laserrec.util.errors import UserError

SEQUENCES = tiny.histories([1, 2, 3], [2, 3, 3], [4, 1], [5, 6, 2, 1], [6])
TEXT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def objective(b: torch.Tensor, config: NeighboursConfig) -> torch.Tensor:
    """What `regress` says it minimises, term by term."""
    lengths = torch.tensor([float(len(set(s.tolist()))) for s in SEQUENCES])
    weights = (lengths / lengths.mean()) ** -config.length_power
    loss = config.l2 * (b**2).sum()
    for sequence, weight in zip(SEQUENCES, weights, strict=True):
        x = torch.zeros(6, dtype=b.dtype)
        x[torch.as_tensor(sequence.astype(int)) - 1] = 1.0
        loss = loss + weight * ((x - x @ b) ** 2).sum()
    rows = F.normalize(TEXT, dim=-1).T.to(b.dtype)
    return loss + config.text_weight * ((rows - rows @ b) ** 2).sum()


@pytest.mark.parametrize("length_power", [0.0, 0.5])
@pytest.mark.parametrize("text_weight", [0.0, 2.0])
def test_no_other_weights_fit_better(length_power, text_weight):
    config = NeighboursConfig(l2=0.7, text_weight=text_weight, length_power=length_power)
    b = regress(SEQUENCES, 6, config, TEXT).double().requires_grad_()
    assert torch.equal(b.diagonal(), torch.zeros(6, dtype=torch.double))
    gradient = torch.autograd.grad(objective(b, config), b)[0]
    gradient.fill_diagonal_(0.0)  # the diagonal is held at zero
    assert gradient.abs().max() < 1e-4
    assert objective(b, config) < objective(torch.zeros_like(b), config)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_rows_are_evened_out(power):
    plain = regress(SEQUENCES, 6, NeighboursConfig(l2=0.7), TEXT)
    sums = [sum(x for x in row if x > 0) for row in plain.tolist()]
    assert min(sums) > 0.02 * sum(sums) / 6
    want = torch.tensor([[x / (total / (sum(sums) / 6)) ** power for x in row]
                         for row, total in zip(plain.tolist(), sums, strict=True)])
    evened = regress(SEQUENCES, 6, NeighboursConfig(l2=0.7, row_power=power), TEXT)
    torch.testing.assert_close(evened, want, atol=1e-6, rtol=1e-4)
    if power == 1.0:
        torch.testing.assert_close(evened.clamp(min=0).sum(dim=1), torch.full((6,), sum(sums) / 6))


def test_an_item_that_nothing_is_known_of_stays_small():
    weights = regress(tiny.histories([1, 2], [1, 2]), 3, NeighboursConfig(l2=0.7, text_weight=0.0, row_power=1.0))
    assert torch.isfinite(weights).all() and weights[2].abs().max() == 0


def test_weights_of_a_history():
    items, weights = weigh(tiny.histories([7, 2, 9, 2])[0], 0.5)
    assert dict(zip(items.tolist(), weights.tolist(), strict=True)) == {2: 1.0, 9: 0.5, 7: 0.125}
    assert len(weigh(np.arange(1, 100, dtype=np.int32), 0.9)[0]) == 50


def fitted(count: int = 5, **settings) -> Neighbours:
    neighbours = Neighbours(NeighboursConfig(count=count, **{"l2": 0.7, "text_weight": 2.0, **settings}), 6)
    neighbours.fit(SEQUENCES, TEXT)
    return neighbours


def test_pull_is_the_regression_without_the_history():
    neighbours, history = fitted(), tiny.histories([4, 1])[0]
    weights = regress(SEQUENCES, 6, neighbours.config, TEXT).clamp(min=0)
    expected = 0.8 * weights[3] + weights[0]
    expected[torch.tensor([0, 3])] = 0.0
    items, pulls = neighbours.pull(history)
    assert items.tolist() == (expected.nonzero()[:, 0] + 1).tolist()
    torch.testing.assert_close(pulls, expected[items - 1])


def test_the_strongest_are_kept():
    weights = regress(SEQUENCES, 6, fitted().config, TEXT)
    assert torch.equal(fitted(count=2).weights, weights.topk(2, dim=1).values.clamp(min=0))


def test_joined_scores_are_a_mixture_of_softmaxes():
    neighbours = fitted(share=0.5)
    cosines = torch.rand(4, 6) - 0.5
    neighbours.scale_to(cosines[:1])  # one user: the common scale is her own
    pulls = torch.tensor([0.3, 0.1, 0.02, 0.5, 0.01, 0.2])
    mixed = 0.5 * torch.softmax(cosines[0] / 0.1, dim=0) + pulls
    joined = neighbours.join(cosines[0].clone(), pulls)
    torch.testing.assert_close((joined / 0.1).exp() / (joined / 0.1).exp().sum(), mixed / mixed.sum())
    assert (joined > cosines[0]).all()


def test_new_items_are_pulled_and_pull_as_their_lenders():
    neighbours = fitted()
    plain = dict(zip(*(x.tolist() for x in neighbours.pull(tiny.histories([5])[0])), strict=True))
    neighbours.lend(torch.tensor([[1, 2], [4, 4]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))  # items 7 and 8
    items, pulls = neighbours.pull(tiny.histories([5])[0])
    pulled = dict(zip(items.tolist(), pulls.tolist(), strict=True))
    assert pulled[7] == pytest.approx(0.75 * plain.get(2, 0.0) + 0.25 * plain.get(3, 0.0))
    assert pulled[8] == pytest.approx(float(neighbours.weights[4].max()))  # its lender stands in the history
    assert items.tolist() == sorted(items.tolist())
    mine, theirs = neighbours.pull(tiny.histories([8])[0]), neighbours.pull(tiny.histories([5])[0])
    assert set(mine[0].tolist()) - {5} == set(theirs[0].tolist()) - {8} and 8 not in mine[0].tolist()


def test_a_catalogue_too_large_for_the_memory_is_told():
    check_size(4_000, NeighboursConfig(count=10))
    check_size(10**8, NeighboursConfig(count=0))
    with pytest.raises(UserError, match=r"100,000,000 items .* --neighbours\.count 0"):
        check_size(10**8, NeighboursConfig(count=10))


def test_items_nobody_lends_to_say_nothing():
    neighbours = fitted()
    alone, mixed = neighbours.pull(tiny.histories([2])[0]), neighbours.pull(tiny.histories([9, 2])[0])
    assert torch.equal(alone[0], mixed[0]) and torch.equal(alone[1], mixed[1])
    assert len(neighbours.pull(tiny.histories([9])[0])[0]) == 0
