"""Odd values and broken files at every door: an answer or a UserError, never another exception."""

import contextlib
import datetime as dt
import gzip
import tempfile
import warnings
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.data.door import read_histories
from laserrec.data.files import FileOptions
from laserrec.data.raw import from_frames, read_items
from laserrec.data.readers import read_amazon_2018, read_recbole, read_tables
from laserrec.data.tables import read_whole
from laserrec.util.errors import UserError

INDEX = {"a": 0, "7": 1}
ODD = st.sampled_from([
    None, float("nan"), 7, 7.0, "7", " a", b"a", b"\xff", True, np.int64(7), np.float32(7), np.array(["a"]),
    np.array(7), [], ["a"], ["a", None], [["a"]], ("a",), {"a"}, {"a": 1}, {}, dt.date(2020, 1, 1),
    dt.datetime(2020, 1, 1),
    dt.timedelta(1), dt.time(1), Decimal("7"), Decimal("NaN"), UUID(int=1), pd.NA, pd.NaT, pd.Timestamp("2020"),
    pd.Series(["a"]), pl.Series(["a"]), object(), "x\ud83d", "", float("inf"), 1e300, 10**30, -5, complex(1, 1),
    np.datetime64("2020-01-01"), range(3), "['a']", pd.Interval(0, 1)])
COLUMNS = [
    pl.Series([1, 2**63 + 5, None], dtype=pl.UInt64), pl.Series([1, 2**100, None], dtype=pl.Int128),
    pl.Series([7.0, None, float("nan")], dtype=pl.Float32), pl.Series([7.0, 1e300, 0.5]),
    pl.Series([True, None, False]), pl.Series(["a", None, "7"], dtype=pl.Categorical),
    pl.Series([b"a", None, b"\xff"]), pl.Series([dt.date(1, 1, 1), None, dt.date(9999, 1, 1)]),
    pl.Series([dt.time(1)] * 3), pl.Series([dt.timedelta(1)] * 3), pl.Series([Decimal("7.00"), None, Decimal("1.5")]),
    pl.Series([[1, 2], None, [3, None]]), pl.Series([[["a"]], None, []]), pl.Series([{"name": "a"}] * 3),
    pl.Series([[1, 2], None, [3, 4]], dtype=pl.Array(pl.Int64, 2)), pl.Series([None] * 3),
    pl.Series([object(), "a", None], dtype=pl.Object), pl.Series([[{"name": "a"}]] * 3)]
PIECES = st.lists(st.sampled_from([
    b"user_id", b"item_id", b"timestamp", b",", b";", b"\t", b"\n", b"\r", b'"', b"a", b"7", b"\xff", b"\x00",
    b"\xef\xbb\xbf", b"\xff\xfe", b"{", b"}", b"[", b"]", b":", b'{"user_id": "u", "item_id": "a"}\n', b"null",
    b"1e999", b'{"user_id": 1, "item_id": ["a"]}\n', b"user_id,item_id,title\nu,a,b\n",
    b'"\\ud83d"', b" "]), max_size=12)


def tried(call, *arguments, **options):
    with warnings.catch_warnings(), contextlib.suppress(UserError):
        warnings.simplefilter("ignore")
        call(*arguments, **options)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(ODD, max_size=4), other=st.lists(ODD, min_size=4, max_size=4), unknown=st.sampled_from(
    ["error", "drop"]), name=st.sampled_from(["timestamp", "position", "title"]))
def test_python_values(values, other, unknown, name):
    for histories in (values, [values], {"u": values}, pd.Series(values, dtype=object)):
        tried(read_histories, histories, INDEX, unknown, exclude=other)
    columns = {"user_id": other, "item_id": values, name: other}
    frame = pd.DataFrame({c: pd.Series(v[: len(values)], dtype=object) for c, v in columns.items()})
    tried(read_histories, frame, INDEX, unknown)
    tried(read_items, frame)
    for on_error in ("raise", "skip"):
        tried(from_frames, frame, frame.rename(columns={name: "title"}), on_error=on_error)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda s: str(s.dtype))
def test_column_types(column):
    for name in ("timestamp", "position", "title", "brand"):
        items = pl.DataFrame({"user_id": ["u", "v", "w"], "item_id": column, name: column})
        users = pl.DataFrame({"user_id": column, "item_id": ["a", "7", "b"]})
        for frame in (items, users):
            tried(read_histories, frame, INDEX, "drop")
            tried(from_frames, frame, items.rename({name: "title"}), on_error="skip")
            tried(from_frames, frame, items.rename({name: "title"}))


@settings(max_examples=150, deadline=None)
@given(data=PIECES.map(b"".join), ending=st.sampled_from([".csv", ".tsv", ".json", ".inter", ".item", ".parquet"]),
       packed=st.sampled_from(["no", "yes", "cut", "not really"]), on_error=st.sampled_from(["raise", "skip"]),
       separator=st.sampled_from([None, ";"]), encoding=st.sampled_from(["utf-8", "cp1252", "utf-16", "utf-7"]))
def test_broken_files(data, ending, packed, on_error, separator, encoding):
    if packed in ("yes", "cut"):
        data = gzip.compress(data)[: -5 if packed == "cut" else None]
    options = FileOptions(on_error, separator, encoding)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{ending}{'' if packed == 'no' else '.gz'}"
        path.write_bytes(data)
        reading = FileOptions(separator=separator, encoding=encoding)
        tried(lambda: read_histories(read_whole(path, reading), INDEX, "drop"))
        tried(read_tables, path, path, None, options)
        tried(read_recbole, path, path, options=options)
        tried(read_amazon_2018, path, path, options)
