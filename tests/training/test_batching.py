"""Batches of like length that stay random, and groups bounded by tokens."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from laserrec.training.batching import batches, split_by_tokens


def test_every_example_once_and_alike_in_length():
    lengths = np.random.default_rng(0).integers(1, 500, 2000)
    plan = batches(lengths, 32, (1,))
    assert sorted(np.concatenate(plan).tolist()) == list(range(2000))
    padded = sum(len(p) * lengths[p].max() for p in plan)
    assert padded < 1.15 * lengths.sum()
    again, other = batches(lengths, 32, (1,)), batches(lengths, 32, (2,))
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(plan, other, strict=True))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 80))
def test_groups_are_neighbours_within_the_limit(tokens, limit):
    groups = split_by_tokens(tokens, limit)
    assert [i for group in groups for i in group] == list(range(len(tokens)))
    for group in groups:
        assert len(group) == 1 or sum(tokens[i] for i in group) <= limit
    for left, right in pairwise(groups):  # no group could have taken the next example as well
        assert sum(tokens[i] for i in left) + tokens[right[0]] > limit
