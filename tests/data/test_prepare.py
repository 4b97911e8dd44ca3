"""Cleaning, splits, numbering and the folder against naive loops."""

import errno
import hashlib
import json
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.config import DataConfig
from laserrec.data.dataset import NEW_ITEMS, Dataset
from laserrec.data.losses import LossWarning
from laserrec.data.prepare import k_core, prepare, prepare_source
from laserrec.data.raw import INTERACTION_SCHEMA, ITEM_SCHEMA, from_frames
from laserrec.data.summary import NO_VALIDATION, summary_lines
from laserrec.util.errors import UserError

DATA = Path(__file__).resolve().parents[2] / "data" / "amazon-scientific"
pytestmark = pytest.mark.filterwarnings("ignore::laserrec.data.losses.LossWarning")  # most of these tests lose things
LOOSE = DataConfig(min_user_interactions=1, min_item_interactions=1)


def loose(**changes):
    return DataConfig(**{**LOOSE.model_dump(), **changes})


def acts(*rows):
    """(user_id, item_id, timestamp) rows, order of appearance."""
    return pl.DataFrame([(*row, i) for i, row in enumerate(rows)], schema=INTERACTION_SCHEMA, orient="row")


def goods(**titles):
    return pl.DataFrame([(k, v, None, None) for k, v in titles.items()], schema=ITEM_SCHEMA, orient="row")


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def history(folder, user_id):
    """(item_id, split) of one user, by position."""
    data = Dataset.load(folder)
    rows = data.interactions.join(data.users, on="user").join(data.items, on="item")
    return rows.filter(pl.col("user_id") == user_id).sort("position").select("item_id", "split").rows()


@pytest.fixture(scope="module")
def random_source():
    """800 interactions with distinct timestamps, some items untitled or without metadata."""
    rng = random.Random(3)
    times = rng.sample(range(10_000), 800)
    rows = [(f"u{rng.randrange(60)}", f"i{rng.randrange(40)}", t) for t in times]
    items = goods(**{f"i{n}": None if n % 9 == 0 else f"Title {n}" for n in range(1, 38)})
    return acts(*rows), items


# -- cleaning -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60), user=st.integers(1, 4),
       item=st.integers(1, 4))
def test_k_core_equals_a_naive_loop(pairs, user, item):
    kept = list(enumerate(pairs))
    while True:
        users, items = Counter(u for _, (u, _) in kept), Counter(i for _, (_, i) in kept)
        weak = next((n for n, (_, (u, i)) in enumerate(kept) if users[u] < user or items[i] < item), None)
        if weak is None:
            break
        del kept[weak]  # one at a time: the core does not depend on the order of removals
    frame = pl.DataFrame([(str(u), str(i), n) for n, (u, i) in enumerate(pairs)], orient="row",
                         schema={"user_id": pl.String, "item_id": pl.String, "n": pl.Int64})
    assert k_core(frame, user, item)["n"].to_list() == [n for n, _ in kept]


def test_each_step_is_counted(tmp_path):
    rows = [("u", "a", 1), ("u", "b", 2), ("u", "a", 1), ("u", "none", 3), ("v", "untitled", 4), ("v", "a", 5),
            ("w", "once", 6), ("w", "a", 7), ("v", "b", 8)]
    items = goods(a="A", b="B", untitled=None, once="O", never="N")
    config = DataConfig(min_user_interactions=2, min_item_interactions=2)
    report = prepare(acts(*rows), items, config, tmp_path / "out", notes={"skipped_lines": 4})
    dropped = [tuple(step["dropped"].values()) for step in report["steps"][1:]]
    assert report["new_items"] == {"never_bought": 1, "too_few_interactions": 1} and report["untitled_items"] == 1
    assert dropped == [(1, 0, 1), (1, 0, 1), (1, 0, 0), (2, 1, 1)]
    assert report["steps"][0] == {"step": "read", "interactions": 9, "users": 3, "items": 5, "items_in_metadata": 5}
    assert report["skipped_lines"] == 4
    assert report["table1"] == {"users": 2, "items": 2, "interactions": 4, "avg_history_length": 2.0, "density": 1.0}
    items = Dataset.load(tmp_path / "out").items
    assert items.select("item", "item_id", "title").rows() == [(0, "a", "A"), (1, "b", "B")]


def test_untitled_items_and_duplicates_stay_when_asked(tmp_path):
    rows = [("u", "a", 1), ("u", "a", 1), ("u", "unknown", 2), ("u", "untitled", 3)]
    config = loose(drop_untitled=False, drop_duplicates=False)
    prepare(acts(*rows), goods(a="A", untitled=None), config, tmp_path / "out")
    assert [i for i, _ in history(tmp_path / "out", "u")] == ["a", "a", "unknown", "untitled"]
    assert Dataset.load(tmp_path / "out").items["title"].to_list() == ["A", None, None]


def test_a_repeat_purchase_is_no_duplicate_and_is_reported(tmp_path):
    rows = [("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("v", "a", 1), ("v", "a", 2), ("v", "b", 3)]
    assert prepare(acts(*rows), goods(a="A", b="B"), LOOSE, tmp_path / "x")["users_whose_last_item_is_a_repeat"] == 1
    untimed = acts(*rows).with_columns(timestamp=pl.lit(None, pl.Int64))
    assert prepare(untimed, goods(a="A", b="B"), LOOSE, tmp_path / "y")["table1"]["interactions"] == 6


def test_of_duplicates_the_first_by_position_stays_whatever_the_rows_order(tmp_path):
    frame = pl.DataFrame({"user_id": "u", "item_id": ["a", "b", "a"], "timestamp": [5, 5, 5], "position": [0, 1, 2]})
    for name, rows in (("x", frame), ("y", frame.reverse())):
        raw = from_frames(rows, goods(a="A", b="B"))
        prepare(raw.interactions, raw.items, LOOSE, tmp_path / name)
        assert [i for i, _ in history(tmp_path / name, "u")] == ["a", "b"]


def test_nothing_left_is_an_error_with_its_cause(tmp_path):
    with pytest.raises(UserError, match=r"nothing is left after cleaning: k-core.*; lower data\.min_user"):
        prepare(acts(("u", "a", 1)), goods(a="A"), DataConfig(), tmp_path / "out")
    with pytest.raises(UserError, match=r"1 of 1 interactions have an item that .*: leading zeros.*like '7'.*'07'"):
        prepare(acts(("u", "7", 1)), goods(**{"07": "A"}), LOOSE, tmp_path / "out")
    with pytest.raises(UserError, match="1 of 1 interactions went: item has no title"):
        prepare(acts(("u", "a", 1)), goods(a=None, b="B"), LOOSE, tmp_path / "out")
    with pytest.raises(UserError, match="no interactions at all"):
        prepare(acts(), goods(a="A"), DataConfig(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_where_no_item_has_a_title_none_is_dropped_for_that(tmp_path):
    report = prepare(acts(("u", "a", 1), ("u", "b", 2)), goods(a=None), LOOSE, tmp_path / "out")
    assert report["table1"]["items"] == 2 and "No item has a title." in summary_lines(report)


# -- losses are told ----------------------------------------------------------------------------------------------


def test_losses_are_counted_told_and_kept(tmp_path):
    """Ten of twenty items have no metadata, as ids that match only in part give."""
    rows = [(f"u{t % 8}", f"i{t % 20}", t) for t in range(160)]
    items = goods(**{f"i{n}": f"Title {n}" for n in range(10)}, I12="x", I13=None)
    with pytest.warns(LossWarning, match=r"80 of 160 interactions\. Dropped 10 items.*not among the items") as told:
        report = prepare(acts(*rows), items, LOOSE, tmp_path / "out")
    assert len(told) == 1
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert summary_lines(written) == summary_lines(report) == [
        "Kept 8 of 8 users, 10 of 20 items, 80 of 160 interactions.",
        "Dropped 10 items, 80 interactions: item has no row in the metadata (untitled).",
        "10 of 20 item ids of the interactions are not among the items: yours are like 'i10' and 'i11', the "
        "catalogue's like 'I12' and 'I13'.",
        "Without a title: 1 item of the metadata.",
        "Kept as new items, without interactions: 1 that nobody bought, 0 bought too rarely to be learnt."]


def test_no_loss_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prepare(acts(*[("u", "a", t) for t in range(3)]), goods(a="A"), LOOSE, tmp_path / "out")
    assert summary_lines(report) == ["Kept 1 of 1 user, 1 of 1 item, 3 of 3 interactions."]


@pytest.mark.parametrize(("more", "told"), [
    ({}, "oldest first."),
    ({"qty": ["1", "2", "3"], "day": ["4", "5", "6"]}, "Unused columns of the interactions: qty, day. If one holds the "
     "time, map it: --columns timestamp=YOUR_COLUMN."),
    ({"qty": ["1", "2", "3"], "date": ["2024-01-03", "2024-01-02", ""]}, "Unused columns of the interactions: qty, "
     "date. If one holds the time, map it: --columns timestamp=date."),
])
def test_rows_in_their_own_order_are_told_with_what_may_hold_the_time(tmp_path, more, told):
    raw = from_frames(pl.DataFrame({"user_id": ["u"] * 3, "item_id": ["a"] * 3, **more}), goods(a="A"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        report = prepare(raw.interactions, raw.items, LOOSE, tmp_path / "out", notes=raw.notes)
    line = summary_lines(report)[1]
    assert line.startswith("There is no timestamp: the rows are taken in their order, oldest first.")
    assert line.endswith(told) and len(warned) == ("date" in more)


@pytest.mark.parametrize("order", ["timestamp", "position"])
def test_where_the_order_is_given_the_rows_order_is_not_told(order):
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "title": ["A"], order: [1], "date": ["2024-01-03"]})
    assert "unused_columns" not in from_frames(frame).notes
    assert from_frames(frame.drop(order)).notes["unused_columns"] == ["date"]


@pytest.mark.parametrize("kind", [pl.Int64, pl.Float64, pl.String])
def test_times_of_several_units_are_told(tmp_path, kind):
    frame = pl.DataFrame({"user_id": ["u"] * 3, "item_id": ["a"] * 3,
                          "timestamp": pl.Series([1_684_439_826, 1_684_439_827, 1_684_439_828_000]).cast(kind)})
    raw = from_frames(frame, goods(a="A"))
    with pytest.warns(LossWarning, match=r"Of the timestamps 2 look like seconds and 1 look like milliseconds"):
        prepare(raw.interactions, raw.items, LOOSE, tmp_path / "out", notes=raw.notes)


@pytest.mark.parametrize("times", [[0, 1_684_439_826, 1_684_439_827], [10**9, 5 * 10**10, 10**12],
                                   [5, 5000, 5_000_000], ["2020-01-01", "2021-01-01", "2022-01-01"]])
def test_times_of_one_unit_are_not_told(times):
    frame = pl.DataFrame({"user_id": ["u"] * 3, "item_id": ["a"] * 3, "timestamp": times})
    assert "time_units" not in from_frames(frame, goods(a="A")).notes


def test_many_broken_lines_are_told(tmp_path):
    with pytest.warns(LossWarning, match="Left out 1 broken line"):
        prepare(acts(*[("u", "a", t) for t in range(3)]), goods(a="A"), LOOSE, tmp_path / "out",
                notes={"skipped_lines": 1})


def test_two_interactions_per_user_leave_nothing_to_validate(tmp_path):
    rows = [(f"u{n}", i, t) for n in range(5) for t, i in enumerate("ab")]
    with pytest.warns(LossWarning, match="No user has three interactions, so there is nothing to validate"):
        report = prepare(acts(*rows), goods(a="A", b="B"), LOOSE, tmp_path / "out")
    assert summary_lines(report)[-1] == NO_VALIDATION
    assert report["interactions_per_split"] == {"train": 10, "validation": 0, "test": 0}


def test_items_without_interactions_are_kept_as_new_ones(tmp_path):
    rows = [("u", i, t) for t, i in enumerate("aabbc")]
    items = goods(c="Rare", a="A", b="B", z="Never", y="Never too", x=None)
    config = loose(min_item_interactions=2)
    report = prepare(acts(*rows), items, config, tmp_path / "out")
    assert report["new_items"] == {"never_bought": 2, "too_few_interactions": 1}
    new = Dataset.load(tmp_path / "out").new_items
    assert dict(new.schema) == ITEM_SCHEMA and new["item_id"].to_list() == ["c", "y", "z"]
    assert Dataset.load(tmp_path / "out").items["item_id"].to_list() == ["a", "b"]
    assert prepare(acts(*rows), items, config, tmp_path / "out")["reused"] is True
    first = Dataset.load(tmp_path / "out").meta
    assert (tmp_path / "out" / NEW_ITEMS).is_file()
    report = prepare(acts(*rows), items.filter(pl.col("item_id").is_in(["a", "b"])), config, tmp_path / "out",
                     overwrite=True)
    assert not report["reused"] and not (tmp_path / "out" / NEW_ITEMS).exists()
    assert Dataset.load(tmp_path / "out").new_items.rows() == []
    second = Dataset.load(tmp_path / "out").meta
    assert first["sha256"] == second["sha256"] and "new_items_sha256" in first and "new_items_sha256" not in second


def test_a_full_disk_is_a_clear_error(tmp_path, random_source, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="can't be written: No space left on device; make room"):
        prepare(*random_source, LOOSE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_form_are_refused(tmp_path):
    with pytest.raises(UserError, match="from_frames"):
        prepare(acts().select("user_id", "item_id"), goods(a="A"), LOOSE, tmp_path / "out")
    with pytest.raises(UserError, match="row 2 has no timestamp while others have one"):
        prepare(acts(("u", "a", 1), ("u", "a", None)), goods(a="A"), LOOSE, tmp_path / "out")
    with pytest.raises(UserError, match="item_id 'a' stands in more than one row"):
        prepare(acts(("u", "a", 1)), pl.concat([goods(a="A"), goods(a="B")]), LOOSE, tmp_path / "out")


# -- order and splits ---------------------------------------------------------------------------------------------


def test_tie_rule_timestamp_then_order_then_item_id(tmp_path):
    rows = [("u", "late", 9), ("u", "z", 5), ("u", "a", 5), ("u", "early", 1)]
    items = goods(late="L", z="Z", a="A", early="E")
    prepare(acts(*rows), items, LOOSE, tmp_path / "appearance")
    assert [i for i, _ in history(tmp_path / "appearance", "u")] == ["early", "z", "a", "late"]
    tied = acts(*rows).with_columns(order=pl.lit(0, pl.Int64))
    prepare(tied, items, LOOSE, tmp_path / "ids")
    assert [i for i, _ in history(tmp_path / "ids", "u")] == ["early", "a", "z", "late"]
    raw = from_frames(pl.DataFrame({"user_id": "u", "item_id": ["z", "a", "late"], "position": [2, 1, 0]}), items)
    prepare(raw.interactions, raw.items, LOOSE, tmp_path / "position")
    assert [i for i, _ in history(tmp_path / "position", "u")] == ["late", "a", "z"]


def test_leave_one_out_and_histories_too_short_for_it(tmp_path):
    rows = [("long", i, t) for t, i in enumerate("abca")] + [("short", i, t) for t, i in enumerate("ab")]
    report = prepare(acts(*rows), goods(a="A", b="B", c="C"), LOOSE, tmp_path / "out")
    assert history(tmp_path / "out", "long") == [("a", "train"), ("b", "train"), ("c", "validation"), ("a", "test")]
    assert history(tmp_path / "out", "short") == [("a", "train"), ("b", "train")]
    assert report["split"] == {"kind": "leave_one_out", "users_too_short_to_split": 1}


@settings(max_examples=40, deadline=None)
@given(times=st.lists(st.integers(0, 12), min_size=10, max_size=60), validation=st.sampled_from([0.1, 0.2, 0.3]),
       test=st.sampled_from([0.1, 0.2]))
def test_temporal_split_never_lets_equal_times_straddle(tmp_path_factory, times, validation, test):
    rows = [(f"u{n % 4}", "a", t) for n, t in enumerate(times)]
    config = loose(split="temporal", validation_fraction=validation, test_fraction=test,
                   drop_duplicates=False)
    out = tmp_path_factory.mktemp("t") / "out"
    try:
        report = prepare(acts(*rows), goods(a="A"), config, out)
    except UserError as error:
        assert "would be empty" in str(error)
        ordered, held = sorted(times), max(1, round(len(times) * test))
        both = held + max(1, round(len(times) * validation))
        assert ordered[-both] in (ordered[0], ordered[-held])
        return
    frame = Dataset.load(out).interactions
    ends = {s: frame.filter(pl.col("split") == s)["timestamp"] for s in ("train", "validation", "test")}
    assert ends["train"].max() < ends["validation"].min() <= ends["validation"].max() < ends["test"].min()
    assert len(ends["test"]) >= round(len(times) * test)
    assert report["split"]["test_from"] == ends["test"].min()


def test_temporal_split_at_the_exact_quantiles_with_its_cold_cases(tmp_path):
    rows = [(f"u{t % 3}", f"i{t % 2}", t) for t in range(16)]
    rows += [("new", "i0", 16), ("u0", "fresh", 17), ("u1", "i1", 18), ("u1", "i0", 19)]
    items = goods(i0="A", i1="B", fresh="F")
    config = loose(split="temporal", validation_fraction=0.1, test_fraction=0.1)
    report = prepare(acts(*rows), items, config, tmp_path / "out")
    assert report["split"] == {"kind": "temporal", "validation_from": 16, "test_from": 18,
                               "held_out_without_history": 1, "held_out_of_items_unseen_in_train": 1,
                               "items_unseen_in_train": 1}
    assert report["interactions_per_split"] == {"train": 16, "validation": 2, "test": 2}


def test_temporal_split_needs_timestamps(tmp_path):
    untimed = acts(("u", "a", None), ("u", "a", None))
    config = loose(split="temporal")
    with pytest.raises(UserError, match="temporal needs a timestamp"):
        prepare(untimed, goods(a="A"), config, tmp_path / "out")
    timed = acts(*[("u", "a", t) for t in range(10)])
    with pytest.raises(UserError, match="leave no training data of 10"):
        prepare(timed, goods(a="A"), loose(split="temporal", validation_fraction=0.6, test_fraction=0.4),
                tmp_path / "out")


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_training_sequences_hold_no_held_out_interaction(tmp_path, random_source, split):
    """By occurrence, not by item: an item may be bought twice."""
    config = DataConfig(min_user_interactions=3, min_item_interactions=3, split=split)
    prepare(*random_source, config, tmp_path / "out")
    data = Dataset.load(tmp_path / "out")
    ids = dict(data.users.rows()), {item: item_id for item, item_id, *_ in data.items.rows()}
    titled = set(random_source[1].drop_nulls("title")["item_id"])
    source = {}
    for user_id, item_id, time, _ in random_source[0].sort("timestamp").rows():
        if item_id in titled:
            source.setdefault(user_id, []).append((item_id, time))
    held_from = {}
    for user, items in zip(data.train_users.tolist(), data.train_sequences.lists(), strict=True):
        own = [(i, t) for i, t in source[ids[0][user]] if i in set(ids[1].values())]
        rows = data.interactions.filter(pl.col("user") == user)
        assert [i for i, _ in own] == [ids[1][i] for i in rows["item"]]
        assert [ids[1][i] for i in items] == [i for i, _ in own[:len(items)]]
        held_from[user] = own[len(items)][1] if len(items) < len(own) else None
        splits = rows["split"].to_list()
        assert splits == sorted(splits, key=["train", "validation", "test"].index)
        assert splits.count("train") == len(items)
    if split == "temporal":
        last_train = data.interactions.filter(pl.col("split") == "train")["timestamp"].max()
        assert all(t is None or t > last_train for t in held_from.values())


# -- the folder ---------------------------------------------------------------------------------------------------


def test_same_input_same_bytes_also_with_shuffled_rows(tmp_path, random_source):
    frame, items = random_source
    config = DataConfig(min_user_interactions=3, min_item_interactions=3)
    prepare(frame, items, config, tmp_path / "a")
    prepare(frame, items, config, tmp_path / "elsewhere" / "b")
    shuffled = frame.sample(fraction=1, shuffle=True, seed=1).with_columns(order=pl.int_range(pl.len(), dtype=pl.Int64))
    assert not shuffled["item_id"].equals(frame["item_id"])
    prepare(shuffled, items.reverse(), config, tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "elsewhere" / "b") == contents(tmp_path / "c")


def test_ids_are_dense_and_sorted_and_the_hash_is_of_the_tables(tmp_path, random_source):
    report = prepare(*random_source, LOOSE, tmp_path / "out")
    data = Dataset.load(tmp_path / "out")
    for frame, number, name in ((data.items, "item", "item_id"), (data.users, "user", "user_id")):
        assert frame[number].to_list() == list(range(frame.height))
        assert frame[name].to_list() == sorted(frame[name].to_list())
    files = contents(tmp_path / "out")
    joined = b"".join(files[f"{name}.parquet"] for name in ("items", "users", "interactions"))
    assert data.fingerprint == report["sha256"] == hashlib.sha256(joined).hexdigest()
    assert sorted(files) == ["interactions.parquet", "items.parquet", "meta.json", "report.json", "users.parquet"]
    assert str(tmp_path).encode() not in b"".join(files.values())
    written = json.loads(files["report.json"])
    assert written == {k: v for k, v in report.items() if k not in ("sha256", "folder", "reused")}


def test_an_existing_folder_is_reused_refused_or_replaced(tmp_path, random_source):
    out = tmp_path / "out"
    assert prepare(*random_source, LOOSE, out)["reused"] is False
    before, touched = contents(out), (out / "items.parquet").stat().st_mtime_ns
    assert prepare(*random_source, LOOSE, out)["reused"] is True
    assert (out / "items.parquet").stat().st_mtime_ns == touched
    other = loose(min_user_interactions=5)
    with pytest.raises(UserError, match=r"made from other input or settings.*overwrite"):
        prepare(*random_source, other, out)
    assert contents(out) == before
    (out / "model").mkdir()
    (out / "model" / "weights").write_text("of a fit into the data folder")
    assert prepare(*random_source, other, out, overwrite=True)["reused"] is False
    assert (out / "model" / "weights").read_text() == "of a fit into the data folder"
    shutil.rmtree(out / "model")
    assert contents(out) != before
    (out / "users.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match="or changed since"):
        prepare(*random_source, other, out)


def test_a_folder_of_something_else_is_never_overwritten(tmp_path, random_source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is no data folder; it is never overwritten"):
        prepare(*random_source, LOOSE, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    assert prepare(*random_source, LOOSE, tmp_path / "empty")["reused"] is False


def test_an_interrupted_prepare_leaves_what_was_there(tmp_path, random_source, monkeypatch):
    from laserrec.data import prepare as module

    prepare(*random_source, LOOSE, tmp_path / "out")
    before = contents(tmp_path / "out")
    written = []

    def interrupted(path, data):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        path.write_bytes(data)

    monkeypatch.setattr(module, "write_bytes", interrupted)
    other = loose(min_user_interactions=5)
    with pytest.raises(KeyboardInterrupt):
        prepare(*random_source, other, tmp_path / "out", overwrite=True)
    assert len(written) == 3
    assert contents(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_amazon_scientific_is_a_five_core_and_stays_whole(tmp_path):
    report = prepare_source(DATA, tmp_path / "out")
    assert report["table1"] == {"users": 8442, "items": 4385, "interactions": 59427, "avg_history_length": 7.0394,
                                "density": 0.00160535}
    assert all(set(step["dropped"].values()) == {0} for step in report["steps"][1:])
    assert report["users_whose_last_item_is_a_repeat"] == 50
    assert report["interactions_per_split"] == {"train": 42543, "validation": 8442, "test": 8442}
    assert report["share_of_items_without"] == {"title": 0.0, "brand": round(16 / 4385, 6),
                                                "category": round(134 / 4385, 6)}
    data = Dataset.load(tmp_path / "out")
    assert len(data.cases("validation")) == len(data.cases("test")) == 8442


def test_prepare_source_counts_skipped_lines_and_needs_a_known_way_to_skip(tmp_path):
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\nu,a,1\nu,a,soon\nu,a,3\n")
    (tmp_path / "items.csv").write_text("item_id,title\na,A\n")
    with pytest.raises(UserError, match=r"interactions\.csv:3, column timestamp"):
        prepare_source(tmp_path, tmp_path / "out", LOOSE)
    report = prepare_source(tmp_path, tmp_path / "out", LOOSE, on_error="skip")
    assert (report["skipped_lines"], report["table1"]["interactions"]) == (1, 2)
    with pytest.raises(UserError, match="on_error"):
        prepare_source(tmp_path, tmp_path / "out", LOOSE, on_error="no")


# -- the whole against Python lists -------------------------------------------------------------------------------


def naive(rows, titles, at_least):
    """items, users and (user_id, item_id, position, split) that are kept, by loops over the ids themselves."""
    rows = sorted({(u, t, n, i) for n, (u, i, t) in enumerate(rows) if titles.get(i)},
                  key=lambda r: (r[0].encode(), r[1], r[2], r[3].encode()))
    first = {}
    for u, t, n, i in rows:
        first.setdefault((u, i, t), (u, t, n, i))
    kept = list(first.values())
    while True:
        users, items = Counter(r[0] for r in kept), Counter(r[3] for r in kept)
        fewer = [r for r in kept if users[r[0]] >= at_least and items[r[3]] >= at_least]
        if len(fewer) == len(kept):
            break
        kept = fewer
    order = sorted(kept, key=lambda r: (r[0].encode(), r[1], r[2], r[3].encode()))
    found, count = [], Counter(r[0] for r in order)
    place = Counter()
    for u, _, _, i in order:
        p, n = place[u], count[u]
        place[u] += 1
        found.append((u, i, p, "train" if n < 3 or p < n - 2 else "validation" if p == n - 2 else "test"))
    return (sorted({r[3] for r in kept}, key=str.encode), sorted({r[0] for r in kept}, key=str.encode), found)


NAMES = ["10", "9", "Z", "a", "é", "e", "a very long id that is written on its own", "\U0001f600", "\uffee", "_"]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(0, 5)), min_size=1,
                     max_size=80), untitled=st.sets(st.sampled_from(NAMES), max_size=3), at_least=st.integers(1, 3))
def test_the_folder_is_that_of_python_lists(tmp_path_factory, rows, untitled, at_least):
    """Ids that sort by bytes otherwise than by letters or as numbers, with repeats, ties and untitled items."""
    titles = {name: None if name in untitled else f"Title {name}" for name in NAMES if name != "_"}
    items = pl.DataFrame([(k, v, None, None) for k, v in titles.items()], schema=ITEM_SCHEMA, orient="row")
    config = loose(min_user_interactions=at_least, min_item_interactions=at_least)
    goods_, users, found = naive(rows, titles, at_least)
    out = tmp_path_factory.mktemp("data") / "out"
    if not found:
        with pytest.raises(UserError, match="nothing is left"):
            prepare(acts(*rows), items, config, out)
        return
    prepare(acts(*rows), items, config, out)
    data = Dataset.load(out)
    assert data.items["item_id"].to_list() == goods_ and data.users["user_id"].to_list() == users
    assert data.items["title"].to_list() == [titles[i] for i in goods_]
    told = data.interactions.join(data.users, on="user").join(data.items, on="item").sort("user", "position")
    assert told.select("user_id", "item_id", "position", "split").rows() == found
    assert data.interactions.equals(data.interactions.sort("user", "position"))
    new = [i for i in sorted(titles, key=str.encode) if titles[i] and i not in goods_]
    assert data.new_items["item_id"].to_list() == new
