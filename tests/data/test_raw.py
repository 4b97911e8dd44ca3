"""Frames with the caller's columns -> Raw: ids, times, positions, texts, column maps."""

from datetime import date
from decimal import Decimal
from uuid import UUID

import pandas as pd
import polars as pl
import pytest

from laserrec.data.raw import INTERACTION_SCHEMA, ITEM_SCHEMA, from_frames, read_items
from laserrec.util.errors import UserError

ITEMS = pl.DataFrame({"item_id": ["a", "b"], "title": ["Drill", "Saw"]})


def acts(**columns):
    return pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], **columns})


def test_frames_come_out_with_fixed_schemas():
    raw = from_frames(acts(), ITEMS)
    assert dict(raw.interactions.schema) == INTERACTION_SCHEMA
    assert dict(raw.items.schema) == ITEM_SCHEMA
    assert raw.interactions["order"].to_list() == [0, 1]
    assert raw.interactions["timestamp"].null_count() == 2


def test_pandas_and_polars_frames_give_the_same():
    frame = pd.DataFrame({"user_id": [7, 7, 8], "item_id": [1.0, 2.0, 1.0],
                          "timestamp": pd.to_datetime(["2020-01-01"] * 3)})
    items = pd.DataFrame({"item_id": [1, 2], "title": ["Drill", "Säge"], "brand": [float("nan"), "X"]})
    raw = from_frames(frame, items)
    assert raw.interactions["user_id"].to_list() == ["7", "7", "8"]
    assert raw.interactions["item_id"].to_list() == ["1", "2", "1"]
    assert raw.interactions["timestamp"].unique().to_list() == [1577836800000]
    assert raw.items.rows() == [("1", "Drill", None, None), ("2", "Säge", "X", None)]
    same = from_frames(pl.from_pandas(frame).lazy(), pl.from_pandas(items))
    assert same.interactions.equals(raw.interactions)
    with pytest.raises(UserError, match="list of dicts, not list"):
        from_frames([("u", "a")], ITEMS)


@pytest.mark.parametrize(("columns", "message"), [
    ({"timestamp": ["5", "soon"]}, r"row 2, column timestamp: neither.*'soon'.*--on-error skip .Python: on_err"),
    ({"timestamp": [5, None]}, r"row 2, column timestamp"),
    ({"timestamp": ["2023-05-18", "1684439826000"]}, r"row 2, column timestamp: this column mixes numbers and dates"),
    ({"timestamp": ["1684439826000", "2023-05-18"]}, r"row 2, column timestamp: this column mixes numbers and dates"),
    ({"position": ["0", "first"]}, r"row 2, column position: neither a number"),
    ({"user_id": ["u", " "]}, r"row 2, column user_id: empty id"),
    ({"item_id": [None, "a"]}, r"row 1, column item_id: empty id"),
    ({"user_id": ["u", "NULL"]}, r"row 2, column user_id: a missing value in words, not an id \(found 'NULL'\)"),
])
def test_a_broken_row_is_named_or_skipped(columns, message):
    frame = pl.DataFrame({**acts().to_dict(as_series=False), **columns}, strict=False)
    with pytest.raises(UserError, match=message):
        from_frames(frame, ITEMS)
    raw = from_frames(frame, ITEMS, on_error="skip")
    assert (raw.interactions.height, raw.notes["skipped_lines"]) == (1, 1)


def test_where_all_rows_are_broken_the_first_is_named():
    frame = acts(timestamp=["12/1/2010", "soon"])
    with pytest.raises(UserError, match=r"^interactions: all of 2 lines are broken, none is left; the first is "
                                        r"interactions: row 1, column timestamp: neither.*\(found '12/1/2010'\)$"):
        from_frames(frame, ITEMS, on_error="skip")


def test_a_wholly_empty_timestamp_column_means_no_timestamps():
    raw = from_frames(acts(timestamp=["", None]), ITEMS)
    assert from_frames(acts(timestamp=["NULL", "NULL"]), ITEMS).interactions["timestamp"].to_list() == [None, None]
    assert raw.interactions["timestamp"].to_list() == [None, None]


def test_position_becomes_the_order():
    raw = from_frames(acts(position=["7", "3"]), ITEMS)
    assert raw.interactions["order"].to_list() == [7, 3]
    assert from_frames(acts(position=[0.0, 1.5]), ITEMS).interactions["order"].to_list() == [0, 1500]


def test_column_map_for_both_tables_and_for_one():
    frame = pl.DataFrame({"customer": ["u"], "sku": ["a"]})
    items = pl.DataFrame({"product": ["a"], "name": ["Drill"], "path": [["Tools", "Drills"]]})
    raw = from_frames(frame, items, {"user_id": "customer", "interactions.item_id": "sku", "items.item_id": "product",
                                     "title": "name", "category": "path"})
    assert raw.interactions.row(0)[:2] == ("u", "a")
    assert raw.items.row(0) == ("a", "Drill", None, "Tools Drills")


@pytest.mark.parametrize(("columns", "message"), [
    ({}, r"interactions: no column for user_id.*there are: customer, item_id; name .* --columns user_id=YOURS"),
    ({"user_id": "client"}, r"looked for 'client'"),
    ({"user_id": "customer", "brand": "maker"}, r"items: no column for brand \(looked for 'maker'\)"),
    ({"user": "customer"}, r"'user' is not a column of ours"),
    ({"items.user_id": "customer"}, r"'items.user_id' is not a column of ours"),
])
def test_missing_columns_are_listed_with_what_exists(columns, message):
    frame = pl.DataFrame({"customer": ["u"], "item_id": ["a"]})
    with pytest.raises(UserError, match=message):
        from_frames(frame, ITEMS, columns)


def test_ids_must_be_text_or_numbers():
    with pytest.raises(UserError, match="row 1, column user_id: a list or dict, not an id"):
        from_frames(pl.DataFrame({"user_id": [["u"]], "item_id": ["a"]}), ITEMS)
    with pytest.raises(UserError, match="on_error is 'raise' or 'skip'"):
        from_frames(acts(), ITEMS, on_error="ignore")


def test_columns_of_pandas_that_polars_does_not_know():
    frame = pd.DataFrame({"user_id": pd.arrays.SparseArray([7, 7, 8]), "item_id": ["a", "b", "a"],
                          "wave": [1 + 2j, 2j, 0j], "timestamp": pd.arrays.SparseArray([5, 0, 2])})
    raw = from_frames(frame, ITEMS)
    assert raw.interactions.rows() == [("7", "a", 5, 0), ("7", "b", 0, 1), ("8", "a", 2, 2)]
    with pytest.raises(UserError, match="row 1, column item_id: not an id"):
        from_frames(frame, ITEMS, {"interactions.item_id": "wave"})


def test_a_column_map_is_a_dict():
    with pytest.raises(UserError, match=r"columns is a dict of our names and yours.*not \['user_id'\]"):
        from_frames(acts(), ITEMS, ["user_id"])
    frame = pd.DataFrame([["u", "a"], ["v", "b"]])
    assert from_frames(frame, ITEMS, {"user_id": 0, "interactions.item_id": 1}).interactions["user_id"][1] == "v"


def test_python_values_that_are_no_ids():
    for odd in (True, 1e18, date(2020, 1, 1)):
        with pytest.raises(UserError, match=r"row 2, column user_id: (not an id|a float too large)"):
            from_frames([{"user_id": "u", "item_id": "a"}, {"user_id": odd, "item_id": "a"}], ITEMS)
    with pytest.raises(UserError, match="new items: row 1, column item_id: not an id"):
        read_items({"item_id": True, "title": "a"})


def test_of_several_rows_of_an_item_the_fullest_stays_whatever_their_order():
    rows = [("a", None, "brand", "cat"), ("a", "Drill", None, None), ("a", "Saw", "Z", None), ("a", "Saw", "B", None),
            ("b", "Nail", None, None), ("c", None, "brand", "cat"), ("c", "Bolt", None, None)]
    for order in (rows, rows[::-1]):
        raw = from_frames(acts(), pl.DataFrame(order, schema=ITEM_SCHEMA, orient="row"))
        assert sorted(raw.items.rows()) == [("a", "Saw", "B", None), ("b", "Nail", None, None),
                                            ("c", "Bolt", None, None)]
        assert raw.notes["duplicate_item_rows"] == 4


def test_the_most_frequent_title_wins():
    """One file for both tables, as Online Retail: a row per sale, some with a note in place of the name."""
    sales = pl.DataFrame({"user_id": ["u"] * 6, "item_id": ["a"] * 4 + ["b"] * 2,
                          "title": ["?", "Drill", None, "Drill", "check", "<br>"]})
    for frame in (sales, sales.reverse()):
        titles = from_frames(frame, frame).items.sort("item_id")["title"].to_list()
        assert titles == ["Drill", "check"]


def test_new_items_are_cleaned_as_those_of_fit():
    frame = pd.DataFrame({"item_id": [7.0, 8.0], "title": ["Drill &amp; <b>bits</b>", "Saw"],
                          "category": [[["Tools", "Drills"]], [{"name": "Saws"}]]})
    assert read_items(frame).rows() == [("7", "Drill & bits", None, "Tools Drills"), ("8", "Saw", None, "Saws")]
    assert read_items(pl.DataFrame(schema=ITEM_SCHEMA)).is_empty()


@pytest.mark.parametrize(("rows", "message"), [
    ({"item_id": ["a", ""], "title": ["x", "y"]}, "row 2, column item_id: empty id"),
    ({"item_id": ["a", " a"], "title": ["x", "y"]}, "row 1: item 'a' stands in more than one row"),
    ({"item_id": ["a", "b"], "title": ["x", "<br>"]}, "row 2: item 'b' has no title"),
    ({"item_id": ["a"], "name": ["x"]}, "no column for title; there are: item_id, name"),
])
def test_new_items_that_are_none(rows, message):
    with pytest.raises(UserError, match=f"new items: {message}"):
        read_items(pl.DataFrame(rows))


@pytest.mark.parametrize("frame", [
    pd.DataFrame([["u", "a"]], columns=["user_id", "user_id"]), pd.DataFrame({"user_id": ["u"]}).groupby("user_id"),
    {"user_id": ["u"]}, None,
])
def test_frames_that_cannot_be_read(frame):
    with pytest.raises(UserError, match=r"^interactions"):
        from_frames(frame, ITEMS)


def test_odd_columns_are_read_or_refused_by_row():
    ids = pd.DataFrame({"user_id": [UUID(int=1), UUID(int=2)], "item_id": [Decimal("7"), "a"]})
    assert from_frames(ids, ITEMS).interactions["item_id"].to_list() == ["7", "a"]
    assert from_frames(ids.set_index("user_id"), ITEMS).interactions["user_id"][0].endswith("0001")
    with pytest.raises(UserError, match="row 2, column item_id: a float too large to hold all digits"):
        from_frames(acts().with_columns(item_id=pl.Series([1.0, 1.5e18])), ITEMS)
    with pytest.raises(UserError, match="row 1, column timestamp: neither"):
        from_frames(acts(timestamp=[[1], [2]]), ITEMS)
    items = ITEMS.with_columns(category=pl.Series([[["Tools"], ["Drills", None]], None]))
    assert from_frames(acts(), items).items["category"].to_list() == ["Tools Drills", None]
