"""Frames with the caller's columns -> Raw: ids, times, positions, texts, column maps."""

import time
from datetime import UTC, date, datetime

import pandas as pd
import polars as pl
import pytest

from laserrec.data.raw import INTERACTION_SCHEMA, ITEM_SCHEMA, clean_text, from_frames, parse_times
from laserrec.util.errors import UserError

ITEMS = pl.DataFrame({"item_id": ["a", "b"], "title": ["Drill", "Saw"]})


def acts(**columns):
    return pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], **columns})


def times(*values, **options):
    return parse_times(pl.Series(list(values), **options)).to_list()


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
    with pytest.raises(UserError, match="polars or pandas frame, not list"):
        from_frames([("u", "a")], ITEMS)


def test_times_keep_their_unit_and_their_order():
    nanoseconds = 1_577_836_800_123_456_789  # more digits than a float keeps
    assert times(nanoseconds, 5) == [nanoseconds, 5]
    assert times(str(nanoseconds), " 5 ") == [nanoseconds, 5]
    assert times("12", "1e3", "x", "") == [12, 1000, None, None]
    assert times(12.0, 13.0) == [12, 13]
    assert times("12", "12.25", "12.5") == [12000, 12250, 12500]
    assert times(12.25, float("nan"), float("inf")) == [12250, None, None]


def test_dates_become_utc_milliseconds(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # the machine's own zone must not matter
    time.tzset()
    moment = datetime(2020, 1, 1, 12, tzinfo=UTC)
    expected = int(moment.timestamp() * 1000)
    assert times("2020-01-01T12:00:00", "2020-01-01 14:00:00+02:00", "2020-01-01T12:00:00.5Z", "soon") == [
        expected, expected, expected + 500, None]
    assert times(moment) == [expected]
    assert times(date(2020, 1, 1)) == [1577836800000]
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(("columns", "message"), [
    ({"timestamp": ["5", "soon"]}, r"row 2, column timestamp: neither.*'soon'.*--on-error skip"),
    ({"timestamp": [5, None]}, r"row 2, column timestamp"),
    ({"position": [0, 1.5]}, r"row 2, column position: not a whole number"),
    ({"user_id": ["u", " "]}, r"row 2, column user_id: empty id"),
    ({"item_id": [None, "a"]}, r"row 1, column item_id: empty id"),
])
def test_a_broken_row_is_named_or_skipped(columns, message):
    frame = pl.DataFrame({**acts().to_dict(as_series=False), **columns}, strict=False)
    with pytest.raises(UserError, match=message):
        from_frames(frame, ITEMS)
    raw = from_frames(frame, ITEMS, on_error="skip")
    assert (raw.interactions.height, raw.notes["skipped_lines"]) == (1, 1)


def test_a_wholly_empty_timestamp_column_means_no_timestamps():
    raw = from_frames(acts(timestamp=["", None]), ITEMS)
    assert raw.interactions["timestamp"].to_list() == [None, None]


def test_position_becomes_the_order():
    raw = from_frames(acts(position=["7", "3"]), ITEMS)
    assert raw.interactions["order"].to_list() == [7, 3]


def test_column_map_for_both_tables_and_for_one():
    frame = pl.DataFrame({"customer": ["u"], "sku": ["a"]})
    items = pl.DataFrame({"product": ["a"], "name": ["Drill"], "path": [["Tools", "Drills"]]})
    raw = from_frames(frame, items, {"user_id": "customer", "interactions.item_id": "sku", "items.item_id": "product",
                                     "title": "name", "category": "path"})
    assert raw.interactions.row(0)[:2] == ("u", "a")
    assert raw.items.row(0) == ("a", "Drill", None, "Tools Drills")


@pytest.mark.parametrize(("columns", "message"), [
    ({}, r"interactions: no column for user_id.*there are: customer, item_id.*--columns user_id="),
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
    with pytest.raises(UserError, match="column user_id holds List"):
        from_frames(pl.DataFrame({"user_id": [["u"]], "item_id": ["a"]}), ITEMS)
    with pytest.raises(UserError, match="on_error is 'raise' or 'skip'"):
        from_frames(acts(), ITEMS, on_error="ignore")


@pytest.mark.parametrize(("text", "expected"), [
    ("  two\n words ", "two words"),
    ("a\x00b\u00a0c", "a b c"),
    ("Black &amp; Decker 3&quot; Säge", 'Black & Decker 3" Säge'),
    ("<span class='x'>Drill</span> <b>18V</b>", "Drill 18V"),
    ("size 3 < 5 and 7 > 6, <M8> thread", "size 3 < 5 and 7 > 6, <M8> thread"),
    ("<style>.a{color:red}</style>Drill<script>var x", "Drill"),
    ('<img src="a.png" alt="Amazon Fashion" width="1"/>', "Amazon Fashion"),
    ('Drill <span class="cut off', "Drill"),
    ("var aPageStart = (new Date()).getTime();", None),
    ("<span></span>", None),
    (" \n", None),
    ("日本語 ✓", "日本語 ✓"),
    ("x" * 10_000, "x" * 10_000),
])
def test_text_cleaning(text, expected):
    assert clean_text(pl.Series("title", ["plain", text, None])).to_list() == ["plain", expected, None]


def test_of_several_rows_of_an_item_the_fullest_stays_whatever_their_order():
    rows = [("a", None, "brand", "cat"), ("a", "Drill", None, None), ("a", "Saw", "Z", None), ("a", "Saw", "B", None),
            ("b", "Nail", None, None), ("c", None, "brand", "cat"), ("c", "Bolt", None, None)]
    for order in (rows, rows[::-1]):
        raw = from_frames(acts(), pl.DataFrame(order, schema=ITEM_SCHEMA, orient="row"))
        assert sorted(raw.items.rows()) == [("a", "Saw", "B", None), ("b", "Nail", None, None),
                                            ("c", "Bolt", None, None)]
        assert raw.notes["duplicate_item_rows"] == 4
