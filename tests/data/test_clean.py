"""One rule for ids, texts and times: for one value and for a column alike."""

import time
from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import UUID

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.data.clean import (
    alike,
    as_id,
    column_of,
    ids,
    is_empty,
    is_nested,
    item_id,
    item_ids_of,
    text,
    texts,
    times,
    unmixed,
)
from laserrec.util.errors import UserError

WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["NULL", "nan ", "NA"])
NUMBERED = st.from_regex(r"\A\s?-?0?[0-9]{1,3}(\.[05]{1,2})?\s?\Z")


@pytest.mark.parametrize(("value", "expected"), [
    (7, "7"), (7.0, "7"), (" 7 ", "7"), ("7", "7"), ("7.0", "7"), ("7.00", "7"), (-0.0, "0"), ("-0.0", "0"),
    ("-0", "-0"),
    (np.int32(7), "7"), (np.float32(7), "7"), (b"7", "7"), (Decimal("7.00"), "7"), (np.str_("7"), "7"),
    ("007", "007"), ("007.0", "007.0"), ("\ufeffi1\u00a0", "i1"), ("a b", "a b"), ("1.10", "1.10"), (7.5, "7.5"),
    ("1e5", "1e5"), (2**60, str(2**60)), (Decimal("1.50"), "1.5"), ("x\ud83d", "x\ufffd"),
    (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
])
def test_ids_of_one_kind(value, expected):
    assert item_id(value) == expected


@pytest.mark.parametrize(("value", "message"), [
    ("", "empty id"), (" \t", "empty id"), (None, "empty id"), (float("nan"), "empty id"),
    ("NULL", "a missing value in words"), (" nan ", "a missing value in words"), ("<NA>", "a missing value in words"),
    (["a"], "a list or dict, not an id"), ({"a": 1}, "a list or dict"), (True, "not an id"),
    (np.bool_(True), "not an id"),
    (float("inf"), "not an id"), (date(2020, 1, 1), "not an id"), (b"\xff", "not an id"),
    (1.2e18, "a float too large to hold all digits"), (np.float32(2**25), "a float too large"),
])
def test_what_is_no_id_is_refused(value, message):
    assert as_id(value) is None
    with pytest.raises(UserError, match=message):
        item_id(value)


@pytest.mark.parametrize(("values", "message"), [
    (pl.DataFrame({"item_id": ["a"]}), "expected a list of item ids, not a DataFrame; give its column item_id"),
    ({"item_id": ["a"]}, "expected a list of item ids, not {'item_id'"), ("a", "not 'a'"),
    ([pl.Series(["a"])], r"a list or dict, not an id \(found \['a'\]\)"),
    ([np.zeros((2, 2))], r"a list or dict, not an id \(found array"),
])
def test_what_is_no_list_of_ids_is_told_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as told:
        item_ids_of(values)
    assert "\n" not in str(told.value)


def test_missing_values_in_words_are_no_ids_and_names_are():
    words = ["NULL", "nan", " None", "\\N", "n/a", "Nan", "Null", "NA", "x", None]
    assert ids(pl.Series(words)).to_list() == [as_id(w) for w in words] == [*[None] * 5, "Nan", "Null", "NA", "x", None]
    assert is_empty(pl.Series(words)).to_list() == [*[True] * 5, False, False, False, False, True]


COLUMNS = st.one_of(
    st.lists(st.one_of(st.none(), WORDS, NUMBERED)).map(lambda v: pl.Series(v, dtype=pl.String)),
    st.lists(st.one_of(st.none(), st.integers(-2**62, 2**62))).map(lambda v: pl.Series(v, dtype=pl.Int64)),
    st.lists(st.one_of(st.none(), st.floats(), st.integers(-50, 50).map(float))).map(
        lambda v: pl.Series(v, dtype=pl.Float64)),
    st.lists(st.one_of(st.none(), st.decimals(-99, 99, places=2))).map(lambda v: pl.Series(v, dtype=pl.Decimal(10, 2))),
    st.lists(st.one_of(st.none(), st.binary(max_size=3), WORDS.map(str.encode))).map(
        lambda v: pl.Series(v, dtype=pl.Binary)),
    st.lists(st.booleans()).map(lambda v: pl.Series(v, dtype=pl.Boolean)),
    st.lists(st.dates()).map(lambda v: pl.Series(v, dtype=pl.Date)),
    st.lists(st.lists(st.one_of(st.none(), WORDS), max_size=3)).map(lambda v: pl.Series(v, dtype=pl.List(pl.String))),
    st.lists(st.lists(st.lists(WORDS, max_size=2), max_size=2)).map(
        lambda v: pl.Series(v, dtype=pl.List(pl.List(pl.String)))),
    st.lists(st.fixed_dictionaries({"name": st.one_of(st.none(), WORDS), "id": st.integers(0, 9)})).map(
        lambda v: pl.Series(v, dtype=pl.Struct({"name": pl.String, "id": pl.Int64}))),
)


@settings(max_examples=300, deadline=None)
@given(column=COLUMNS)
def test_a_column_and_its_values_give_the_same_ids_and_texts(column):
    assert ids(column).to_list() == [as_id(v) for v in column.to_list()]
    assert texts(column).to_list() == [text(v) for v in column.to_list()]
    assert ids(column).dtype == texts(column).dtype == pl.String


MARKUP = st.lists(st.sampled_from(["&amp;", "<b>", "</b>", "<br>", "<script>", "</script>", "Drill", " ", "<", "&",
                                   "getTime()", "\x00", "\u00a0", '<img alt="x">', "&lt;b&gt;"])).map("".join)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(MARKUP))
def test_markup_is_cleaned_alike(values):
    assert texts(pl.Series(values, dtype=pl.String)).to_list() == [text(v) for v in values]


@pytest.mark.parametrize("kind", [pl.Categorical, pl.Enum(["7.0", " a "])])
def test_categories_are_read_as_text(kind):
    assert ids(pl.Series(["7.0", " a "]).cast(kind)).to_list() == ["7", "a"]
    assert texts(pl.Series(["7.0", " a "]).cast(kind)).to_list() == ["7.0", "a"]


def test_narrow_floats_lose_digits_sooner():
    assert ids(pl.Series([7.0, 2.0**25], dtype=pl.Float32)).to_list() == ["7", None]


@pytest.mark.parametrize(("value", "expected"), [
    ("  two\n words ", "two words"),
    ("a\x00b\u00a0c", "a b c"),
    ("Black &amp; Decker 3&quot; Säge", 'Black & Decker 3" Säge'),
    ("<span class='x'>Drill</span> <b>18V</b>", "Drill 18V"),
    ("size 3 < 5 and 7 > 6, <M8> thread", "size 3 < 5 and 7 > 6, <M8> thread"),
    ("<style>.a{color:red}</style>Drill<script>var x", "Drill"),
    ('<img src="a.png" alt="Amazon Fashion" width="1"/>', "Amazon Fashion"),
    ('Drill <span class="cut off', "Drill"),
    ("var aPageStart = (new Date()).getTime();", None),
    ("<br>", None), (" \n", None), (None, None), (float("nan"), None), ([], None), ({}, None),
    ("日本語 ✓", "日本語 ✓"), ("x" * 10_000, "x" * 10_000),
    (b"Dr\xc3\xa4ll", "Dräll"), (1984, "1984"), (1984.0, "1984"), (1e16, "10000000000000000"), (1e-7, "0.0000001"),
    (np.float32(27.74), "27.74"), (np.float16(0.1), "0.1"), (-0.25, "-0.25"),
    (True, "true"), (date(2020, 1, 1), "2020-01-01"),
    ([["Tools", "Drills"], None, ["x"]], "Tools Drills x"), (np.array(["a", "b"]), "a b"),
    ({"id": 5, "name": "Tools"}, "Tools"), ([{"name": "Tools"}, {"name": "Drills"}], "Tools Drills"),
    ({"a": "x", "b": ["y"]}, "x y"),
])
def test_texts(value, expected):
    assert text(value) == expected
    if isinstance(value, str):
        assert texts(pl.Series("title", ["plain", value, None])).to_list() == ["plain", expected, None]


@pytest.mark.parametrize("part", ['<img ', '<img alt="" ', 'alt="', "<a ", "<script ", "</script ", "&#", "&#0", "&#9",
                                  "&", "\t", "aPageStart", "<style>", '<img alt="x>'])
@pytest.mark.parametrize("first", ["", "<img ", "<script>", "<a ", "&#"])
def test_no_text_takes_more_than_time_in_proportion_to_its_length(first, part):
    start = time.thread_time()
    text(first + part * 40_000)
    assert time.thread_time() - start < 20, "it takes milliseconds; in the square of the length, minutes"


def test_an_image_leaves_its_first_alt_text_and_a_number_of_no_character_a_sign():
    assert text('<img src="a" alt="red" alt="blue"> saw <img src="b">') == "red saw"
    assert text(f"&#0065;&#{'0' * 5_000}66;&#{'9' * 5_000};&#1114112;C") == "AB\ufffd\ufffdC"


def test_numbers_are_written_as_they_were_given():
    values = [27.74, 1e-7, 1e16, 0.1 + 0.2, 3.0, None, float("inf"), -0.0]
    wide, narrow = (pl.Series(values, dtype=kind) for kind in (pl.Float64, pl.Float32))
    assert texts(wide).to_list() == ["27.74", "0.0000001", "10000000000000000", "0.30000000000000004", "3", None, None,
                                     "0"]
    assert texts(narrow).to_list() == ["27.74", "0.0000001", "10000000000000000", "0.3", "3", None, None, "0"]
    assert ids(pl.Series([7.1, 7.0, None], dtype=pl.Float32)).to_list() == ["7.1", "7", None]


def test_a_column_of_mixed_values():
    assert column_of("x", [7, "7", 7.0, None, b"a"]).to_list() == ["7", "7", "7", None, "a"]
    lists = column_of("x", [["a", 1], None, {"name": "c"}])
    assert lists.dtype == pl.List(pl.String) and lists.to_list() == [["a", "1"], None, ["c"]]
    mixed = column_of("x", [["a", 1], "b", None, {"name": "c"}])
    assert unmixed(mixed).to_list() == [["a", "1"], ["b"], None, ["c"]]


ANYTHING = st.one_of(st.none(), WORDS, st.integers(), st.floats(), st.booleans(), st.dates(),
                     st.lists(WORDS, max_size=2),
                     st.sampled_from([1e18, np.float32(2**25), Decimal("7.00"), UUID(int=5), b"7", {"name": "x"}]))


@settings(max_examples=300, deadline=None)
@given(values=st.lists(ANYTHING), at=st.integers(0, 5))
def test_python_values_of_any_kinds_keep_their_meaning(values, at):
    cut = [pl.DataFrame([column_of("x", part)]) for part in (values[:at], values[at:])]
    for column in (column_of("x", values), pl.concat(alike(cut))["x"]):
        assert ids(column).to_list() == [as_id(v) for v in values]
        assert texts(column).to_list() == [text(v) for v in values]
        assert is_empty(column).to_list() == [not is_nested(v) and is_empty(column_of("x", [v]))[0] for v in values]


# -- times --------------------------------------------------------------------------------------------------------


def times_of(*values, **options):
    return times(pl.Series(list(values), **options)).to_list()


def test_times_keep_their_unit_and_their_order():
    nanoseconds = 1_577_836_800_123_456_789  # more digits than a float keeps
    assert times_of(nanoseconds, 5) == [nanoseconds, 5]
    assert times_of(str(nanoseconds), " 5 ") == [nanoseconds, 5]
    assert times_of("12", "1e3", "x", "") == [12, 1000, None, None]
    assert times_of("NULL", "5") == [None, 5]
    assert times_of(12.0, 13.0) == [12, 13]
    assert times_of("12", "12.25", "12.5") == [12000, 12250, 12500]
    assert times_of(12.25, float("nan"), float("inf")) == [12250, None, None]
    assert times_of(-1.5, 1684439826.123456) == [-1500000, 1684439826123456]
    assert times_of("9000000000000000000", "1.5") == [9000000000000000000, 1]  # no room for thousandths


def floats_from(start):
    """Neighbouring floats, of which none lies between two."""
    return np.nextafter(start, np.inf, dtype=np.float64) + np.arange(100) * np.spacing(start)


EXACT = Decimal("1684439826.123456788")


@pytest.mark.parametrize("column", [
    pl.Series(floats_from(45203.83)), pl.Series(floats_from(45203.83)).cast(pl.String),  # days, as Excel has them
    pl.Series(floats_from(1684439826.123456)), pl.Series(floats_from(1684439826123456.25)),
    pl.Series([f"1684439826.{n:06}" for n in range(100)]), pl.Series([EXACT, EXACT + Decimal("1e-9")]),
    pl.Series([-2.25, -1.5, 0.0, 3.000001]), pl.Series([1.25, 7.0], dtype=pl.Float32),
    pl.Series([datetime(2020, 1, 1, microsecond=n) for n in range(100)]),
    pl.Series([1_577_836_800_000_000_000 + n for n in range(100)]).cast(pl.Datetime("ns")),
    pl.Series([f"2020-01-01T00:00:00.{n:06}" for n in range(100)]),
])
def test_no_two_times_become_one(column):
    got = times(column)
    assert got.null_count() == 0 and (got.diff().drop_nulls() > 0).all()


def test_dates_become_utc_milliseconds(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # the machine's own zone must not matter
    time.tzset()
    moment = datetime(2020, 1, 1, 12, tzinfo=UTC)
    expected = int(moment.timestamp() * 1000)
    assert times_of("2020-01-01T12:00:00", "2020-01-01 14:00:00+02:00", "2020-01-01T12:00:00.5Z", "soon") == [
        expected, expected, expected + 500, None]
    assert times_of("2020/01/01 12:00", "2020/1/1 12:00:00 UTC", "2020-1-1T12:00:00 GMT", "2020-01-01 14:00:00 +0200",
                    "1/1/2020 12:00", "2020/1-1", "2020/13/1") == [expected] * 4 + [None] * 3
    start = time.thread_time()
    assert times_of(f"2020/01/01{' ' * 50_000}x") == [None] and time.thread_time() - start < 5
    assert times_of(moment) == [expected]
    assert times_of(date(2020, 1, 1)) == [1577836800000]
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("column", [pl.Series([True]), pl.Series([b"x"]), pl.Series([["2020-01-01"]]),
                                    pl.Series([datetime(2020, 1, 1).time()])])
def test_columns_that_hold_no_times(column):
    assert times(column).to_list() == [None]
