"""Histories in files: the same users and rows in every form, part by part, and mistakes named."""

import json

import polars as pl
import pytest

from laserrec.batch.source import Source
from laserrec.data.door import read_histories
from laserrec.data.files import read_table
from laserrec.data.losses import LossWarning
from laserrec.data.tables import read_whole
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


@pytest.mark.parametrize(("users", "names"), [
    (pl.Series([7, 8, 9, 10], dtype=pl.UInt8), [7, 8, 9, 10]), ([7.0, 8.0, 9.0, 1.0], [7, 8, 9, 1]),
    ([7.5, 8.0, 9.0, 1.0], ["7.5", "8", "9", "1"]),
    (pl.Series([7, 2**63, 1, 2], dtype=pl.UInt64), ["7", str(2**63), "1", "2"]),
    ([" x", "7.0", "007", "y "], ["x", "7", "007", "y"])])
def test_user_ids_follow_the_one_rule(tmp_path, users, names):
    frame = LISTS.with_columns(user_id=pl.Series(users))
    frame.write_parquet(tmp_path / "h.parquet")
    assert [user for user, _ in read(Source(tmp_path / "h.parquet"), 3)] == names
    assert list(read_histories(frame, {}, "drop", tell=False).users) == names


def test_a_user_in_two_writings_is_one(tmp_path):
    pl.DataFrame({"user_id": ["a", "a ", "b"], "item_id": ["i1", "i2", "i3"]}).write_parquet(tmp_path / "h.parquet")
    got = read(Source(tmp_path / "h.parquet"), 1)
    assert [(user, rows["item_id"].to_list()) for user, rows in got] == [("a", ["i1", "i2"]), ("b", ["i3"])]


@pytest.mark.parametrize("chunk", [1, 2, 10])
def test_parts_of_other_types_and_columns(tmp_path, chunk):
    """As `recommend` reads them: each column as wide as any part has it, and those of all parts."""
    parts = [pl.DataFrame({"user_id": [1, 1, 2], "item_id": ["i2", "i1", "i3"], "timestamp": [2, 1, 1]},
                          schema_overrides={"timestamp": pl.Int32, "user_id": pl.Int32}),
             pl.DataFrame({"user_id": [2, 3], "shop": ["x", "x"], "item_id": ["i4", "i5"], "timestamp": [2**40, 7]})]
    for number, part in enumerate(parts):
        part.write_parquet(tmp_path / f"h-{number}.parquet")
    path = str(tmp_path / "h-*.parquet")
    got = read(Source(path), chunk)
    assert [user for user, _ in got] == [1, 2, 3]
    whole = read_table(path).frame
    assert pl.concat([rows for _, rows in got]).equals(whole.drop("user_id"))


def test_parts_that_can_not_be_one_table_are_refused(tmp_path):
    for number, part in enumerate((LISTS, LISTS.with_columns(items=pl.lit(1)))):
        part.write_parquet(tmp_path / f"h-{number}.parquet")
    with pytest.raises(UserError, match=r"the parts' columns differ in type: .*; write them with one schema"):
        Source(str(tmp_path / "h-*.parquet"))


@pytest.mark.parametrize("column", ["timestamp", "position"])
def test_a_row_without_a_time_is_named_by_its_place_in_the_file(tmp_path, column):
    rows = [(f"u{n:03}", "i1", "yesterday" if n == 200 else str(n)) for n in range(300)]
    frame = pl.DataFrame(rows, ["user_id", "item_id", column], orient="row")
    frame.write_csv(tmp_path / "h.csv")
    frame[:150].write_parquet(tmp_path / "h-0.parquet")
    frame[150:].write_parquet(tmp_path / "h-1.parquet")
    for name, place in (("h.csv", r"h\.csv:202"), ("h-*.parquet", r"h-1\.parquet: row 51")):
        with pytest.raises(UserError, match=rf"{place}, column {column}: neither a number nor .* 'yesterday'\); mend"):
            read(Source(str(tmp_path / name)), 7)


@pytest.mark.parametrize(("frame", "message"), [
    ({"user_id": [1], "item": ["i1"]}, r"h\.parquet: .*item_id"),
    ({"item_id": ["i1"]}, "user_id"),
    ({"user_id": [1, None], "item_id": ["i1", "i2"]}, r"h\.parquet: row 2, column user_id: empty id \(found None\)"),
    ({"user_id": ["a", "b", " "], "item_id": ["i1", "i2", "i3"]}, "row 3, column user_id: empty id"),
    ({"user_id": [1.0, float("nan")], "item_id": ["i1", "i2"]}, "row 2, column user_id: empty id"),
    ({"user_id": [["a"]], "item_id": ["i1"]}, "row 1, column user_id: a list or dict, not an id"),
    ({"user_id": [1, 2, 1], "item_id": ["i1", "i2", "i3"]}, "row 3: user '1' comes again; sort the rows by user_id"),
    ({"user_id": ["a", "b", "a "], "item_id": ["i1", "i2", "i3"]}, "row 3: user 'a' comes again"),
    ({"user_id": [], "item_id": []}, "has no rows"),
])
def test_bad_files_are_named(frame, message, tmp_path):
    pl.DataFrame(frame).write_parquet(tmp_path / "h.parquet")
    with pytest.raises(UserError, match=message):
        _ = Source(tmp_path / "h.parquet").n_users


@pytest.mark.parametrize("user", [["v"], True])
def test_json_lines_of_mixed_values(tmp_path, user):
    path = tmp_path / "h.jsonl"
    lines = [{"user_id": "u", "items": "i1"}, {"user_id": "v", "items": ["i2", "i3"]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_histories(read_whole(path), {"i1": 0, "i2": 1, "i3": 2}).rows == [[0], [1, 2]]
    assert [(name, rows["items"].to_list()) for name, rows in read(Source(path), 1)] == [
        ("u", [["i1"]]), ("v", [["i2", "i3"]])]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"user_id": user, "items": ["i1"]}]))
    for reader in (read_whole, lambda path: Source(path).n_users):
        with pytest.raises(UserError, match=r"h\.jsonl:3, column user_id: (a list or dict, not|not) an id \(found "):
            reader(path)


def test_no_file_and_no_parquet(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Source(tmp_path / "none.parquet")
    (tmp_path / "h.parquet").write_text("user_id,items")
    with pytest.raises(UserError, match="not readable as Parquet"):
        Source(tmp_path / "h.parquet")


def test_dates_that_are_not_used_are_told(tmp_path):
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "date": ["2024-01-03", "2024-01-02"]})
    frame.write_csv(tmp_path / "h.csv")
    with pytest.warns(LossWarning, match="the dates in 'date' are not used"):
        Source(tmp_path / "h.csv")
