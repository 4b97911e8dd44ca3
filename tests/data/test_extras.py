"""Further columns of the items and vectors of their own: read, checked, kept through preparing."""

import warnings

import numpy as np
import polars as pl
import pytest
import tiny

from laserrec.config import DataConfig, valid
from laserrec.data.dataset import Dataset
from laserrec.data.extras import like, vectors_of, with_vectors
from laserrec.data.files import Table
from laserrec.data.losses import LossWarning
from laserrec.data.prepare import prepare, prepare_source
from laserrec.data.raw import from_frames, read_items
from laserrec.data.summary import summary_lines
from laserrec.util.errors import UserError

ITEMS = pl.DataFrame({"item_id": ["a", "b", "c"]})
SMALL = {"min_user_interactions": 2, "min_item_interactions": 1}


def vectors(frame) -> pl.DataFrame:
    return with_vectors(ITEMS, Table(pl.DataFrame(frame), "images"))


@pytest.mark.parametrize("frame", [
    {"item_id": ["b", "a", "x"], "vector": [[1.0, 2], [3, 4], [5, 6]]},
    {"item_id": ["b", "a", "x"], "embedding": [[1.0, 2], [3, 4], [5, 6]]},
    {"item_id": ["b", "a", "x"], "one": [1, 3, 5], "two": [2.0, 4, 6]},
    {"item_id": ["b", "a", "x"], "one": ["1", "3", "5"], "two": ["2", "4", "6"]},
    {"item_id": ["b", "a", "x"], "vector": ["[1, 2.0]", " [3,4]", "[5e0, 6]"]},
    {"item_id": ["b", "a", "x"], "vector": pl.Series([[1, 2], [3, 4], [5, 6]], dtype=pl.Array(pl.Float64, 2))},
    {"item_id": ["c", "b", "a"], "vector": [None, [1.0, 2], [3, 4]]},
    {"item_id": ["c", "b", "a"], "vector": [None, "[1, 2]", "[3, 4]"]},
    {"item_id": ["c", "b", "a"], "one": [None, 1, 3], "two": [None, 2.0, 4]},
], ids=["lists", "other name", "numbers", "text", "lists as text", "arrays", "no list", "no text", "no numbers"])
def test_vectors_meet_their_items(frame):
    out = vectors(frame)
    assert out.schema["vector"] == pl.Array(pl.Float32, 2)
    assert out["vector"].to_list() == [[3, 4], [1, 2], None]
    found = vectors_of(out)
    assert found[:2].tolist() == [[3, 4], [1, 2]] and np.isnan(found[2]).all()


@pytest.mark.parametrize(("frame", "told"), [
    ({"item_id": ["a", "b"], "vector": [[1.0], [1.0, 2]]}, "row 2: its vector has 2 numbers and the first one 1"),
    ({"item_id": ["a", "b"], "vector": [[1.0], []]}, "row 2: its vector has 0 numbers"),
    ({"item_id": ["a", "b"], "vector": [None, [float("nan")]]}, r"row 2, number 1 of its vector: no finite number \(f"),
    ({"item_id": ["a", "b"], "one": ["1", "2"], "two": ["1,5", "x"]}, r"row 1, column two: no number \(found '1,5'\)"),
    ({"item_id": ["a", "b"], "one": ["1", "2"], "two": ["1", None]}, "row 2, column two: no finite number"),
    ({"item_id": ["a", "b"], "vector": pl.Series([None, None], dtype=pl.List(pl.Float32))}, "no row has a vector"),
    ({"item_id": ["a", "a"], "vector": [[1.0], [2.0]]}, "row 1, column item_id: an id that stands in more than one"),
    ({"item_id": ["a", ""], "vector": [[1.0], [2.0]]}, "row 2, column item_id: empty id"),
    ({"item_id": ["x"], "vector": [[1.0]]}, "none of its 1 ids is among the items: yours are like 'x', .*'a' and"),
    ({"item_id": ["A"], "vector": [[1.0]]}, "none of its 1 ids is among the items: upper and lower case differ; "),
    ({"id": ["a"], "vector": [[1.0]]}, "has the column item_id .* there are: id, vector"),
    ({"item_id": ["a"], "p": [[1.0]], "q": [[1.0]]}, r"several columns hold lists \(p, q\)"),
    ({"item_id": ["a", "b"], "vector": ["[1, 2]", "[1. 2.]"]}, "row 2, column vector: lists are written as text here"),
    ({"item_id": ["a"], "vector": ['["1"]']}, "row 1, column vector: lists are written as text here"),
    ({"item_id": ["a"], "vector": [["x"]]}, "lists of something else than numbers"),
    ({"item_id": ["a"], "day": [pl.date(2026, 1, 1)]}, "column day holds no numbers"),
])
def test_what_is_wrong_with_vectors(frame, told):
    if "day" in frame:
        frame = pl.DataFrame({"item_id": ["a"]}).with_columns(day=frame["day"][0])
    with pytest.raises(UserError, match=told):
        vectors(frame)


def test_a_column_of_another_type_is_no_vector():
    assert vectors_of(ITEMS) is None
    with pytest.raises(UserError, match="prepare the data again"):
        vectors_of(ITEMS.with_columns(vector=pl.lit("x")))


@pytest.fixture
def shop(tmp_path):
    acts, items = tiny.planted_tables(12, 30)
    items = items.with_columns(price=pl.int_range(pl.len()) + 0.5, colour=pl.lit("<b>red</b> "))
    acts.write_csv(tmp_path / "interactions.csv")
    items.write_csv(tmp_path / "items.csv")
    pl.DataFrame({"item_id": items["item_id"][:10], "vector": [[float(j), 1.0] for j in range(10)]}).write_parquet(
        tmp_path / "images.parquet")
    return tmp_path


@pytest.mark.filterwarnings("ignore::laserrec.data.losses.LossWarning")
def test_columns_and_vectors_reach_the_data_folder(shop):
    config = DataConfig(**SMALL, item_columns=("price", "colour"))
    report = prepare_source([shop / "interactions.csv", shop / "items.csv"], shop / "data", config,
                            vectors=shop / "images.parquet")
    items = Dataset.load(shop / "data").items
    assert items.columns == ["item", "item_id", "title", "brand", "category", "price", "colour", "vector"]
    row = items.filter(pl.col("item_id") == "i4").to_dicts()[0]
    assert row["price"] == "3.5" and row["colour"] == "red" and list(row["vector"]) == [3.0, 1.0]
    assert report["items_without_vector"] == 2
    assert "Without a vector of its own: 2 items of the metadata." in summary_lines(report)
    again = prepare_source([shop / "interactions.csv", shop / "items.csv"], shop / "data", config,
                           vectors=shop / "images.parquet")
    assert again["reused"] and again["sha256"] == report["sha256"]
    with pytest.raises(UserError, match="made from other input"):
        prepare_source([shop / "interactions.csv", shop / "items.csv"], shop / "data", config)


def test_vectors_of_few_items_or_of_none_that_is_kept(shop):
    acts, items = pl.read_csv(shop / "interactions.csv"), pl.read_csv(shop / "items.csv")
    items = pl.concat([items, pl.DataFrame({"item_id": ["lonely"], "title": ["Lonely"]})], how="diagonal")

    def prepared(ids):
        raw = from_frames(acts, items, vectors={"item_id": ids, "vector": [[1.0]] * len(ids)})
        return prepare(raw.interactions, raw.items, DataConfig(**SMALL), shop / str(len(ids)), notes=raw.notes)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(items["item_id"].to_list()[:12])
    with pytest.warns(LossWarning, match="Without a vector of its own: 2 items"):
        prepared(items["item_id"].to_list()[:11])
    with pytest.raises(UserError, match=r"none is of an item that is kept.*: 'lonely'; give .* as 'i1' and"):
        prepared(["lonely"])


def test_the_settings_of_a_folder_without_further_columns_are_those_of_before(shop):
    prepare_source([shop / "interactions.csv", shop / "items.csv"], shop / "data", DataConfig(**SMALL))
    data = Dataset.load(shop / "data")
    assert "item_columns" not in data.meta["settings"] and data.items.columns[-1] == "category"


def test_a_column_that_is_not_there(shop):
    with pytest.raises(UserError, match=r"no column for weight; there are: .*price"):
        prepare_source([shop / "interactions.csv", shop / "items.csv"], shop / "data",
                       DataConfig(**SMALL, item_columns=("weight",)))


def test_a_column_under_the_callers_name(shop):
    raw = from_frames(pl.read_csv(shop / "interactions.csv"), pl.read_csv(shop / "items.csv"), {"cost": "price"},
                      extra=("cost",))
    assert raw.items["cost"].to_list()[:2] == ["0.5", "1.5"]
    with pytest.raises(UserError, match="'cost' is not a column of ours"):
        from_frames(pl.read_csv(shop / "interactions.csv"), pl.read_csv(shop / "items.csv"), {"cost": "price"})


@pytest.mark.parametrize("key", ["item_id", "items.item_id"])
def test_vectors_are_found_under_the_callers_name_of_ids(key):
    acts = pl.DataFrame({"user_id": ["u"], "sku": ["a"]})
    items = pl.DataFrame({"sku": ["a"], "title": ["A"]})
    columns = {key: "sku", "interactions.item_id": "sku"}
    for name in ("sku", "item_id"):
        raw = from_frames(acts, items, columns, vectors=pl.DataFrame({name: ["a"], "vector": [[1.0]]}))
        assert raw.items["vector"].to_list() == [[1.0]]


def test_formats_with_fixed_columns_refuse_others(tmp_path):
    for name, text in (("ratings.csv", "userId,movieId,rating,timestamp\nu,a,4.0,5\n"),
                       ("movies.csv", "movieId,title,genres\na,Drill,Drama\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"format movielens has fixed columns; data.item_columns \(price\)"):
        prepare_source(tmp_path, tmp_path / "data", DataConfig(item_columns=("price",)))


@pytest.mark.parametrize("columns", [["title"], ["vector"], ["a", "a"], [""]])
def test_names_that_can_be_no_further_columns(columns):
    with pytest.raises(UserError, match=r"data.*item_columns"):
        valid(DataConfig, {"item_columns": columns}, "data")


def test_of_several_rows_of_an_item_a_further_column_keeps_what_is_known():
    items = pl.DataFrame({"item_id": ["a", "a", "b"], "title": ["Saw", "Saw", "Nail"], "price": [None, 3, 4]})
    acts = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"]})
    raw = from_frames(acts, items, extra=("price",))
    assert dict(raw.items.select("item_id", "price").iter_rows()) == {"a": "3", "b": "4"}


def test_of_several_rows_of_an_item_all_columns_are_of_one_row():
    items = pl.DataFrame({"item_id": ["a"] * 3, "title": ["Saw", "Saw", "Saw NEW"], "price": ["9", "9", "10"],
                          "count": ["2", "2", "1"]})
    acts = pl.DataFrame({"user_id": ["u"], "item_id": ["a"]})
    for frame in (items, items.reverse()):
        raw = from_frames(acts, frame, extra=("price", "count"))
        assert raw.items.row(0) == ("a", "Saw", None, None, "9", "2")
    odd = items.with_columns(title=pl.lit("Saw"), price=pl.Series(["1", None, "5"]), count=pl.Series(["7", "8", None]))
    assert from_frames(acts, odd, extra=("price", "count")).items.row(0)[4:] == ("1", "7")


def test_new_items_get_the_catalogues_columns():
    catalogue = pl.DataFrame({"item_id": ["a"], "title": ["A"], "brand": [None], "category": [None], "price": ["1"],
                              "vector": [[1.0, 2.0]]}).with_columns(pl.col("vector").cast(pl.Array(pl.Float32, 2)))
    new = read_items({"item_id": ["x", "y"], "title": ["X", "Y"], "price": [9.5, None], "vector": [[3, 4], None]},
                     catalogue=catalogue)
    assert new["price"].to_list() == ["9.5", None] and new.schema["vector"] == catalogue.schema["vector"]
    assert new["vector"].to_list() == [[3, 4], None]
    plain = read_items({"item_id": ["x"], "title": ["X"]}, catalogue=catalogue)
    assert plain["price"].to_list() == plain["vector"].to_list() == [None]
    with pytest.raises(UserError, match="new items have 3 numbers and those of the catalogue 2"):
        read_items({"item_id": ["x"], "title": ["X"], "vector": [[1, 2, 3]]}, catalogue=catalogue)
    with pytest.raises(UserError, match="new items: row 2, number 1 of its vector: no finite number"):
        read_items(pl.DataFrame({"item_id": ["w", "x"], "title": ["W", "X"], "vector": [None, [float("inf"), 2]]}),
                   catalogue=catalogue)
    assert like(ITEMS, Table(ITEMS, "t"), ITEMS).columns == ["item_id"]
