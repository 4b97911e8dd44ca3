"""Item-to-item regression against its normal equations, boosts against sums, and what new items inherit."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.config import NeighboursConfig
from laserrec.methods import neighbours as module
from laserrec.methods.neighbours import Neighbours, check_size, regress, step_products
from laserrec.util.errors import UserError

SEQUENCES = tiny.histories([0, 1, 2], [1, 2, 2], [3, 0], [4, 5, 1, 0], [5])
TEXT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def sequence_weights(rows: list[list[int]], power: float) -> list[float]:
    lengths = [len(set(row)) for row in rows]
    mean = sum(lengths) / sum(length > 0 for length in lengths)
    return [(max(1, length) / mean) ** -power for length in lengths]


def steps(row: list[int], n_items: int, decay: float, reach: int = 50) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What is before and behind each step of a sequence, item by item."""
    found = []
    for step in range(1, len(row)):
        past, future = torch.zeros(n_items, dtype=torch.double), torch.zeros(n_items, dtype=torch.double)
        for age, item in enumerate(reversed(row[max(0, step - reach) : step])):
            past[item] += decay**age
        for ahead, item in enumerate(row[step : step + reach]):
            future[item] += decay**ahead
        found.append((past, future))
    return found


def objective(b: torch.Tensor, config: NeighboursConfig) -> torch.Tensor:
    """What `regress` says it minimises, term by term."""
    rows = SEQUENCES.lists()
    loss = config.l2 * (b**2).sum()
    for sequence, weight in zip(rows, sequence_weights(rows, config.length_power), strict=True):
        x = torch.zeros(6, dtype=b.dtype)
        x[sequence] = 1.0
        loss = loss + (1 - config.order) * weight * ((x - x @ b) ** 2).sum()
        for past, future in steps(sequence, 6, config.decay):
            loss = loss + config.order * weight * ((future - past @ b) ** 2).sum()
    texts = F.normalize(TEXT, dim=-1).T.to(b.dtype)
    return loss + config.text_weight * ((texts - texts @ b) ** 2).sum()


@pytest.mark.parametrize("order", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length_power", [0.0, 0.5])
@pytest.mark.parametrize("text_weight", [0.0, 2.0])
@pytest.mark.parametrize("dense", [0, 10**6])
def test_no_other_weights_fit_better(length_power, text_weight, order, dense, monkeypatch):
    monkeypatch.setattr(module, "_DENSE", dense)
    config = NeighboursConfig(l2=0.7, text_weight=text_weight, length_power=length_power, order=order)
    b = regress(SEQUENCES, 6, config, TEXT).double().requires_grad_()
    assert torch.equal(b.diagonal(), torch.zeros(6, dtype=torch.double))
    gradient = torch.autograd.grad(objective(b, config), b)[0]
    gradient.fill_diagonal_(0.0)  # the diagonal is held at zero
    assert gradient.abs().max() < 1e-4
    assert objective(b, config) < objective(torch.zeros_like(b), config)


@pytest.mark.parametrize(("decay", "reach"), [(0.3, 4), (0.8, 21), (1.0, 50)])
def test_products_of_steps_are_those_of_their_rows(decay, reach):
    """Long sequences too, of which not all is read, and items that come back."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(7, (length,), generator=draw).tolist() for length in (0, 1, 2, 5, 130)]
    want = torch.zeros(2, 7, 7, dtype=torch.double)
    for row, weight in zip(rows, sequence_weights(rows, 0.5), strict=True):
        for past, future in steps(row, 7, decay, reach):
            want += weight * past[:, None] * torch.stack([past, future])[:, None]
    for got, expected in zip(step_products(tiny.histories(*rows), 7, decay, 0.5), want, strict=True):
        torch.testing.assert_close(torch.from_numpy(got.toarray()), expected)


def test_with_order_an_item_s_follower_gets_more_than_its_predecessor():
    rows = tiny.histories(*[[0, 1, 2]] * 5)
    plain, ordered = (regress(rows, 3, NeighboursConfig(l2=1.0, text_weight=0.0, order=order)) for order in (0.0, 1.0))
    torch.testing.assert_close(plain[0, 1], plain[1, 0])
    assert ordered[0, 1] > 2 * ordered[1, 0]


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
    weights = regress(tiny.histories([0, 1], [0, 1]), 3, NeighboursConfig(l2=0.7, text_weight=0.0, row_power=1.0))
    assert torch.isfinite(weights).all() and weights[2].abs().max() == 0


def fitted(count: int = 5, **settings) -> Neighbours:
    neighbours = Neighbours(NeighboursConfig(count=count, **{"l2": 0.7, "text_weight": 2.0, **settings}), 6)
    neighbours.fit(SEQUENCES, TEXT)
    return neighbours


def boosts(neighbours: Neighbours, *row: int) -> dict[int, float]:
    """Of one history: item row -> boost."""
    term = neighbours.on(tiny.histories(row))
    assert term.pairs.items.tolist() == sorted(term.pairs.items.tolist())
    return dict(zip(term.pairs.items.tolist(), term.values.tolist(), strict=True))


def test_boosts_are_the_regression_without_the_history():
    neighbours = fitted()
    weights = regress(SEQUENCES, 6, neighbours.config, TEXT).clamp(min=0)
    expected = 0.8 * weights[3] + weights[0]
    expected[torch.tensor([0, 3])] = 0.0
    got = boosts(neighbours, 3, 0)
    assert list(got) == expected.nonzero()[:, 0].tolist()
    assert list(got.values()) == pytest.approx(expected[list(got)].tolist(), rel=1e-4)


def test_items_of_a_long_history_get_none_however_old_they_are():
    neighbours = fitted()
    assert boosts(neighbours, *[3] * 60).keys() == {1, 4} and boosts(neighbours, 1, *[3] * 60).keys() == {4}


def test_a_batch_gives_what_each_history_gives_alone():
    neighbours = fitted()
    term = neighbours.on(tiny.histories([3, 0], [], [5], [1, 1, 2]))
    for user, row in enumerate(([3, 0], [], [5], [1, 1, 2])):
        alone = boosts(neighbours, *row)
        assert term.rows(user).tolist() == list(alone)
        own = term.pairs.users == user
        assert term.values[own].tolist() == pytest.approx(list(alone.values()))


def test_the_strongest_are_kept():
    weights = regress(SEQUENCES, 6, fitted().config, TEXT)
    assert torch.equal(fitted(count=2).weights, weights.topk(2, dim=1).values.clamp(min=0))


def test_joined_scores_are_a_mixture_of_softmaxes():
    neighbours = fitted(share=0.5)
    cosines = torch.rand(4, 6) - 0.5
    neighbours.scale_to(cosines[:1])  # one user: the common scale is her own
    values = torch.tensor([0.3, 0.1, 0.02, 0.5, 0.01, 0.2])
    mixed = 0.5 * torch.softmax(cosines[0] / 0.1, dim=0) + values
    joined = neighbours._join(cosines[0].clone(), values)
    torch.testing.assert_close((joined / 0.1).exp() / (joined / 0.1).exp().sum(), mixed / mixed.sum())
    assert (joined > cosines[0]).all()


def test_new_items_inherit_boosts_and_neighbours():
    neighbours = fitted()
    plain = boosts(neighbours, 4)
    neighbours.inherit(torch.tensor([[1, 2], [4, 4]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))  # rows 6 and 7
    got = boosts(neighbours, 4)
    assert got[6] == pytest.approx(0.75 * plain.get(1, 0.0) + 0.25 * plain.get(2, 0.0))
    assert got[7] == pytest.approx(float(neighbours.weights[4].max()))  # its parent stands in the history
    assert {k: v for k, v in got.items() if k < 6} == pytest.approx(plain)
    assert set(boosts(neighbours, 7)) - {4} == set(got) - {7}


def test_a_catalogue_too_large_for_the_memory_is_told(monkeypatch):
    check_size(400, NeighboursConfig())
    with pytest.raises(UserError, match=r"10,000,000,000 items .* neighbours\.count = 0"):
        check_size(10**10, NeighboursConfig())
    with pytest.raises(UserError, match=r"1,000,000 items .* neighbours\.form = local"):
        check_size(10**6, NeighboursConfig(form="exact"))
    monkeypatch.setattr(module, "available_bytes", lambda: 10_000)
    with pytest.raises(UserError, match="are free"):  # before anything is allocated
        regress(SEQUENCES, 400, NeighboursConfig())


def test_new_items_without_parents_add_nothing():
    neighbours = fitted()
    assert boosts(neighbours, 8, 1) == boosts(neighbours, 1) and boosts(neighbours, 8) == {}
