"""A data folder in memory against lists written by hand."""

import numpy as np
import polars as pl
import pytest

from laserrec.config import DataConfig
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.util.errors import UserError

HISTORIES = {"ann": "abcd", "bob": "ab", "eve": "dcbaa"}
LOOSE = DataConfig(min_user_interactions=1, min_item_interactions=1)


def make(folder, config=LOOSE, times=None):
    rows = [(u, i, n) for u, items in HISTORIES.items() for n, i in enumerate(items)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "position"], orient="row")
    frame = frame.with_columns(pl.Series("timestamp", times)) if times else frame
    raw = from_frames(frame, pl.DataFrame({"item_id": list("abcd"), "title": list("ABCD")}))
    prepare(raw.interactions, raw.items, config, folder)
    return Dataset.load(folder)


@pytest.fixture
def data(tmp_path):
    return make(tmp_path / "out")


def as_text(data, items):
    return "".join(data.items["item_id"][int(i)] for i in items)


def test_train_sequences(data):
    rows = zip(data.train_users.tolist(), data.train_sequences.lists(), strict=True)
    assert {data.users["user_id"][u]: as_text(data, s) for u, s in rows} == {"ann": "ab", "bob": "ab", "eve": "dcb"}


def test_cases_hold_everything_before_the_target(data):
    def flat(split):
        cases = data.cases(split)
        return [(data.users["user_id"][u], as_text(data, h), as_text(data, [t]))
                for u, h, t in zip(cases.users.tolist(), cases.histories.lists(), cases.targets.tolist(), strict=True)]

    assert flat("validation") == [("ann", "ab", "c"), ("eve", "dcb", "a")]
    assert flat("test") == [("ann", "abc", "d"), ("eve", "dcba", "a")]
    part = data.cases("test").take(np.array([1]))
    assert (len(part), as_text(data, part.histories[0])) == (1, "dcba")
    with pytest.raises(UserError, match="'validation' or 'test', not 'train'"):
        data.cases("train")


def test_temporal_cases_leave_out_targets_without_a_history(tmp_path):
    # ann: a b c d, bob: a b, eve: d c b a a
    times = [1, 2, 3, 8, 9, 10, 1, 2, 3, 4, 5]
    config = DataConfig(**{**LOOSE.model_dump(), "split": "temporal", "validation_fraction": 0.1, "test_fraction": 0.2})
    data = make(tmp_path / "out", config, times)
    cases = data.cases("test")
    assert [as_text(data, h) for h in cases.histories.lists()] == ["a"]
    assert as_text(data, cases.targets) == "b"
    assert [as_text(data, h) for h in data.cases("validation").histories.lists()] == ["abc"]


def test_a_folder_that_is_none_is_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"not a data folder \(meta\.json, items\.parquet, .*laserrec prepare"):
        Dataset.load(tmp_path)
    meta = (tmp_path / "out" / "meta.json").read_text()
    (tmp_path / "out" / "meta.json").write_text(meta.replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match=r"another version of laserrec .* prepare the data again"):
        Dataset.load(tmp_path / "out")
    (tmp_path / "out" / "meta.json").write_text(meta)
    (tmp_path / "out" / "users.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"users\.parquet is damaged: .*prepare the data again"):
        Dataset.load(tmp_path / "out")
    (tmp_path / "out" / "users.parquet").unlink()
    with pytest.raises(UserError, match=r"\(users\.parquet missing\)"):
        Dataset.load(tmp_path / "out")


@pytest.mark.parametrize(("name", "column"), [("items", "item"), ("users", "user_id"), ("interactions", "item")])
def test_another_table_in_a_files_place_is_told(data, tmp_path, name, column):
    other = "interactions" if name != "interactions" else "users"
    (tmp_path / "out" / f"{name}.parquet").write_bytes((tmp_path / "out" / f"{other}.parquet").read_bytes())
    with pytest.raises(UserError, match=rf"{name}\.parquet is another table: it has no column {column}"):
        Dataset.load(tmp_path / "out")
