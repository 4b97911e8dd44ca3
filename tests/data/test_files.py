"""Files in parts, with other separators and encodings, and files that can't be read."""

import gzip
import json

import pandas as pd
import polars as pl
import pytest

from laserrec.config import DataConfig
from laserrec.data.door import read_histories
from laserrec.data.files import FileOptions, read_table
from laserrec.data.prepare import prepare_source
from laserrec.data.raw import from_frames
from laserrec.data.readers import read_tables
from laserrec.data.tables import read_listed, read_whole, write_frame
from laserrec.util.errors import UserError

ROWS = pl.DataFrame({"user_id": ["u", "v", "w"], "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]})
TEXT = "user_id,item_id,timestamp\nu,ä,1\nv,b,2\n"


def read_frame(path, separator=None, encoding="utf-8"):
    return read_listed(path, FileOptions(separator=separator, encoding=encoding)).frame


def parts(folder, ending):
    """ROWS as Spark leaves them: two parts and notes of its own."""
    folder.mkdir()
    for number, rows in enumerate((ROWS.head(2), ROWS.tail(1))):
        path = folder / f"part-0000{number}-c000.snappy{ending}"
        if ending == ".parquet":
            rows.write_parquet(path)
        elif ending.startswith(".csv"):
            data = rows.write_csv().encode()
            path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
        else:
            path.write_text(rows.write_ndjson(), encoding="utf-8")
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000.crc").write_bytes(b"crc")
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "part-9.csv").write_text("broken")
    return folder


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".csv.gz", ".json"])
def test_folders_of_parts_and_patterns_are_one_table(tmp_path, ending):
    folder = parts(tmp_path / f"orders{ending}", ending)
    for path in (folder, str(folder / "part-*"), str(tmp_path / "*" / f"*{ending}")):
        assert read_frame(path).select(pl.all().cast(pl.String)).equals(ROWS.cast(pl.String)), path


def test_a_row_of_a_part_is_named_by_its_file(tmp_path):
    folder = parts(tmp_path / "orders", ".csv")
    (folder / "part-00002.csv").write_text("user_id,item_id,timestamp\nx,d,4\ny,,5\n")
    table = read_table(folder)
    assert [table.where(n).rpartition("/")[2] for n in (0, 2, 4)] == [
        "part-00000-c000.snappy.csv:2", "part-00001-c000.snappy.csv:2", "part-00002.csv:3"]
    (tmp_path / "items.csv").write_text("item_id,title\na,A\n")
    with pytest.raises(UserError, match=r"part-00002\.csv:3, column item_id: empty id"):
        read_tables(folder, tmp_path / "items.csv")


def test_a_folder_holds_both_tables_in_parts(tmp_path):
    parts(tmp_path / "interactions.parquet", ".parquet")
    (tmp_path / "items.csv").write_text("item_id,title\na,A\nb,B\nc,C\n")
    loose = {"min_user_interactions": 1, "min_item_interactions": 1}
    with pytest.warns(UserWarning, match="nothing to validate"):
        report = prepare_source(tmp_path, tmp_path / "out", DataConfig(**loose))
    assert report["table1"]["interactions"] == 3


def test_parts_that_make_no_table(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no data files here"):
        read_frame(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no-\*\.csv: no data files here"):
        read_frame(tmp_path / "no-*.csv")
    with pytest.raises(UserError, match="can't be read: File name too long"):
        read_frame(tmp_path / ("x" * 300))
    folder = parts(tmp_path / "mixed", ".csv")
    ROWS.write_parquet(folder / "part-9.parquet")
    with pytest.raises(UserError, match=r"parts of one table end alike, and here are part-00000.* and part-9\.parquet"):
        read_frame(folder)
    folder = parts(tmp_path / "types", ".parquet")
    ROWS.with_columns(item_id=pl.Series([["a"], ["b"], ["c"]])).write_parquet(folder / "part-9.parquet")
    with pytest.raises(UserError, match="types: the parts' columns differ in type"):
        read_frame(folder)


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".jsonl"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig", "latin-1"])
def test_encodings(tmp_path, ending, encoding):
    text = TEXT if ending != ".jsonl" else '{"user_id": "u", "item_id": "ä"}\n{"user_id": "v", "item_id": "b"}\n'
    data = text.encode(encoding)
    path = tmp_path / f"x{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    assert read_frame(path, encoding=encoding)["item_id"].to_list() == ["ä", "b"]
    if encoding != "utf-8-sig":
        wanted = 'UTF-16, by its first bytes; set --encoding utf-16 ' if encoding == "utf-16" else '--encoding cp1252 '
        with pytest.raises(UserError, match=rf"x{ending}:\d: not UTF-8.*{wanted}"):
            read_frame(path)


def test_utf16_without_its_mark_is_recognised(tmp_path):
    (tmp_path / "x.csv").write_bytes("user_id,item_id\nu,a\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"no column for item_id, user_id.*looks like UTF-16; set --encoding utf-16"):
        read_tables(tmp_path / "x.csv", tmp_path / "x.csv")


def test_an_encoding_that_does_not_fit_names_the_line(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"user_id,item_id\nu,a\nv,\x81\n")
    with pytest.raises(UserError, match=r"x\.csv:3: not cp1252"):
        read_frame(tmp_path / "x.csv", encoding="cp1252")


def test_of_two_files_one_may_be_written_otherwise(tmp_path):
    """What is set is meant for the file that needs it."""
    (tmp_path / "a.csv").write_text("user_id;item_id\nü;ä\n", encoding="cp1252")
    (tmp_path / "items.csv").write_text("item_id,title\nä,Säge\n", encoding="utf-8")
    (tmp_path / "wide.csv").write_text("item_id;title\nä;Säge\n", encoding="utf-16")
    for name, encoding in (("a.csv", "cp1252"), ("wide.csv", "utf-16")):
        first, second = (read_frame(tmp_path / path, ";", encoding) for path in (name, "items.csv"))
        assert first["item_id"].to_list() == second["item_id"].to_list() == ["ä"] and second["title"][0] == "Säge"


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_line_ends_of_old_macs(tmp_path, ending, encoding):
    text = TEXT if ending != ".jsonl" else '{"user_id": "u", "item_id": "ä"}\n{"user_id": "v", "item_id": "b"}\n'
    data = text.replace("\n", "\r").encode(encoding)
    (tmp_path / f"x{ending}").write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    table = read_table(tmp_path / f"x{ending}", FileOptions(encoding=encoding))
    assert table.frame["item_id"].to_list() == ["ä", "b"]
    assert table.where(1).endswith(f"x{ending}:{2 if ending == '.jsonl' else 3}")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_separators(tmp_path, separator):
    (tmp_path / "x.csv").write_text(TEXT.replace(",", separator), encoding="utf-8")
    (tmp_path / "items.csv").write_text("item_id,title\nb,B\n")
    assert read_frame(tmp_path / "x.csv", separator=separator)["item_id"].to_list() == ["ä", "b"]
    with pytest.raises(UserError) as error:
        read_tables(tmp_path / "x.csv", tmp_path / "items.csv")
    assert f"The header looks separated by {separator!r}; set --separator {json.dumps(separator)} (" in str(error.value)


def test_decimal_commas_do_not_hide_the_separator(tmp_path):
    (tmp_path / "x.csv").write_text("user_id;item_id;price\nu;a;1,5\n")
    with pytest.raises(UserError, match=r"x\.csv:2: 2 fields, the header has 1\. The header looks separated by ';'"):
        read_frame(tmp_path / "x.csv")


GOODS = "item_id,title\n" + "".join(f"p{n},Thing {n}\n" for n in range(1, 101))
ACTS = "user_id,item_id,timestamp\n" + "".join(f"u{n},p{n},{n}\n" for n in range(1, 801))


@pytest.mark.parametrize(("text", "line", "why", "kept", "lost"), [
    (GOODS.replace("Thing 92", '"12 inch drill'), 93, "a quote opens here and is never closed", 91, 9),
    (GOODS.replace("Thing 100", '"12 inch drill'), 101, "a quote opens here and is never closed", 99, 1),
    (ACTS.replace("p761,", '"p761,'), 762, "a quote opens here and is never closed", 760, 40),
    (ACTS.replace("p761,", '"p761,').replace("\n", "\r\n"), 762, "a quote opens here and is never closed", 760, 40),
    (GOODS.replace("Thing 92", '"a\nb"').replace("Thing 94", '"x\n"').replace("Thing 95", '"\nc'), 98,
     "a quote opens here and is never closed", 94, 7),
    (GOODS.replace("Thing 92", '"12 inch').replace("Thing 98", 'pipe 5"'), 93, "a quote opens here and closes", 93, 7),
    (GOODS.replace("Thing 92", '"12 inch').replace("Thing 94", '"pipe"'), 93, "a quote opens here and closes", 97, 3),
])
def test_a_quote_that_is_not_closed_is_named_where_it_opens(tmp_path, text, line, why, kept, lost):
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode())
    with pytest.raises(UserError, match=rf"x\.csv:{line}: {why}"):
        read_table(path)
    table = read_table(path, FileOptions("skip"))
    assert (table.frame.height, table.skipped) == (kept, lost)


def test_a_quote_that_takes_in_very_many_lines_is_given_up(tmp_path):
    text = GOODS.replace("Thing 92", '"12 inch') + "".join(f"q{n},Thing {n}\n" for n in range(20_000))
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=r"x\.csv:93: a quote opens here and does not close in \d+ lines"):
        read_table(tmp_path / "x.csv")
    table = read_table(tmp_path / "x.csv", FileOptions("skip"))
    assert table.skipped > 5000 and table.frame.height + table.skipped == 20_100


@pytest.mark.parametrize("text", ["two\nlines", "a list:\r\n1, one\r\n2, two\r\nend", "one, two\n\nthree, four\nx",
                                  'a "quoted" word\nand, another\nand 12", more',
                                  "Berlin, Germany\nParis, France\nx, y\nz"])
def test_line_breaks_in_quotes_are_text(tmp_path, text):
    rows = pl.DataFrame({"item_id": ["a", "b", "c"], "title": ["A", text, "C"]})
    rows.write_csv(tmp_path / "x.csv")
    assert read_frame(tmp_path / "x.csv").equals(rows)
    mixed = (tmp_path / "x.csv").read_text() + 'd,12" drill\n'  # which polars doesn't read
    (tmp_path / "x.csv").write_text(mixed, newline="")
    table = read_table(tmp_path / "x.csv")
    assert table.frame["title"].to_list()[2:] == ["C", '12" drill'] and table.frame["item_id"].to_list() == [*"abcd"]
    assert table.where(3).endswith(f"x.csv:{5 + text.count(chr(10))}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\r\n', "SEP=;\n"])
def test_the_first_line_of_excel_names_the_separator(tmp_path, first, encoding):
    path = tmp_path / "x.csv"
    path.write_bytes((first + "user_id;item_id\nu;a\nv;b,c\n").encode(encoding))
    for options in (FileOptions(encoding=encoding), FileOptions(encoding=encoding, separator=",")):
        table = read_table(path, options)
        assert table.frame.rows() == [("u", "a"), ("v", "b,c")] and table.where(1) == f"{path}:4"
    with open(path, "ab") as file:
        file.write("w;d;e\n".encode(encoding.replace("utf-16", "utf-16-le")))
    with pytest.raises(UserError, match=r"x\.csv:5: 3 fields, the header has 2"):
        read_table(path, FileOptions(encoding=encoding))
    assert read_table(path, FileOptions("skip", encoding=encoding)).frame.height == 2


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.tsv"])
def test_a_column_name_that_stands_twice_is_refused(tmp_path, name):
    text = "\ufeffuser_id,item_id,item_id\nu,a,b\n".replace(",", "\t" if ".tsv" in name else ",").encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(UserError, match=rf"{name}:1: the column name 'item_id' stands twice in the header; rename"):
        read_table(tmp_path / name)


@pytest.mark.parametrize("more", ["", "u,b,,,,\n"])
def test_columns_without_a_name_may_be_several(tmp_path, more):
    (tmp_path / "x.csv").write_text("user_id,item_id,,\nu,a,,\n" + more)
    frame = read_table(tmp_path / "x.csv", FileOptions("skip")).frame
    assert frame.select("user_id", "item_id").rows() == [("u", "a")] and frame.width == 4


@pytest.mark.parametrize(("options", "message"), [
    ({"separator": "::"}, "separator is one character"), ({"encoding": "klingon"}, "unknown encoding 'klingon'"),
    ({"on_error": "ignore"}, "on_error is 'raise' or 'skip'"),
])
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        FileOptions(**options)


def test_a_tab_may_be_written_as_shells_do():
    assert FileOptions(separator="\\t").separator == "\t"


def test_json_lists_stay_lists(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"user_id": 1, "items": "a"}\n{"user_id": 2.0, "items": ["b", 7]}\n{"user_id": "3"}\n')
    assert read_frame(path).rows() == [("1", ["a"]), ("2", ["b", "7"]), ("3", None)]
    (tmp_path / "array.json").write_text('[{"user_id": 1},\n{"user_id": 2}]\n')
    with pytest.raises(UserError, match=r"array\.json:1: a JSON array .*one object"):
        read_frame(tmp_path / "array.json")


def test_nested_values_mean_the_same_in_json_and_in_frames(tmp_path):
    rows = [{"item_id": "a", "title": "A", "category": [["Tools", "Drills"]]},
            {"item_id": "b", "title": "B", "category": {"id": 5, "name": "Saws"}},
            {"item_id": "c", "title": "C", "category": "Nails &amp; screws"}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ROWS.write_csv(tmp_path / "a.csv")
    raw = read_tables(tmp_path / "a.csv", tmp_path / "items.jsonl")
    assert raw.items["category"].to_list() == ["Tools Drills", "Saws", "Nails & screws"]
    assert from_frames(ROWS, pd.DataFrame(rows)).items.equals(raw.items)
    (tmp_path / "a.jsonl").write_text('{"user_id": "u", "item_id": "a"}\n{"user_id": "v", "item_id": {"id": ["a"]}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2, column item_id: a list or dict, not an id"):
        read_tables(tmp_path / "a.jsonl", tmp_path / "items.jsonl")


def test_a_column_that_is_lists_in_a_later_chunk_is_lists_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr("laserrec.data.files._CHUNK_ROWS", 1)
    path = tmp_path / "x.jsonl"
    path.write_text('{"items": "a"}\n{"items": ["b", "c"]}\n{"items": null}\n{"other": 1}\n')
    assert read_frame(path)["items"].to_list() == [["a"], ["b", "c"], None, None]


GOOD = "".join(f'{{"user_id": "u{n % 8}", "item_id": "p{n % 5}", "timestamp": {n}}}\n' for n in range(40))
ODD_LINES = [
    ('{"user_id": "u1", "item_id": ["p1"], "timestamp": 5}', r"item_id: a list or dict, not an id \(found .*p1"),
    ('{"user_id": {"id": 1}, "item_id": "p1", "timestamp": 5}', "user_id: a list or dict, not an id"),
    ('{"user_id": "u1", "item_id": "p1", "timestamp": {"$date": 5}}', r"timestamp: neither a number.*\['5'\]"),
    ('{"user_id": true, "item_id": "p1", "timestamp": 5}', r"user_id: not an id \(found True\)"),
    ('{"user_id": "u1", "item_id": 1e19, "timestamp": 5}', "item_id: a float too large to hold all digits"),
]


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize(("line", "message"), ODD_LINES)
def test_one_odd_value_spoils_its_own_line_alone(tmp_path, monkeypatch, line, message, parted):
    monkeypatch.setattr("laserrec.data.files._CHUNK_ROWS", 30)
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"p{n},T {n}\n" for n in range(5)))
    acts = tmp_path / "a.jsonl"
    if parted:
        acts.mkdir()
        (acts / "part-0.jsonl").write_text(GOOD)
        (acts / "part-1.jsonl").write_text(line + "\n")
    else:
        acts.write_text(GOOD + line + "\n")
    place = "part-1.jsonl:1" if parted else "a.jsonl:41"
    with pytest.raises(UserError, match=rf"{place}, column {message}"):
        read_tables(acts, tmp_path / "items.csv")
    raw = read_tables(acts, tmp_path / "items.csv", options=FileOptions("skip"))
    assert (raw.interactions.height, raw.notes["skipped_lines"]) == (40, 1)
    rows = [json.loads(row) for row in (GOOD + line).splitlines()]
    for frame in (rows, pd.DataFrame(rows)):
        with pytest.raises(UserError, match=f"row 41, column {message}"):
            from_frames(frame, pl.read_csv(tmp_path / "items.csv"))
        assert from_frames(frame, None, on_error="skip").interactions.height == 40


def test_parts_of_json_lines_may_differ_as_lines_do(tmp_path):
    folder = tmp_path / "items.jsonl"
    folder.mkdir()
    (folder / "part-0.jsonl").write_text('{"item_id": "a", "title": "A", "category": "x"}\n')
    (folder / "part-1.jsonl").write_text('{"item_id": "b", "title": "B", "category": ["x", "y"]}\n'
                                         '{"item_id": "c", "title": true, "category": null}\n')
    ROWS.write_csv(tmp_path / "a.csv")
    raw = read_tables(tmp_path / "a.csv", folder)
    assert raw.items.rows() == [("a", "A", None, "x"), ("b", "B", None, "x y"), ("c", "true", None, None)]


def test_histories_of_json_lines_name_a_user_without_an_id(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"user_id": "u", "item_id": "a"}\n{"user_id": ["v"], "item_id": "b"}\n')
    with pytest.raises(UserError, match=r"h\.jsonl:2, column user_id: a list or dict, not an id \(found \['v'\]\)"):
        read_whole(path)
    path.write_text('{"user_id": "u", "items": "a"}\n{"user_id": "v", "items": ["b"]}\n')
    assert read_histories(read_whole(path), {"a": 0, "b": 1}).rows == [[0], [1]]


def test_a_damaged_parquet_file(tmp_path):
    ROWS.write_parquet(tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"x\.parquet is not readable as Parquet"):
        read_frame(tmp_path / "x.parquet")


def test_frames_are_written_or_refused(tmp_path):
    for name in ("x.csv", "x.parquet"):
        write_frame(tmp_path / name, ROWS)
        assert read_frame(tmp_path / name).height == 3
    with pytest.raises(UserError, match=r"is not one of \.csv, \.parquet"):
        write_frame(tmp_path / "x.xlsx", ROWS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        write_frame(tmp_path / "file" / "x.csv", ROWS)
