"""Every published format on tiny files, whole and broken."""

import gzip
import json

import polars as pl
import pytest

from laserrec.data import files
from laserrec.data.files import FileOptions
from laserrec.data.readers import (
    read_amazon_2018,
    read_amazon_2023,
    read_movielens,
    read_recbole,
    read_tables,
)
from laserrec.util.errors import UserError

SKIP = FileOptions(on_error="skip")
LONG = "Ü" * 10_000


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def json_lines(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


REVIEW = {"reviewerID": "U1", "asin": "B1", "unixReviewTime": 1400000000, "overall": 5.0, "reviewText": "good"}
META = {"asin": "B1", "title": "Drill &amp; <b>bits</b>", "brand": "by\n\n  X", "category": ["Tools", "Drills"]}


@pytest.fixture(params=["json", "json.gz"])
def amazon(request, tmp_path):
    """(reviews, metadata) writers in both published wrappings."""
    return (lambda rows: json_lines(tmp_path / f"reviews.{request.param}", rows),
            lambda rows: json_lines(tmp_path / f"meta.{request.param}", rows))


def test_amazon_2018(amazon):
    reviews = amazon[0]([REVIEW, {**REVIEW, "asin": "B2", "unixReviewTime": "1300000000"}, REVIEW])
    meta = amazon[1]([META, {"asin": "B2", "title": LONG, "main_cat": "Tools", "category": [], "brand": ""},
                      {"asin": "B3", "title": "var aPageStart = (new Date()).getTime();"}])
    raw = read_amazon_2018(reviews, meta)
    assert raw.interactions.rows() == [("U1", "B1", 1400000000, 0), ("U1", "B2", 1300000000, 1),
                                       ("U1", "B1", 1400000000, 2)]
    assert raw.items.rows() == [("B1", "Drill & bits", "by X", "Tools Drills"), ("B2", LONG, None, "Tools"),
                                ("B3", None, None, None)]


def test_amazon_2023(amazon):
    reviews = amazon[0]([{"user_id": "U1", "asin": "B9", "parent_asin": "B1", "timestamp": 1588687728923},
                         {"user_id": "U2", "asin": "B2", "timestamp": 1588687728924}])
    meta = amazon[1]([{"parent_asin": "B1", "title": "Säge 日本", "store": "X", "categories": ["A", "B"],
                       "main_category": "M"},
                      {"parent_asin": "B2", "title": None, "store": None, "categories": [], "main_category": "M"}])
    raw = read_amazon_2023(reviews, meta)
    assert raw.interactions.rows() == [("U1", "B1", 1588687728923, 0), ("U2", "B2", 1588687728924, 1)]
    assert raw.items.rows() == [("B1", "Säge 日本", "X", "A B"), ("B2", None, None, "M")]


def test_chunks_are_joined_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK_ROWS", 2)
    reviews = json_lines(tmp_path / "r.json", [{**REVIEW, "reviewerID": f"U{i}"} for i in range(5)])
    raw = read_amazon_2018(reviews, json_lines(tmp_path / "m.json", [META]))
    assert raw.interactions["user_id"].to_list() == ["U0", "U1", "U2", "U3", "U4"]
    assert raw.interactions["order"].to_list() == [0, 1, 2, 3, 4]


BROKEN = [
    (b'{"reviewerID": "U1", "asin": ', r"not JSON: .* at column"),
    (b"{'reviewerID': 'U1', 'asin': 'B1'}", r"a Python literal as in the 2014 files"),
    (b'{"title": "Drill"}', r"none of reviewerID, asin, unixReviewTime in it \(there are: title\)"),
    (b'{"reviewerID": "U1", "asin": "B1"}', r"column timestamp: neither a number"),
    (b'{"asin": "B1", "unixReviewTime": 1}', r"column user_id: empty id"),
    (b'{"reviewerID": "U1", "asin": "", "unixReviewTime": 1}', r"column item_id: empty id"),
    (b'{"reviewerID": "U1", "asin": "B1", "unixReviewTime": "soon"}', r"column timestamp: neither .*'soon'"),
    (b'{"reviewerID": "U1", "asin": "B1", "unixReviewTime": 1e999}', r"column timestamp"),
    (b'{"reviewerID": "U1", "asin": "B1", "unixReviewTime": 10000000000000000000}', r"column timestamp"),
    (b'["U1", "B1", 1]', r"not a JSON object"),
    (b'{"reviewerID": "U\xff1", "asin": "B1", "unixReviewTime": 1}', r"not UTF-8 at byte 18"),
    (b"[" * 100_000, r"nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_line_is_named_or_skipped(tmp_path, line, message):
    good = json.dumps(REVIEW).encode()
    reviews = write(tmp_path / "r.json", good + b"\n\n" + line + b"\n" + good + b"\n")
    meta = json_lines(tmp_path / "m.json", [META])
    with pytest.raises(UserError, match=r"r\.json:3[:,] " + message):
        read_amazon_2018(reviews, meta)
    raw = read_amazon_2018(reviews, meta, options=SKIP)
    assert (raw.interactions.height, raw.notes["skipped_lines"]) == (2, 1)


def test_nothing_but_broken_lines_is_an_error_even_when_skipping(tmp_path):
    reviews = write(tmp_path / "r.json", "{'reviewerID': 'U1'}\n{'reviewerID': 'U2'}\n")
    with pytest.raises(UserError, match=r"r\.json:1: a Python literal"):
        read_amazon_2018(reviews, json_lines(tmp_path / "m.json", [META]), options=SKIP)


def test_half_a_surrogate_pair_does_not_break_the_file(tmp_path):
    reviews = json_lines(tmp_path / "r.json", [REVIEW])
    meta = write(tmp_path / "m.json", '{"asin": "B1", "title": "cut \\ud83d", "category": ["x\\ud83d\\ude00"]}\n')
    assert read_amazon_2018(reviews, meta).items.row(0) == ("B1", "cut \ufffd", None, "x😀")


def test_files_that_cannot_be_read(tmp_path):
    meta = json_lines(tmp_path / "m.json", [META])
    with pytest.raises(UserError, match=r"no such file: .*no\.json"):
        read_amazon_2018(tmp_path / "no.json", meta)
    with pytest.raises(UserError, match=r"empty\.json is empty"):
        read_amazon_2018(write(tmp_path / "empty.json", ""), meta)
    cut = gzip.compress((json.dumps(REVIEW) + "\n").encode() * 5000)[:-20]
    (tmp_path / "cut.json.gz").write_bytes(cut)
    with pytest.raises(UserError, match=r"cut\.json\.gz:\d+: the gzip data breaks off"):
        read_amazon_2018(tmp_path / "cut.json.gz", meta)
    with pytest.raises(UserError, match=r"fake\.json\.gz:1: the gzip data"):
        (tmp_path / "fake.json.gz").write_bytes(b"plain text")
        read_amazon_2018(tmp_path / "fake.json.gz", meta)


# -- tables -------------------------------------------------------------------------------------------------------

CSV = "user_id,item_id,timestamp\nu1,a,5\nu2,b,6\n"
ITEMS = 'item_id,title,brand\na,"Drill, 18V ""pro""\nline two",X\nb,Säge,\n'


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_csv(tmp_path, ending):
    raw = read_tables(write(tmp_path / f"i{ending}", CSV), write(tmp_path / f"t{ending}", "\ufeff" + ITEMS))
    assert raw.interactions.rows() == [("u1", "a", 5, 0), ("u2", "b", 6, 1)]
    assert raw.items.rows() == [("a", 'Drill, 18V "pro" line two', "X", None), ("b", "Säge", None, None)]


def test_tsv_parquet_and_jsonl_read_alike(tmp_path):
    items = write(tmp_path / "items.csv", ITEMS)
    expected = read_tables(write(tmp_path / "i.csv", CSV), items).interactions
    frame = pl.DataFrame({"user_id": ["u1", "u2"], "item_id": ["a", "b"], "timestamp": [5, 6]})
    frame.write_parquet(tmp_path / "i.parquet")
    json_lines(tmp_path / "i.jsonl.gz", [{"user_id": "u1", "item_id": "a", "timestamp": 5},
                                         {"timestamp": 6, "item_id": "b", "user_id": "u2", "more": [1]}])
    write(tmp_path / "i.tsv", CSV.replace(",", "\t"))
    for name in ("i.tsv", "i.parquet", "i.jsonl.gz"):
        assert read_tables(tmp_path / name, items).interactions.equals(expected), name


@pytest.mark.parametrize(("body", "message"), [
    (b"u1,a,5\nu2,b,6,7\nu3,a,8\n", r"i\.csv:3: 4 fields, the header has 3"),
    (b"u1,a,5\nu2,\xff,6\nu3,a,8\n", r"i\.csv:3: not UTF-8"),
    (b"u1,a,5\n\nu2,b,soon\nu3,a,8\n", r"i\.csv:4, column timestamp: .*'soon'"),
    (b"u1,a,5\nu2,,6\nu3,a,8\n", r"i\.csv:3, column item_id: empty id"),
    (b'u1,a,5\n"u\n2",b\nu3,a,8\n', r"i\.csv:4, column timestamp"),
])
def test_a_broken_csv_line_is_named_or_skipped(tmp_path, body, message):
    path = write(tmp_path / "i.csv", b"\xef\xbb\xbfuser_id,item_id,timestamp\n" + body)
    items = write(tmp_path / "items.csv", ITEMS)
    with pytest.raises(UserError, match=message):
        read_tables(path, items)
    raw = read_tables(path, items, options=SKIP)
    assert raw.interactions["user_id"].to_list() == ["u1", "u3"]
    assert raw.notes["skipped_lines"] == 1


def test_a_jsonl_row_without_an_id_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "i.jsonl", '{"user_id": "u", "item_id": "a"}\n\n{"user_id": "u"}\n')
    with pytest.raises(UserError, match=r"i\.jsonl:3, column item_id: empty id"):
        read_tables(path, write(tmp_path / "items.csv", ITEMS))


def test_tables_that_cannot_be_read(tmp_path):
    items = write(tmp_path / "items.csv", ITEMS)
    with pytest.raises(UserError, match=r"no such file: .*no\.csv"):
        read_tables(tmp_path / "no.csv", items)
    with pytest.raises(UserError, match=r"empty\.csv is empty; its first line should name the columns"):
        read_tables(write(tmp_path / "empty.csv", ""), items)
    with pytest.raises(UserError, match=r"x\.dat: unknown ending"):
        read_tables(write(tmp_path / "x.dat", "x"), items)
    with pytest.raises(UserError, match=r"x\.parquet is not readable as Parquet"):
        read_tables(write(tmp_path / "x.parquet", "no parquet"), items)
    with pytest.raises(UserError, match=r"h\.csv: no column for item_id, user_id; there are: customer, sku;"):
        read_tables(write(tmp_path / "h.csv", "customer,sku\n1,2\n"), items)


# -- RecBole, MovieLens -------------------------------------------------------------------------------------------


def test_recbole(tmp_path):
    inter = write(tmp_path / "x.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
                                        "1\ta\t5.0\t978300760.0\n2\tb\t3.0\t978300761.0\n")
    item = write(tmp_path / "x.item", "item_id:token\tmovie_title:token_seq\tclass:token_seq\n"
                                      'a\tToy "Story\tComedy Kids\nb\tHeat\tAction\n')
    raw = read_recbole(inter, item)
    assert raw.interactions.rows() == [("1", "a", 978300760, 0), ("2", "b", 978300761, 1)]
    assert raw.items.rows() == [("a", 'Toy "Story', None, "Comedy Kids"), ("b", "Heat", None, "Action")]
    raw = read_recbole(inter, item, {"title": "class", "category": "movie_title"})
    assert raw.items.row(0) == ("a", "Comedy Kids", None, 'Toy "Story')


def test_recbole_refuses_what_it_is_not(tmp_path):
    item = write(tmp_path / "x.item", "item_id:token\tcolour:token\na\tred\n")
    inter = write(tmp_path / "x.inter", "user_id:token\titem_id:token\n1\ta\n")
    with pytest.raises(UserError, match=r"x\.item: no column for title; there are: item_id, colour"):
        read_recbole(inter, item)
    lists = write(tmp_path / "y.inter", "user_id:token\titem_id_list:token_seq\titem_id:token\n1\ta b\tc\n")
    with pytest.raises(UserError, match="holds augmented sequences"):
        read_recbole(lists, item)
    broken = write(tmp_path / "z.inter", "user_id:token\titem_id:token\n1\ta\n2\tb\tc\n")
    with pytest.raises(UserError, match=r"z\.inter:3: 3 fields, the header has 2"):
        read_recbole(broken, item)


def test_movielens_dat_and_csv(tmp_path):
    dat, csv = tmp_path / "ml-1m", tmp_path / "ml-latest"
    dat.mkdir()
    csv.mkdir()
    write(dat / "ratings.dat", "1::10::5::978300760\n2::20::3::978300761\n")
    write(dat / "movies.dat", "10::Misérables, Les (1995)::Drama|Musical\n20::Heat (1995)::Action\n".encode("latin-1"))
    write(csv / "ratings.csv", "userId,movieId,rating,timestamp\n1,10,5.0,978300760\n2,20,3.0,978300761\n")
    write(csv / "movies.csv", 'movieId,title,genres\n10,"Misérables, Les (1995)",Drama|Musical\n'
                              "20,Heat (1995),(no genres listed)\n")
    first, second = read_movielens(dat), read_movielens(csv)
    assert first.interactions.rows() == [("1", "10", 978300760, 0), ("2", "20", 978300761, 1)]
    assert second.interactions.equals(first.interactions)
    assert first.items.rows() == [("10", "Misérables, Les (1995)", None, "Drama Musical"),
                                  ("20", "Heat (1995)", None, "Action")]
    assert second.items["category"].to_list() == ["Drama Musical", None]
    write(dat / "ratings.dat", "1::10::5::978300760\n2::20\n")
    with pytest.raises(UserError, match=r"ratings\.dat:2: 2 fields, not 4"):
        read_movielens(dat)
    assert read_movielens(dat, options=SKIP).notes["skipped_lines"] == 1
    with pytest.raises(UserError, match=r"holds neither ratings\.csv nor ratings.dat"):
        read_movielens(tmp_path)
