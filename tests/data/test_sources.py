"""Files and folders find their reader."""

import json

import polars as pl
import pytest

from laserrec.config import DataConfig
from laserrec.data.files import FileOptions
from laserrec.data.losses import LossWarning
from laserrec.data.prepare import prepare_source
from laserrec.data.sources import bundled, read_source
from laserrec.util.errors import UserError


@pytest.fixture
def make(tmp_path):
    """name -> text, written into one folder, which is returned."""
    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text, encoding="utf-8")
        return tmp_path
    return write


AMAZON_2018 = json.dumps({"reviewerID": "u", "asin": "a", "unixReviewTime": 5}) + "\n"
AMAZON_2023 = json.dumps({"user_id": "u", "asin": "z", "parent_asin": "a", "timestamp": 5}) + "\n"
PLAIN = json.dumps({"user_id": "u", "item_id": "a", "timestamp": 5}) + "\n"
CSV = "user_id,item_id,timestamp\nu,a,5\n"
FOLDERS = {
    "amazon2018": {"Scientific__json": AMAZON_2018, "meta_Scientific__json": '{"asin": "a", "title": "Drill"}\n'},
    "amazon2023": {"Scientific__jsonl": AMAZON_2023,
                   "meta_Scientific__jsonl": '{"parent_asin": "a", "title": "Drill"}\n'},
    "json": {"log__jsonl": PLAIN, "items__jsonl": '{"item_id": "a", "title": "Drill"}\n'},
    "csv": {"interactions__csv": CSV, "items__csv": "item_id,title\na,Drill\n"},
    "recbole": {"x__inter": "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t5.0\n",
                "x__item": "item_id:token\ttitle:token_seq\na\tDrill\n", "x__user": "user_id:token\nu\n"},
    "movielens": {"ratings__csv": "userId,movieId,rating,timestamp\nu,a,4.0,5\n",
                  "movies__csv": "movieId,title,genres\na,Drill,Drama\n", "tags__csv": "userId,movieId,tag\nu,a,x\n"},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_recognised(make, kind):
    folder = make(**FOLDERS[kind])
    raw = read_source(folder)
    assert raw.interactions.rows() == [("u", "a", 5, 0)]
    assert raw.items.select("item_id", "title").rows() == [("a", "Drill")]
    if kind != "movielens":
        names = [folder / name.replace("__", ".") for name in list(FOLDERS[kind])[:2]]
        assert read_source(names).interactions.equals(raw.interactions)
    if kind != "json":
        assert read_source(folder, kind).items.equals(raw.items)


def test_parquet_is_recognised(tmp_path):
    pl.DataFrame({"user_id": ["u"], "sku": ["a"]}).write_parquet(tmp_path / "log.parquet")
    pl.DataFrame({"sku": ["a"], "title": ["Drill"]}).write_parquet(tmp_path / "products.parquet")
    assert read_source(tmp_path, columns={"item_id": "sku"}).interactions["item_id"].to_list() == ["a"]


SALES = "user_id,item_id,title\nu,a,Drill\nv,a,Drill\nv,b,\n"


@pytest.mark.parametrize(("files", "items"), [
    ({"x__csv": CSV}, [("a", None, None, None)]), ({"licenses__json": PLAIN}, [("a", None, None, None)]),
    ({"x__csv": SALES}, [("a", "Drill", None, None), ("b", None, None, None)]),
    ({"x__inter": "user_id:token\titem_id:token\tclass:token\nu\ta\tDrama\n"}, [("a", None, None, "Drama")]),
])
def test_one_file_of_interactions_may_tell_of_items_too(make, files, items):
    folder = make(**files)
    for source in (folder / next(iter(files)).replace("__", "."), folder):
        raw = read_source(source)
        assert raw.items.sort("item_id").rows() == items and raw.notes["duplicate_item_rows"] == 0
        assert raw.interactions["item_id"].unique().sort().to_list() == [item[0] for item in items]


def test_one_table_in_parts_may_stand_alone(make):
    folder = make(part_1__csv=SALES, part_2__csv="user_id,item_id,title\nw,c,Saw\n", README__txt="Sales of 2024\n")
    for source in (folder, folder / "part*.csv", str(folder / "part_?.csv"), [folder]):
        assert read_source(source).interactions["item_id"].to_list() == ["a", "a", "b", "c"]
    (folder / "part_1.csv").rename(folder / "sales-2023.csv")
    (folder / "part_2.csv").rename(folder / "sales-2024.csv")
    (folder / "_rejected.csv").write_text(SALES)
    assert read_source(folder).interactions.height == 4
    for day in ("1", "2"):
        (folder / f"day={day}").mkdir()
    (folder / "sales-2023.csv").rename(folder / "day=1" / "part-0.csv")
    (folder / "sales-2024.csv").rename(folder / "day=2" / "part-0.csv")
    assert read_source(folder).interactions.height == 4


def test_notes_and_what_was_made_of_the_files_are_no_data(make):
    folder = make(orders__csv=SALES, items__csv="item_id,title\na,Drill\nb,Saw\n", README__txt="About\n",
                  licence__txt="MIT\n")
    loose = DataConfig(min_user_interactions=1, min_item_interactions=1)
    with pytest.warns(LossWarning):
        first = prepare_source(folder, folder / "data", loose)
        again = prepare_source(folder, folder / "data", loose)
        assert again["reused"] and first["sha256"] == again["sha256"]
    (folder / "model" / "kept").mkdir(parents=True)
    for name in ("model.json", "items.parquet", "kept/more.csv"):
        (folder / "model" / name).touch()
    assert read_source(folder).interactions.height == 3
    (folder / "items.csv").unlink()
    assert read_source(folder).interactions.height == 3
    (folder / "orders.csv").rename(folder / "part-0.csv")
    (folder / "part-1.csv").write_text(SALES)
    assert read_source([folder]).interactions.height == read_source(folder).interactions.height == 6


def test_a_broken_line_of_one_file_is_told_once(make):
    file = make(x__csv=SALES + "u,,Saw\n") / "x.csv"
    with pytest.raises(UserError, match=r"x\.csv:5, column item_id: empty id"):
        read_source(file)
    assert read_source(file, options=FileOptions("skip")).notes["skipped_lines"] == 1


def test_what_cannot_be_told_is_an_error(make, tmp_path):
    with pytest.raises(UserError, match="unknown format 'amazon'; there are: auto, amazon2018"):
        read_source(tmp_path, "amazon")
    with pytest.raises(UserError, match="among: no data files; give the two files"):
        read_source(tmp_path)
    folder = make(a__csv=CSV, b__csv=CSV)
    with pytest.raises(UserError, match=r"can't tell interactions and items apart among: a\.csv, b\.csv"):
        read_source(folder)
    with pytest.raises(UserError, match=r"x\.json is one file of format amazon2018, .*; give both"):
        read_source(make(x__json=AMAZON_2018) / "x.json")
    with pytest.raises(UserError, match="give two files, interactions and items, or one of both; 3 were given"):
        read_source([folder / "a.csv"] * 3)
    with pytest.raises(UserError, match=r"no such file: .*items\.csv"):
        read_source([folder / "a.csv", folder / "items.csv"])
    for name in ("none", "none.v2"):
        with pytest.raises(UserError, match="no such folder"):
            read_source(tmp_path / name)
    with pytest.raises(UserError, match=r"^no such file: .*none\.csv$"):
        read_source(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"none-\*\.csv: no data files here"):
        read_source(tmp_path / "none-*.csv")
    with pytest.raises(UserError, match="format not known by its ending"):
        read_source([make(a__dat="x") / "a.dat", folder / "b.csv"])
    workbook = make(a__xlsx="x") / "a.xlsx"
    for source in (workbook, [folder / "a.csv", workbook]):
        with pytest.raises(UserError, match=r"a\.xlsx is a workbook; save the sheet as CSV"):
            read_source(source)
    with pytest.raises(UserError, match="amazon2018 has fixed columns"):
        read_source([folder / "a.csv", folder / "b.csv"], "amazon2018", {"user_id": "x"})


def test_the_bundled_data_set_is_read_by_name_or_folder():
    raw = read_source("amazon-scientific")
    assert (raw.interactions.height, raw.items.height) == (59427, 4385)
    assert raw.interactions.equals(read_source(bundled(), "csv").interactions)
    with pytest.raises(UserError, match="no bundled data set"):
        bundled("other")
