"""The tensor type of histories against lists."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.data.histories import Histories

ROWS = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(0, 9))
def test_every_view_equals_the_lists(rows, count, limit):
    histories = Histories.of(rows)
    assert histories.lists() == rows and len(histories) == len(rows)
    assert [histories[u].tolist() for u in range(len(rows))] == rows
    assert histories.lengths.tolist() == [len(r) for r in rows]
    assert histories.last(count).lists() == [r[-count:] for r in rows]
    assert histories.without_oldest().lists() == [r[1:] for r in rows]
    assert histories.below(limit).lists() == [[i for i in r if i < limit] for r in rows]
    assert histories.users.tolist() == [u for u, r in enumerate(rows) for _ in r]
    assert histories.ages.tolist() == [a for r in rows for a in reversed(range(len(r)))]
    pairs = histories.distinct()
    assert list(zip(pairs.users.tolist(), pairs.items.tolist(), strict=True)) == sorted(
        {(u, i) for u, r in enumerate(rows) for i in r})
    longest = max([1, *map(len, rows)])
    assert histories.padded(99).tolist() == [r + [99] * (longest - len(r)) for r in rows]
    order = np.random.default_rng(0).permutation(len(rows))
    assert histories.take(order).lists() == [rows[i] for i in order]
    assert histories.take(torch.as_tensor(order)[:2]).lists() == [rows[i] for i in order[:2]]


def test_rows_come_as_arrays_and_tensors_too():
    histories = Histories.of([np.array([3, 1], dtype=np.int32), torch.tensor([2])])
    assert histories.lists() == [[3, 1], [2]] and histories.items.dtype == torch.int64


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(2, 4), st.data())
def test_windows_hold_every_step_once(rows, length, data):
    shift = data.draw(st.lists(st.integers(0, length - 2), min_size=len(rows), max_size=len(rows)))
    found = Histories.of(rows).windows(length, torch.tensor(shift, dtype=torch.long)).lists()
    want = []
    for row, less in zip(rows, shift, strict=True):
        if len(row) <= length:
            want.append(row)
            continue
        end, size = len(row), length - less
        while end > 1:
            want.append(row[max(0, end - size) : end])
            end, size = max(0, end - size) + 1, length
    assert found == want
    assert all(len(window) <= length for window in found)
