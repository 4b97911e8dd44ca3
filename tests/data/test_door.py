"""Every form a caller may give histories in -> item rows, in order; what gets lost is counted and told."""

import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from laserrec.data.door import LossWarning, read_histories
from laserrec.data.losses import Losses, mismatch
from laserrec.util.errors import UserError

INDEX = {"a": 0, "b": 1, "7": 2}
FRAME = pl.DataFrame({"user_id": ["y", "x", "y"], "item_id": ["b", "a", "a"], "other": [1, 2, 3]})
LISTS = pl.DataFrame({"user_id": ["y", "x"], "item_id": [["b", "a"], ["a"]]})
PANDAS = FRAME.to_pandas()


def rows(histories, **options):
    return read_histories(histories, INDEX, **options).rows


def test_lists_are_users_from_zero():
    got = read_histories([["a", "b", "a"], ("b",), np.array(["a"])], INDEX)
    assert got.users == [0, 1, 2] and got.user_type == pl.Int64 and not got.pandas
    assert got.rows == [[0, 1, 0], [1], [0]]


def test_a_dict_keeps_its_users_and_order():
    got = read_histories({"y": ["b"], "x": ["a"]}, INDEX)
    assert got.users == ["y", "x"] and got.user_type == pl.String
    assert read_histories({5: ["a"], 3: ["b"]}, INDEX).users == [5, 3]
    assert read_histories({5: ["a"], "x": ["b"]}, INDEX).users == ["5", "x"]
    assert read_histories({np.int64(5): ["a"], 3.0: ["b"]}, INDEX).users == [5, 3]
    assert read_histories({2**70: ["a"]}, INDEX).user_type == pl.String


@pytest.mark.parametrize("histories", [
    FRAME, FRAME.lazy(), PANDAS, pa.table({"user_id": ["y", "x", "y"], "item_id": ["b", "a", "a"]}), LISTS,
    LISTS.to_pandas(), LISTS.rename({"item_id": "items"}), LISTS.with_columns(item_id=pl.Series([["b", "a"], ["a"]],
                                                                              dtype=pl.List(pl.Categorical))),
    PANDAS.groupby("user_id", sort=False)["item_id"].agg(list), PANDAS.groupby("user_id", sort=False).agg(list),
    PANDAS.groupby("user_id", sort=False)["item_id"].agg(np.array), PANDAS.set_index("user_id"),
    {"y": pl.Series(["b", "a"]), "x": pd.Series(["a"])},
])
def test_forms_of_the_same_histories(histories):
    got = read_histories(histories, INDEX)
    assert got.users == ["y", "x"] and got.rows == [[1, 0], [0]]
    assert got.pandas == type(histories).__module__.startswith("pandas")


@pytest.mark.parametrize("histories", [
    pl.Series([["b", "a"], ["a", "a"]]), pd.Series([["b", "a"], ["a", "a"]]), np.array([["b", "a"], ["a", "a"]]),
    pa.array([["b", "a"], ["a", "a"]]), (h for h in [["b", "a"], ["a", "a"]]),
    pl.Series([["b", "a"], ["a", "a"]], dtype=pl.Array(pl.String, 2)),
    np.array([np.array(["b", "a"]), np.array(["a", "a"])], dtype=object),
])
def test_forms_without_user_ids(histories):
    got = read_histories(histories, INDEX)
    assert got.users == [0, 1] and got.rows == [[1, 0], [0, 0]]


def test_users_of_a_frame_may_be_numbers_or_written_in_two_ways():
    assert read_histories(FRAME.with_columns(user_id=pl.Series([9, 4, 9])), INDEX).users == [9, 4]
    assert read_histories(FRAME.with_columns(user_id=pl.Series([9.0, 4.0, 9.0])), INDEX).users == [9, 4]
    got = read_histories(FRAME.with_columns(user_id=pl.Series([" y", "x", "y"])), INDEX)
    assert (got.users, got.rows) == (["y", "x"], [[1, 0], [0]])


def test_item_ids_are_written_in_many_ways():
    assert rows([[7, "7", 7.0, " 7 ", "7.0", b"7", np.int8(7)]]) == [[2] * 7]
    assert rows(pd.DataFrame({"user_id": 1, "item_id": [7.0]})) == rows([[7]])
    assert rows(pd.DataFrame({"user_id": 1, "item_id": [7, "a"]})) == [[2, 0]]


def test_a_timestamp_or_position_orders_as_in_fit():
    frame = FRAME.with_columns(timestamp=pl.Series(["2020-01-02", "2020-01-01", "2020-01-01"]))
    assert rows(frame) == rows(frame.to_pandas()) == [[0, 1], [0]]
    assert rows(FRAME.with_columns(position=pl.Series([2, 0, 1]))) == [[0, 1], [0]]
    tied = FRAME.with_columns(timestamp=5)
    assert rows(tied) == [[1, 0], [0]]  # by the rows' order
    assert rows(tied.with_columns(position=0)) == [[0, 1], [0]]  # then by item_id
    assert rows(FRAME.with_columns(timestamp=pl.lit(None))) == [[1, 0], [0]]
    lists = pl.DataFrame({"user_id": ["y", "y"], "items": [["b", "a"], ["7"]], "timestamp": [2, 1]})
    assert rows(lists) == [[2, 1, 0]]
    with pytest.raises(UserError, match=r"row 2, column timestamp: neither a number.*'soon'"):
        rows(FRAME.with_columns(timestamp=pl.Series(["5", "soon", "6"])))


def test_unknown_items():
    with pytest.warns(LossWarning):
        assert rows([["nope", "a", "b", "nada"]], unknown="drop") == [[0, 1]]
    with pytest.raises(UserError, match=r"user 0: 2 unknown item ids, first .'nope', 'nada'.*like 'a'.*add_items"):
        rows([["nope", "a", "nada"]])
    with pytest.raises(UserError, match=r"^upper and lower case differ: history of user 'u': 2 .*'A', 'B'.*'a' and"):
        rows({"u": ["A", "B"]})
    with pytest.raises(UserError, match=r"unknown item ids.*the catalogue's are like none"):
        read_histories([["a"]], {})
    with pytest.raises(UserError, match=r"user 0: place 2 holds no item id"):
        rows([["a", None]])


def test_one_bad_row_neither_aborts_nor_vanishes():
    with pytest.warns(LossWarning, match=r"1 of 4 items .*1 of 3 users have no known item.*'zz'.*'a' and 'b'"):
        got = read_histories({"u": ["a", "b"], "v": ["zz"], "w": ["7"]}, INDEX, unknown="drop")
    assert (got.users, got.rows) == (["u", "v", "w"], [[0, 1], [], [2]])
    assert got.lost == Losses(4, 1, 3, 1, ("zz",))
    frame = pl.DataFrame({"user_id": ["u", "v", "w"], "item_id": [["a"], [], None]})
    with pytest.warns(LossWarning, match="2 of 3 users"):
        assert rows(frame, unknown="drop") == [[0], [], []]
    long = pl.DataFrame({"user_id": ["u", "v"], "item_id": ["a", None]})
    with pytest.warns(LossWarning, match="1 of 2 users"):
        assert rows(long, unknown="drop") == [[0], []]


def test_small_losses_are_counted_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read_histories([["a"] * 9 + ["zz"]], INDEX, unknown="drop")
        assert got.lost.lines() == ["1 of 10 items of the histories are not in the catalogue and were left out."]
        assert read_histories([["a"]], INDEX).lost.lines() == []


def test_nothing_in_the_catalogue_is_an_error_unless_the_caller_sums_parts():
    with pytest.raises(UserError, match="no item of the histories is in the catalogue: upper and lower case differ"):
        read_histories([["A"], ["B"]], INDEX, unknown="drop")
    for nothing in ([[], []], [[None]]):
        with pytest.raises(UserError, match="hold no item ids"):
            read_histories(nothing, INDEX, unknown="drop")
    parts = [read_histories([[i]], INDEX, unknown="drop", tell=False).lost for i in ("zz", "a")]
    assert parts[0] + parts[1] == Losses(2, 1, 2, 1, ("zz",))


@pytest.mark.parametrize(("theirs", "ours", "cause"), [
    (["7.0", "8.0"], ["7", "8"], "7.0 on one side"), (["7", "8"], ["007", "008"], "leading zeros"),
    (["007"], ["7"], "leading zeros"), (["sku-1"], ["SKU-1"], "upper and lower"), (["SKU 1"], ["sku-1"], "punctuation"),
    (["1", "2"], ["i1", "i2"], "letters before"), (["['i1', 'i2']"], ["i1"], "lists of ids are written as text"),
    (["0", "1"], ["B00A", "B00C"], "row numbers"), (["x"], ["y"], "^yours are like 'x', the catalogue's like 'y'"),
    ([], ["y"], "^yours are like none"),
])
def test_the_likeliest_cause(theirs, ours, cause):
    with pytest.raises(AssertionError, match=cause):
        raise AssertionError(mismatch(theirs, ours))


def test_excluded_items():
    got = read_histories({"u": ["a"], "v": ["b"]}, INDEX, exclude=["a", 7.0, "gone"])
    assert got.excluded == [[0, 2], [0, 2]]
    assert read_histories({1: ["a"], 2: ["b"]}, INDEX, exclude={"2": ["a"], 9: ["b"]}).excluded == [[], [0]]
    assert read_histories([["a"]], INDEX).excluded == [[]]
    assert read_histories({5: ["a"]}, INDEX, exclude={5: ["a", None, ""], "5": pa.array(["b"])}).excluded == [[0, 1]]


@pytest.mark.parametrize(("exclude", "message"), [
    (["A", "B"], "none of its item ids is in the catalogue: upper and lower case differ; .*'A' and 'B'.*'a' and 'b'"),
    ({"u": ["zz"]}, "none of its item ids is in the catalogue: yours are like 'zz'"),
    ({"x": ["a"], "y": ["b"]}, "none of its users has a history here: its users are like 'x' and 'y'.*'u' and 'v'"),
    ({"U": ["a"]}, "none of its users has a history here: upper and lower case differ"),
])
def test_an_exclusion_without_effect_is_told(exclude, message):
    with pytest.warns(LossWarning, match=f"^exclude has no effect, {message}"):
        assert read_histories({"u": ["a"], "v": ["b"]}, INDEX, exclude=exclude).excluded == [[], []]


@pytest.mark.parametrize("exclude", [[], {}, [None, ""], {"v": []}, {"x": ["a"], "y": ["b"]}])
def test_a_user_may_have_nothing_excluded(exclude):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_histories({"u": ["a"]}, INDEX, exclude=exclude).excluded == [[]]


@pytest.mark.parametrize(("exclude", "message"), [
    ("a", "exclude is 'a'; exclude is a list of item ids"), ({"u": "a"}, "exclude of user 'u' is 'a'; exclude is"),
    ([["a"], ["b"]], r"exclude: place 1 is \['a'\]: a list or dict, not an id; exclude is a flat list"),
    ({"u": ["b", ["a"]]}, r"exclude of user 'u': place 2 is \['a'\]: a list or dict"),
    (np.array([["a"]]), "exclude: place 1 is array.*: a list or dict"), ([True], "place 1 is True: not an id"),
    (FRAME, "exclude is a DataFrame, not a list of item ids; give its column item_id"),
    (FRAME.lazy(), "exclude is a LazyFrame, not a list"), ({"u": PANDAS}, "exclude of user 'u' is a DataFrame, not"),
    ({"user_id": ["u"], "item_id": ["a"]}, "exclude is a dict with the column item_id, not a dict of lists by user"),
])
def test_what_is_no_exclusion_is_refused(exclude, message):
    with pytest.raises(UserError, match=message) as told:
        read_histories({"u": ["a"]}, INDEX, exclude=exclude)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("given", "message"), [
    ([], "no histories"), ({}, "no histories"), (FRAME.head(0), "no histories"), (PANDAS.head(0), "no histories"),
    ([["a"], []], "user 1: it is empty"), ({"x": None}, "user 'x': it is empty"),
    ({"x": "a"}, "user 'x' is 'a', not a list"), ({"x": {"a", "b"}}, "not a list"),
    (["a", "b"], "one list of item ids"), ([7], "one list of item ids"), (("a",), "one list of item ids"),
    (np.array(["a", "b"]), "one list of item ids"), (pd.Series(["a"]), "one list of item ids"),
    ("a", "not str"), (5, "not int"), (None, "not NoneType"), ({"a"}, "not set"),
    (FRAME.drop("item_id"), "no column for item_id; there are: user_id, other"),
    (pl.DataFrame({"user_id;item_id": ["u;a"]}), "looks separated by ';'; set --separator"),
    (FRAME.with_columns(user_id=pl.Series(["a", None, "b"])), "row 2, column user_id: empty id"),
    ({"": ["a"]}, "user 1: empty id"), ({5: ["a"], "5": ["b"]}, "two users are called '5'"),
    (FRAME.with_columns(timestamp=pl.Series([[1], [2], [3]])), r"row 1, column timestamp: neither .*\(found \[1\]\)"),
    (LISTS.with_columns(user_id=pl.Series([["a"], ["b"]])),
     r"row 1, column user_id: a list or dict, not an id \(found \['a'\]\)"),
    ({"x": FRAME}, "user 'x' is a DataFrame, not a list"),
    (PANDAS.groupby("user_id"), r"give .agg\(list\)"), (PANDAS.groupby("user_id")["item_id"], r"give .agg\(list\)"),
])
def test_mistakes_are_named(given, message):
    with pytest.raises(UserError, match=message) as told:
        read_histories(given, INDEX)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match='unknown is "error" or "drop"'):
        read_histories(given, INDEX, unknown="skip")


def test_dates_that_are_not_used_are_told_where_rows_have_an_order():
    dated = FRAME.with_columns(date=pl.Series(["2024-01-03", "2024-01-02", "2024-01-01"]))
    for frame in (dated, dated.to_pandas(), dated.with_columns(pl.col("date").str.to_date())):
        with pytest.warns(LossWarning, match=r"no column timestamp.*the dates in 'date' are not used; .* call this"):
            assert rows(frame) == [[1, 0], [0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows(dated.rename({"date": "timestamp"})) == [[0, 1], [0]]
        rows(LISTS.with_columns(date=pl.Series(["2024-01-03", "2024-01-02"])))


@pytest.mark.filterwarnings("ignore::laserrec.data.losses.LossWarning")
def test_missing_values_in_words_are_no_items_and_no_users():
    assert rows([["a", "NULL", "b"]], unknown="drop") == [[0, 1]]
    assert rows([["a"]], exclude=["b", "nan"]) == [[0]]
    with pytest.raises(UserError, match="row 2, column user_id: a missing value in words"):
        rows(pl.DataFrame({"user_id": ["x", "None"], "item_id": ["a", "b"]}))
