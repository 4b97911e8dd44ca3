"""The k best are a stable sort's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.retrieval.top import top


@given(st.lists(st.sampled_from([-float("inf"), -1.0, 0.0, 0.5, 2.0]), max_size=30), st.integers(1, 40), st.randoms())
@settings(max_examples=200, deadline=None)
def test_best_first_and_ties_by_row(values, k, random):
    rows = random.sample(range(100), len(values))
    found, scores = top(torch.tensor(values), torch.tensor(rows, dtype=torch.long), k)
    want = sorted(((-v, r) for v, r in zip(values, rows, strict=True) if v > -float("inf")))[:k]
    assert list(zip(scores.neg().tolist(), found.tolist(), strict=True)) == want
