"""The same tables through every door give the same histories, and the same raw frames to `prepare`."""

import tempfile
from pathlib import Path

import polars as pl
import pytest
from doors import DOORS
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.data.clean import as_id
from laserrec.data.raw import from_frames
from laserrec.data.readers import read_tables

INDEX = {name: row for row, name in enumerate(["1", "2", "3", "0", "007", "i 1", "ä", "A-1", "a-1", "1.5", "-4"])}
TEXT_IDS = st.sampled_from(["1", " 1", "2.0", "3\t", "007", "i 1", "\u00a0ä ", "A-1", "a-1", "1.5", "7", "nada", "00"])
ITEM_IDS = st.one_of(
    st.lists(TEXT_IDS, min_size=1, max_size=12).map(lambda v: pl.Series(v, dtype=pl.String)),
    st.lists(st.integers(-5, 5), min_size=1, max_size=12).map(lambda v: pl.Series(v, dtype=pl.Int64)),
    st.lists(st.integers(0, 5), min_size=1, max_size=12).map(lambda v: pl.Series(v, dtype=pl.UInt8)),
    st.lists(st.sampled_from([1.0, 2.0, 3.0, 1.5, 0.0, -0.0, -4.0]), min_size=1, max_size=12).map(
        lambda v: pl.Series(v, dtype=pl.Float64)),
    st.lists(TEXT_IDS, min_size=1, max_size=12).map(lambda v: pl.Series(v, dtype=pl.Categorical)),
)


@st.composite
def tables(draw):
    """Interactions with distinct times, in any order of rows."""
    items = draw(ITEM_IDS)
    users = draw(st.lists(st.sampled_from(["u1", "u2", "ö"]), min_size=len(items), max_size=len(items)))
    times = draw(st.permutations(range(len(items))))
    return pl.DataFrame({"user_id": users, "item_id": items, "timestamp": pl.Series(times, dtype=pl.Int64)})


def expected(table):
    """The same by hand."""
    histories = {user: [] for user in table["user_id"]}
    for user, item, _ in sorted(table.iter_rows(), key=lambda row: row[2]):
        if (name := as_id(item)) in INDEX:
            histories[user].append(INDEX[name])
    return histories


@pytest.mark.parametrize("door", DOORS)
@settings(max_examples=40, deadline=None)
@given(table=tables())
def test_every_door_understands_the_same(door, table):
    with tempfile.TemporaryDirectory() as folder:
        assert DOORS[door](table, INDEX, Path(folder)) == expected(table)


TEXTS = st.one_of(st.none(), st.sampled_from(["Drill", "Dr&amp;ill", " a\nb ", "<br>", "<b>x</b>", '"q", z', "ä;ö"]))


@settings(max_examples=60, deadline=None)
@given(table=tables(), titles=st.lists(TEXTS, min_size=3, max_size=3), listed=st.booleans())
def test_prepare_reads_the_same_from_frames_and_files(table, titles, listed):
    items = pl.DataFrame({"item_id": ["1", " 2", "3.0"], "title": pl.Series(titles, dtype=pl.String)})
    expected = from_frames(table, items)
    assert expected.items["item_id"].sort().to_list() == ["1", "2", "3"]
    raws = {"pandas": from_frames(table.to_pandas(), items.to_pandas()), "arrow": from_frames(table.to_arrow(), items)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ending, write in (("csv", "write_csv"), ("parquet", "write_parquet"), ("jsonl", "write_ndjson")):
            given = items.with_columns(pl.concat_list("title")) if listed and ending != "csv" else items
            getattr(table, write)(folder / f"a.{ending}")
            getattr(given, write)(folder / f"b.{ending}")
            raws[ending] = read_tables(folder / f"a.{ending}", folder / f"b.{ending}")
    for kind, raw in raws.items():
        assert raw.interactions.equals(expected.interactions), kind
        assert raw.items.sort("item_id").equals(expected.items.sort("item_id")), kind
