"""Histories in files: the same users and rows in every form, part by part, and mistakes named."""

import polars as pl
import pytest

from laserrec.batch.source import Source
from laserrec.util.errors import UserError

ROWS = {"b": ["i1", "i2"], "a": ["i3"], "d": [], "c": ["i1", "i2", "i3", "i4"]}
LISTS = pl.DataFrame({"user_id": list(ROWS), "items": list(ROWS.values())})


def long(rows=ROWS):
    return pl.DataFrame([(u, i) for u, items in rows.items() for i in items], ["user_id", "item_id"], orient="row")


def read(source, chunk):
    """[(user, place, item ids)] of all parts."""
    out = []
    for part in source.parts(chunk):
        users, rows = source.read(part)
        assert rows["user_id"].unique(maintain_order=True).to_list() == list(range(len(users))) and len(users) <= chunk
        out += [(user, rows.filter(user_id=place).drop("user_id")) for place, user in enumerate(users)]
    return out


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_rows_of_users_and_of_interactions(tmp_path, chunk):
    LISTS.write_parquet(tmp_path / "lists.parquet")
    got = read(Source(tmp_path / "lists.parquet"), chunk)
    assert [(u, rows["items"].to_list()[0]) for u, rows in got] == list(ROWS.items())
    for name in ("long.parquet", "long.csv", "long.jsonl"):
        write = {"parquet": "write_parquet", "csv": "write_csv", "jsonl": "write_ndjson"}[name.split(".")[1]]
        getattr(long(), write)(tmp_path / name)
        source = Source(tmp_path / name)
        assert source.n_users == 3
        assert [(u, r["item_id"].to_list()) for u, r in read(source, chunk)] == [p for p in ROWS.items() if p[1]]


def test_folders_of_parts_and_patterns(tmp_path):
    (tmp_path / "h.parquet").mkdir()
    for number, part in enumerate((long()[:2], long()[2:])):
        part.write_parquet(tmp_path / "h.parquet" / f"part-{number}.parquet")
    (tmp_path / "h.parquet" / "_SUCCESS").touch()
    for path in (tmp_path / "h.parquet", str(tmp_path / "h.parquet" / "part-*.parquet")):
        source = Source(path)
        assert source.n_users == 3 and [len(rows) for _, rows in read(source, 2)] == [2, 1, 4]
    before = source.ends()
    long()[1:2].write_parquet(tmp_path / "h.parquet" / "part-0.parquet")
    assert Source(tmp_path / "h.parquet").ends() != before


def test_user_ids_keep_their_type(tmp_path):
    for users in ([7, 8, 9, 10], [7.5, 8.0, 9.0, 1.0], [" x", "x", "", "y"]):
        LISTS.with_columns(user_id=pl.Series(users)).write_parquet(tmp_path / "h.parquet")
        assert [user for user, _ in read(Source(tmp_path / "h.parquet"), 3)] == users


@pytest.mark.parametrize(("frame", "message"), [
    ({"user_id": [1], "item": ["i1"]}, r"h\.parquet: .*item_id"),
    ({"item_id": ["i1"]}, "user_id"),
    ({"user_id": [1, None], "item_id": ["i1", "i2"]}, "row 2 has no user_id"),
    ({"user_id": [1, 2, 1], "item_id": ["i1", "i2", "i3"]}, "user 1 comes again at row 3; sort the rows by user_id"),
    ({"user_id": [], "item_id": []}, "has no rows"),
])
def test_bad_files_are_named(frame, message, tmp_path):
    pl.DataFrame(frame).write_parquet(tmp_path / "h.parquet")
    with pytest.raises(UserError, match=message):
        _ = Source(tmp_path / "h.parquet").n_users


def test_no_file_and_no_parquet(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Source(tmp_path / "none.parquet")
    (tmp_path / "h.parquet").write_text("user_id,items")
    with pytest.raises(UserError, match="not readable as Parquet"):
        Source(tmp_path / "h.parquet")
