"""The same tables through every door give the same histories, and the same raw frames to `prepare`."""

import tempfile
from pathlib import Path

import polars as pl
import pytest
from doors import FILES, FRAMES, INDEX, NAMELESS, expected, lists, tables, written
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from laserrec.data.door import read_histories
from laserrec.data.raw import from_frames
from laserrec.data.readers import read_tables
from laserrec.data.tables import read_whole


def understood(histories):
    asked = read_histories(histories, INDEX, unknown="drop", tell=False)
    return dict(zip(map(str, asked.users), asked.rows, strict=True))


@pytest.mark.parametrize("form", FRAMES)
@settings(max_examples=60, deadline=None)
@given(table=tables())
def test_every_frame_is_understood_the_same(form, table):
    assert understood(FRAMES[form](table)) == expected(table)


@pytest.mark.parametrize("form", NAMELESS)
@settings(max_examples=60, deadline=None)
@given(table=tables())
def test_lists_without_users_are_understood_the_same(form, table):
    want, users = expected(table), lists(table)["user_id"]
    assert list(understood(NAMELESS[form](table)).values()) == [want[user] for user in users]


@pytest.mark.parametrize("form", FILES)
@settings(max_examples=60, deadline=None)
@given(table=tables())
def test_every_file_is_understood_the_same(form, table):
    with tempfile.TemporaryDirectory() as folder:
        assert understood(read_whole(written(form, table, Path(folder)))) == expected(table)


TEXTS = st.one_of(st.none(), st.sampled_from(["Drill", "Dr&amp;ill", " a\nb ", "<br>", "<b>x</b>", '"q", z', "ä;ö"]))


@settings(max_examples=60, deadline=None)
@given(table=tables(), titles=st.lists(TEXTS, min_size=3, max_size=3), listed=st.booleans())
def test_prepare_reads_the_same_from_frames_and_files(table, titles, listed):
    table = table.filter(pl.col("item_id").is_not_null())
    assume(table.height)
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
