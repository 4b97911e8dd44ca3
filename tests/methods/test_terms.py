"""Score terms applied to all items and to some, and the weights of a history's items, against loops."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.data.histories import Histories
from laserrec.methods.terms import SeenOffset, decayed_pairs, decayed_sums

ROWS = st.lists(st.lists(st.integers(0, 8), max_size=6), min_size=1, max_size=5)


def test_weights_of_a_history():
    pairs, weights = decayed_pairs(tiny.histories([6, 1, 8, 1], [], [3]), 0.5)
    assert list(zip(pairs.users.tolist(), pairs.items.tolist(), weights.tolist(), strict=True)) == [
        (0, 1, 1.0), (0, 6, 0.125), (0, 8, 0.5), (2, 3, 1.0)]
    assert len(decayed_pairs(Histories.of([range(99)]), 0.9)[1]) == 50


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_sums_equal_the_naive_loop(rows):
    vectors = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    got = decayed_sums(Histories.of(rows), lambda some: vectors[some], 0.7)
    for user, row in enumerate(rows):
        want, seen = torch.zeros(4), set()
        for age, item in enumerate(reversed(row)):
            if item not in seen:
                want += 0.7**age * F.normalize(vectors[item], dim=0)
            seen.add(item)
        torch.testing.assert_close(got[user], want, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.lists(st.integers(0, 8), unique=True))
def test_some_items_get_what_all_items_get(rows, some):
    term = SeenOffset(-2.0).on(Histories.of(rows))
    scores, some = torch.randn(len(rows), 9), torch.tensor(some, dtype=torch.long)
    every = term.to_all(scores.clone())
    for user, row in enumerate(rows):
        torch.testing.assert_close(term.to_some(user, some, scores[user, some]), every[user, some])
        changed = (every[user] != scores[user]).nonzero()[:, 0].tolist()
        assert changed == term.rows(user).tolist() == sorted(set(row))


def test_an_offset_can_be_fixed():
    assert SeenOffset(-1.0).offset.requires_grad and not SeenOffset(-1.0, learnt=False).offset.requires_grad
    assert SeenOffset(-1.5).on(tiny.histories([0])).to_all(torch.zeros(1, 2)).tolist() == [[-1.5, 0.0]]
    with pytest.raises(RuntimeError):  # scores have no gradient to it; the loss has its own way
        SeenOffset(-1.0).on(tiny.histories([0])).to_all(torch.zeros(1, 2)).sum().backward()
