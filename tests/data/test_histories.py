"""Every form a caller may give histories in -> dense items, in order."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from laserrec.data.histories import read_histories
from laserrec.util.errors import UserError

INDEX = {"a": 1, "b": 2, "7": 3}
FRAME = pl.DataFrame({"user_id": ["y", "x", "y"], "item_id": ["b", "a", "a"], "other": [1, 2, 3]})


def rows(histories, **options) -> list[list[int]]:
    return [r.tolist() for r in read_histories(histories, INDEX, **options).rows]


def test_lists_are_users_from_zero():
    got = read_histories([["a", "b", "a"], ("b",), np.array(["a"])], INDEX)
    assert got.users == [0, 1, 2] and got.user_type == pl.Int64
    assert [r.tolist() for r in got.rows] == [[1, 2, 1], [2], [1]]
    assert all(r.dtype == np.int32 for r in got.rows)


def test_a_dict_keeps_its_users_and_order():
    got = read_histories({"y": ["b"], "x": ["a"]}, INDEX)
    assert got.users == ["y", "x"] and got.user_type == pl.String and not got.pandas
    assert read_histories({5: ["a"], 3: ["b"]}, INDEX).users == [5, 3]
    assert read_histories({5: ["a"], "x": ["b"]}, INDEX).users == ["5", "x"]


@pytest.mark.parametrize("frame", [FRAME, FRAME.to_pandas()])
def test_a_frame_is_grouped_in_row_order(frame):
    got = read_histories(frame, INDEX)
    assert got.users == ["y", "x"] and [r.tolist() for r in got.rows] == [[2, 1], [1]]
    assert got.pandas == isinstance(frame, pd.DataFrame)


def test_users_of_a_frame_may_be_numbers():
    got = read_histories(FRAME.with_columns(user_id=pl.Series([9, 4, 9])), INDEX)
    assert got.users == [9, 4] and got.user_type == pl.Int64


def test_item_ids_are_compared_as_text():
    assert rows([[7, "7"]]) == [[3, 3]]


def test_unknown_items():
    assert rows([["nope", "a", "b", "nada"]], unknown="drop") == [[1, 2]]
    with pytest.raises(UserError, match=r"user 0: 2 unknown item ids, first .'nope', 'nada'.*add_items"):
        rows([["nope", "a", "nada"]])


@pytest.mark.parametrize(("given", "message"), [
    ([], "no histories"), ({}, "no histories"), (FRAME.head(0), "no histories"),
    ([["a"], []], "user 1: it is empty"),
    ({"x": None}, "user 'x' is None, not a list"),
    ({"x": "a"}, "user 'x' is 'a', not a list"),
    (["a", "b"], "one list of item ids"), ([7], "one list of item ids"),
    (("a",), "one list of item ids"),
    ("a", "not str"), (5, "not int"), (None, "not NoneType"),
    (FRAME.drop("item_id"), "column item_id is missing; there are: user_id, other"),
])
def test_mistakes_are_named(given, message):
    with pytest.raises(UserError, match=message):
        read_histories(given, INDEX)
