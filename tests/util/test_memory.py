"""What is held at once stays within the limit, and there is always something to hold."""

import pytest

from laserrec.util import memory
from laserrec.util.memory import columns_at_once, rows_at_once


@pytest.mark.parametrize(("rows", "n_items"), [(1, 10), (128, 4385), (128, 1_000_000), (100_000, 1_000_000)])
def test_within_the_limit(rows, n_items):
    columns = columns_at_once(rows, n_items, 64, limit=2**24)
    assert 1 <= columns <= n_items and (columns == 1 or columns * (rows * 16 + 64 * 8) <= 2**24)
    fit = rows_at_once(n_items, rows, limit=2**24)
    assert 1 <= fit <= rows and (fit == 1 or fit * n_items * 16 <= 2**24)


def test_no_more_is_split_than_must_be():
    assert columns_at_once(128, 4385, 576) == 4385
    assert rows_at_once(4385, 256) == 256
    assert rows_at_once(1_000_000, 256) < 256


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    machine = memory.available_bytes()
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 200\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available_bytes() == 300
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() > machine / 2
