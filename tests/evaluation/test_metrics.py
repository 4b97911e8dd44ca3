"""Ranks and metrics against naive loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.data.histories import Histories, Pairs
from laserrec.evaluation.metrics import Metrics, mean_ranks, ranks_without
from laserrec.evaluation.significance import bootstrap_interval
from laserrec.util.errors import UserError


def naive_rank(scores: list[float], target: int, excluded: set[int] = frozenset()) -> float:
    """The mean place of the target over all orders that ties allow, by counting places one by one."""
    if target in excluded:
        return len(scores)
    order = sorted((s for j, s in enumerate(scores) if j not in excluded), reverse=True)
    places = [place for place, s in enumerate(order, 1) if s == scores[target]]
    return sum(places) / len(places)


# Few distinct values, so that most examples hold ties.
cases = st.integers(2, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, -math.inf]), min_size=n, max_size=n),
        st.integers(0, n - 1),
        st.lists(st.integers(0, n - 1), max_size=n),
    )
)


@settings(max_examples=300, deadline=None)
@given(cases)
def test_ranks_equal_the_naive_count(case):
    scores, target, excluded = case
    matrix, targets = torch.tensor([scores]), torch.tensor([target])
    ranks = mean_ranks(matrix, targets)
    assert ranks.dtype == torch.float64
    assert ranks.item() == naive_rank(scores, target)
    gone = Histories.of([excluded]).distinct()
    assert ranks_without(ranks, matrix, targets, gone).item() == naive_rank(scores, target, set(excluded))


def test_all_equal_scores_give_the_middle_rank():
    assert mean_ranks(torch.zeros(1, 7), torch.tensor([6])).item() == 4.0


def test_rows_are_independent_and_input_is_kept():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 2.0]])
    ranks = mean_ranks(scores, torch.tensor([2, 1]))
    assert ranks.tolist() == [3.0, 1.5]
    hidden = ranks_without(ranks, scores, torch.tensor([2, 1]), Pairs(torch.tensor([0, 1]), torch.tensor([0, 1])))
    assert hidden.tolist() == [2.0, 3.0]
    assert ranks.tolist() == [3.0, 1.5]


def test_nan_is_an_error():
    with pytest.raises(ValueError, match="NaN"):
        mean_ranks(torch.tensor([[1.0, math.nan]]), torch.tensor([0]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 60).map(lambda n: n / 2), min_size=1, max_size=30), st.integers(1, 20))
def test_metrics_equal_the_naive_sums(ranks, k):
    got = Metrics.from_ranks(np.array(ranks), k)
    assert got.recall == pytest.approx(sum(1 for r in ranks if r <= k) / len(ranks))
    assert got.ndcg == pytest.approx(sum(1 / math.log2(1 + r) for r in ranks if r <= k) / len(ranks))
    assert got.mrr == pytest.approx(sum(1 / r for r in ranks) / len(ranks))
    assert got.users == len(ranks)


def test_a_tie_across_the_cut_counts_by_its_mean_rank():
    # Two equals on places 10 and 11 have rank 10.5: outside the ten, inside the MRR.
    got = Metrics.from_ranks(np.array([10.5, 10.0]))
    assert got.as_dict() == {"recall@10": 0.5, "ndcg@10": pytest.approx(0.5 / math.log2(11)),
                             "mrr": pytest.approx((1 / 10.5 + 0.1) / 2), "users": 2}


def test_no_ranks_is_an_error():
    with pytest.raises(UserError, match="no case to evaluate"):
        Metrics.from_ranks(np.zeros(0))


def test_an_interval_is_over_users_however_many_cases_each_has():
    """Three equal cases of a user tell no more than one does."""
    difference = np.random.default_rng(1).normal(0.1, 1.0, 50)
    once = bootstrap_interval(difference)
    users = np.random.default_rng(2).permutation(50)
    assert bootstrap_interval(difference, users) == once
    assert bootstrap_interval(np.tile(difference, 3), np.tile(users, 3)) == pytest.approx(once)
    low, high = bootstrap_interval(np.tile(difference, 3))
    assert high - low < 0.7 * (once[1] - once[0])


def test_an_interval_is_of_the_mean_over_cases():
    """A user of nine cases counts nine times in each draw."""
    difference, users = np.array([*[1.0] * 9, 0.0, 0.0, 0.0]), np.array([5] * 9 + [1, 2, 3])
    low, high = bootstrap_interval(difference, users)
    assert low == 0.0 and high == pytest.approx(27 / 28)  # three draws of four
