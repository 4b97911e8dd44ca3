"""Rows behind a table: right whatever was cut off before, and copied seldom."""

import torch

from laserrec.util.room import Room


def test_rows_stand_behind_the_table_and_few_are_copied():
    room, table, places = Room(), torch.randn(8, 3), set()
    want = table.clone()
    for count in (1, 0, 1, 5, 2, 40, 3):
        rows = torch.randn(count, 3)
        table, want = room.add(table, rows), torch.cat([want, rows])
        assert torch.equal(table, want)
        places.add(table.data_ptr())
    assert len(places) == 3


def test_what_was_cut_off_is_overwritten_and_another_table_is_not_touched():
    room, first = Room(), torch.randn(4, 2)
    table = room.add(first, torch.randn(2, 2))
    table = room.add(table[:5], torch.ones(1, 2))
    assert torch.equal(table[:4], first) and table[5].tolist() == [1, 1] and len(table) == 6
    other = torch.zeros(6, 2)
    assert torch.equal(room.add(other, torch.ones(1, 2)), torch.cat([other, torch.ones(1, 2)]))
    assert table[5].tolist() == [1, 1] and not other.any()
    wider = torch.zeros(1, 3)
    assert room.add(wider, torch.ones(1, 3)).tolist() == [[0] * 3, [1] * 3]
