"""One rule for ids, one for texts, one for times: the same value means the same in files, frames, Python and HTTP.

Each rule comes for one value (`item_id`, `text`) and for a column (`ids`, `texts`, `times`); both give the same.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import polars as pl

from laserrec.util.errors import UserError

SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() or c < " ") + "\x7f\u200b\ufeff"
"""White space, control characters, the zero-width space and the byte order mark."""

NULLS = ("NULL", "null", "None", "NaN", "nan", "NAN", "<NA>", "NaT", "N/A", "n/a", "#N/A", "\\N")
"""Texts that databases, pandas and spreadsheets write for a missing value. In other writings (Null, Nan, none) they may
be somebody's name."""

# -- ids ----------------------------------------------------------------------------------------------------------

_WHOLE = r"^(-?[1-9][0-9]*|0)\.0+$"
_ZERO = r"^-0\.0+$"


def item_id(value: Any) -> str:
    """The id as text, of an item or a user: 7, 7.0, "7.0" and " 7 " are "7". Leading zeros and case of text stay.

    Raises UserError for what is no id (see `as_id`).
    """
    name = as_id(value)
    if name is None:
        raise UserError(f"{why_no_id(value)} (found {short(value)}); ids are text or whole numbers")
    return name


def item_ids_of(values: Any) -> list[str]:
    """`item_id` of each value of a list, array or Series. Raises UserError for anything else."""
    if hasattr(values, "columns"):
        raise UserError(f"expected a list of item ids, not {short(values)}; give its column item_id")
    if not is_nested(values) or isinstance(values, Mapping):
        raise UserError(f"expected a list of item ids, not {short(values)}")
    return [item_id(value) for value in values]


def as_id(value: Any) -> str | None:
    """`item_id`, or None where the value is missing (NULLS too), empty, true or false, a date, a list or dict, or
    a float so large that its last digits are lost."""
    if isinstance(value, str):
        name = _sound(value).strip(SPACE)
        if name.endswith("0") and "." in name:
            name = re.sub(_ZERO, "0", re.sub(_WHOLE, r"\1", name))
        return None if name in ("", *NULLS) else name
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return _number(value) if abs(value) < _exact_below(value) else None
    if isinstance(value, bytes):
        try:
            return as_id(value.decode("utf-8"))
        except UnicodeDecodeError:
            return None
    if isinstance(value, Decimal):
        return _number(value)
    return str(value) if isinstance(value, UUID) else None


def ids(column: pl.Series) -> pl.Series:
    """`as_id` of every value, as String."""
    kind = column.dtype
    if is_mixed(kind):
        return column.struct.field(_ID).alias(column.name)
    if kind.is_float():
        wide = column.cast(pl.Float64)
        limit = 2.0 ** {pl.Float64: 53, pl.Float32: 24}.get(type(kind), 11)
        exact = wide.set(~(wide.abs() < limit).fill_null(False), None)
        if (exact.drop_nulls() % 1 == 0).all():
            return exact.cast(pl.Int64).cast(pl.String)
        return _each(column, as_id)
    if kind.is_integer():
        return column.cast(pl.String)
    if kind in (pl.String, pl.Categorical, pl.Enum):
        name = column.cast(pl.String).str.strip_chars(SPACE)
        if name.str.contains(".", literal=True).any():  # looking is much faster than replacing
            name = name.str.replace(_WHOLE, "$1").str.replace(_ZERO, "0")
        return name.set(name.is_in(["", *NULLS]).fill_null(False), None)
    if kind in (pl.Binary, pl.Object) or kind.is_decimal():
        return _each(column, as_id)
    return pl.Series(column.name, [None] * len(column), dtype=pl.String)


def why_no_id(value: Any) -> str:
    """What is wrong with a value that `as_id` refuses."""
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        return "a float too large to hold all digits of an id: read this column as text"
    if is_nested(value):
        return "a list or dict, not an id"
    if isinstance(value, str) and value.strip(SPACE) in NULLS:
        return "a missing value in words, not an id"
    return "empty id" if names_nothing(value) else "not an id"


def names_nothing(value: Any) -> bool:
    """Whether there is no value: it is missing, an empty text or one of NULLS."""
    return is_missing(value) or (isinstance(value, str) and value.strip(SPACE) in ("", *NULLS))


def _exact_below(value: Any) -> float:
    """Whole floats below it have all their digits."""
    return 2.0 ** (np.finfo(value.dtype).nmant + 1) if isinstance(value, np.floating) else 2.0**53


def _number(value: Any) -> str | None:
    """A float's shortest decimal in its own precision, or a Decimal's digits, without exponent and ".0"; None for NaN
    and infinity."""
    if not math.isfinite(value):
        return None
    if isinstance(value, Decimal):
        return str(int(value)) if value == int(value) else format(value, "f").rstrip("0")
    if value == int(value) and abs(value) < 2**53:
        return str(int(value))
    text = str(value)  # much faster, where it has no exponent
    return np.format_float_positional(value, trim="-") if "e" in text else text


def _each(column: pl.Series, rule: Any) -> pl.Series:
    # Of narrow floats Python has none: as floats of 64 bits they would get digits that were never given.
    values = column.to_numpy() if column.dtype.is_float() and column.dtype != pl.Float64 else column.to_list()
    return pl.Series(column.name, [rule(v) for v in values], dtype=pl.String)


def short(value: Any) -> str:
    """A value in a message: on one line, and not all of a long one."""
    if hasattr(value, "columns"):
        return f"a {type(value).__name__}"
    value = value.to_list() if isinstance(value, pl.Series) else value
    return " ".join(repr(value).split())[:80]


# -- texts --------------------------------------------------------------------------------------------------------

_NAMES = ("name", "title", "label", "text", "value")
_TAGS = ("a|abbr|b|big|br|center|code|dd|div|dl|dt|em|font|form|h[1-6]|hr|i|iframe|img|input|label|li|link|meta|nobr|"
         "noscript|ol|option|p|pre|s|script|section|select|small|span|strike|strong|style|sub|sup|table|tbody|td|th|"
         "thead|tr|tt|u|ul")
_BLOCK = re.compile(r"<(style|script)\b.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
_IMAGE = re.compile(r"<img\b[^<>]*>", re.IGNORECASE)
_ALT = re.compile(r"\balt=\"([^\"]*)\"", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_OPEN_TAG = re.compile(rf"<(?:{_TAGS})\s[^<>]*$", re.IGNORECASE)
_ZEROS, _NO_CHARACTER = re.compile("&#0+(?=[0-9])"), re.compile("&#[0-9]{8,};?")
_PAGE_CODE = r"aPageStart|getTime\(\)|P\.when\("
_MARKED = f"[&<]|{_PAGE_CODE}"


def text(value: Any) -> str | None:
    """Readable text, None where nothing readable is left.

    Lists at any depth are joined with spaces; of a dict its name (the first of name, title, label, text, value), else
    all its values. HTML entities are unescaped; style and script blocks are dropped; known HTML tags are dropped and
    their content kept (an image leaves its alt text), "<" otherwise stays. A text that is a page's own code instead of
    words (Amazon 2018 has titles like "var aPageStart = (new Date()).getTime();") is unknown. White space and control
    characters become single spaces.
    """
    plain = flat(value)
    if plain is None:
        return None
    if re.search(_MARKED, plain):
        plain = _without_markup(plain)
    return re.sub(f"[{SPACE}]+", " ", plain).strip(" ") or None


def texts(column: pl.Series) -> pl.Series:
    """`text` of every value, as String."""
    column = unmixed(column)
    kind = column.dtype
    if kind == pl.List(pl.String):
        joined = column.list.drop_nulls().list.join(" ")
    elif kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum, pl.Null):
        joined = column.cast(pl.String)
    else:
        joined = _each(column, flat)
    marked = joined.str.contains(_MARKED).fill_null(False)
    if marked.any():
        plain = [_without_markup(t) for t in joined.filter(marked).to_list()]
        joined = joined.clone().scatter(marked.arg_true(), plain)
    folded = joined.str.replace_all(f"[{SPACE}]+", " ").str.strip_chars(" ")
    return folded.set((folded == "").fill_null(False), None)


def flat(value: Any) -> str | None:
    """Any value as one line of raw text, not yet cleaned; None where it is missing."""
    if isinstance(value, str):
        return _sound(value)
    if is_missing(value):
        return None
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (float, np.floating, Decimal)):
        return _number(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if is_nested(value):
        return " ".join(parts(value))
    return str(value)


def parts(value: Any) -> list[str]:
    """The texts that a list or dict holds, raw; those that are missing are left out."""
    if isinstance(value, Mapping):
        named = next((value[n] for n in _NAMES if not is_missing(value.get(n))), None)
        value = value.values() if named is None else [named]
    return [t for v in value if (t := flat(v)) is not None]


def is_nested(value: Any) -> bool:
    """Whether it holds several values: a list, tuple, set, dict, array or series."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def is_missing(value: Any) -> bool:
    """None, NaN, pandas' NA and NaT."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (
        isinstance(value, (float, np.floating)) and math.isnan(value))


def _sound(text: str) -> str:
    """Half a surrogate pair, which UTF-8 can't hold, becomes the replacement character."""
    if text.isascii() or not re.search("[\ud800-\udfff]", text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _without_markup(text: str) -> str:
    """Each step takes time in proportion to the text, whatever stands in it."""
    # html.unescape can't read a number of thousands of digits.
    text = html.unescape(_NO_CHARACTER.sub("\ufffd", _ZEROS.sub("&#", text)))
    text = _OPEN_TAG.sub(" ", _TAG.sub(" ", _IMAGE.sub(_alt, _BLOCK.sub(" ", text))))
    # A script cut out above took its code along; what still looks like code is the text itself.
    return "" if re.search(_PAGE_CODE, text) else text


def _alt(image: re.Match[str]) -> str:
    """An image's alt text; the image itself where it has none."""
    found = _ALT.search(image[0])
    return image[0] if found is None else found[1]


# -- columns of Python values -------------------------------------------------------------------------------------

_PLAIN, _ALONE, _ID = "laserrec: as text", "laserrec: if no list", "laserrec: as id"


def column_of(name: str, values: Iterable[Any]) -> pl.Series:
    """A column of Python values of any kinds: String, or List(String) where the values are lists or dicts.

    Where that would hide which values are no ids (lists among texts; true, dates and large floats, which have a text),
    it is a struct of three readings of each value, which this module's rules know; `unmixed` is all that others need.
    """
    values = list(values)
    nested = [is_nested(v) for v in values]
    as_texts = pl.Series(name, [None if n else flat(v) for v, n in zip(values, nested, strict=True)], dtype=pl.String)
    as_lists = as_texts
    if any(nested):
        lists = [parts(v) if n else None if t is None else [t]
                 for v, n, t in zip(values, nested, as_texts.to_list(), strict=True)]
        as_lists = pl.Series(name, lists, dtype=pl.List(pl.String))
    odd = {type(v) for v in values} - {str, int, type(None)}
    if as_texts.null_count() == len(values) or not (any(nested) or any(_hides(v) for v in values if type(v) in odd)):
        return as_lists
    return _mixed(as_lists, as_texts, pl.Series([as_id(v) for v in values], dtype=pl.String))


def _hides(value: Any) -> bool:
    """Whether its text does not show that it is no id."""
    return as_id(value) is None and flat(value) is not None


def _mixed(as_lists: pl.Series, as_texts: pl.Series, as_ids: pl.Series) -> pl.Series:
    return pl.DataFrame([as_lists.alias(_PLAIN), as_texts.alias(_ALONE), as_ids.alias(_ID)]).to_struct(as_lists.name)


def is_mixed(kind: pl.DataType) -> bool:
    """Whether a column is such a struct."""
    return isinstance(kind, pl.Struct) and [f.name for f in kind.fields] == [_PLAIN, _ALONE, _ID]


def unmixed(column: pl.Series) -> pl.Series:
    """A column as it is, a struct of `column_of` as String or List(String)."""
    return column.struct.field(_PLAIN).alias(column.name) if is_mixed(column.dtype) else column


def value_at(column: pl.Series, row: int) -> Any:
    """One value for a message, as a Python value."""
    value = column[row]
    if is_mixed(column.dtype) and isinstance(value, dict):
        alone = value[_ALONE]
        value = value[_PLAIN] if alone is None else alone if value[_ID] is not None else _unwritten(alone)
    return value.to_list() if isinstance(value, pl.Series) else value


def _unwritten(text: str) -> Any:
    """What is no id, from its text."""
    try:
        return text == "true" if text in ("true", "false") else float(text)
    except ValueError:
        return text


def alike(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    """Frames with columns of `column_of`, such as parts of one file, with one type per column."""
    for name in dict.fromkeys(name for frame in frames for name in frame.columns):
        columns = [frame[name] for frame in frames if name in frame.columns]
        if len({c.dtype for c in columns}) < 2 or not all(_is_ours(c.dtype) for c in columns):
            continue
        full = {c.dtype for c in columns if c.null_count() < len(c)} or {columns[0].dtype}
        lists = any(unmixed(c).dtype != pl.String for c in columns)
        frames = [f.with_columns(_as_mixed(f[name], lists) if len(full) > 1 else _typed(f[name], *full))
                  if name in f.columns else f for f in frames]
    return frames


def _is_ours(kind: pl.DataType) -> bool:
    return kind in (pl.String, pl.List(pl.String)) or is_mixed(kind)


def _typed(column: pl.Series, kind: pl.DataType) -> pl.Series:
    """A column of another type holds nothing."""
    return column if column.dtype == kind else pl.Series(column.name, [None] * len(column), dtype=kind)


def _as_mixed(column: pl.Series, lists: bool) -> pl.Series:
    """A column of `column_of` as its struct. lists: `unmixed` of it shall be lists."""
    as_lists = unmixed(column)
    nothing = pl.Series([None] * len(column), dtype=pl.String)
    alone = nothing if as_lists.dtype != pl.String else column
    if is_mixed(column.dtype):
        alone = column.struct.field(_ALONE)
    as_ids = ids(column)
    if lists and as_lists.dtype == pl.String:
        value = pl.col(as_lists.name)
        as_lists = as_lists.to_frame().select(pl.when(value.is_not_null()).then(pl.concat_list(value))).to_series()
    return _mixed(as_lists.alias(column.name), alone, as_ids)


# -- times --------------------------------------------------------------------------------------------------------

_DATE = re.compile(r"^(\d{4})([-/])(\d{1,2})\2(\d{1,2})(?!\d)")
_ZONE = re.compile(r"(?<!\s)\s+(?:UTC|GMT|([+-]\d\d:?\d\d))$")
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
_UNITS = {"seconds": 1e8, "milliseconds": 1e11, "microseconds": 1e14, "nanoseconds": 1e17}
"""Since 1970, from 1973 on: what lies within a factor of 100 above, up to 2286, looks like it."""


def times(column: pl.Series) -> pl.Series:
    """Int64 per value, null where it can't be read as a time.

    Integers in any unit are kept. Where a number has a fraction, all are multiplied by 1000, or by as many thousands as
    it takes to keep their order. Dates and ISO 8601 text become epoch milliseconds, or micro- or nanoseconds where they
    have such, read as UTC where they name no zone. One column has one unit; only the order of times is ever used.
    """
    if is_mixed(column.dtype):
        column = column.struct.field(_ALONE).alias(column.name)
    if column.dtype == pl.Date:
        return column.cast(pl.Datetime("ms")).dt.epoch("ms")
    if isinstance(column.dtype, pl.Datetime):
        return _in_milliseconds(column.to_physical(), column.dtype.time_unit)
    if column.dtype in (pl.String, pl.Categorical, pl.Enum):
        text = column.cast(pl.String).str.strip_chars(SPACE)
        first = text.filter(~is_empty(text)).head(1)
        if first.cast(pl.Float64, strict=False).null_count():
            return _iso(text)
        return _whole(text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False))
    if column.dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    if column.dtype.is_decimal():
        digits = column.to_physical().cast(pl.Int64, strict=False)
        return digits if digits.null_count() == column.null_count() else _whole(_nulls(column), column.cast(pl.Float64))
    return _whole(_nulls(column), column.cast(pl.Float64)) if column.dtype.is_float() else _nulls(column)


def holds_dates(column: pl.Series) -> bool:
    """Whether it is a column of dates, by its type or its first value."""
    if column.dtype in (pl.Date, pl.Datetime):
        return column.null_count() < len(column)
    if column.dtype != pl.String:
        return False
    first = column.filter(~is_empty(column)).head(1)
    return first.cast(pl.Float64, strict=False).null_count() == 1 and times(first).null_count() == 0


def is_empty(column: pl.Series) -> pl.Series:
    """Boolean per value: null, NaN, text of white space alone, or one of NULLS."""
    if is_mixed(column.dtype):
        alone, lists = column.struct.field(_ALONE), column.struct.field(_PLAIN)
        return is_empty(alone) & (alone.is_not_null() | lists.is_null())
    if column.dtype == pl.String:
        return column.str.strip_chars(SPACE).is_in(["", *NULLS]).fill_null(True)
    return column.is_null() | column.is_nan().fill_null(True) if column.dtype.is_float() else column.is_null()


def epoch_units(column: pl.Series) -> dict[str, int]:
    """How many numbers of a column of times look like which unit since 1970; none where some look like no unit."""
    if is_mixed(column.dtype):
        column = column.struct.field(_ALONE)
    if not (column.dtype == pl.String or column.dtype.is_numeric()):
        return {}
    number = column.cast(pl.Float64, strict=False)
    counts = {unit: int(number.is_between(low, 100 * low).sum()) for unit, low in _UNITS.items()}
    strange = int((number >= min(_UNITS.values())).sum()) > sum(counts.values())
    return {} if strange else {unit: count for unit, count in counts.items() if count}


def _whole(whole: pl.Series, number: pl.Series) -> pl.Series:
    """Numbers as Int64 in their order. whole: those that were read without the way by floats, which have too few digits
    for nanoseconds since 1970."""
    number = number.set(~number.is_finite().fill_null(False), None)
    floor = number.floor()
    part = number - floor  # exact, and so is floor: their products with a power of 10 keep what one float would lose
    floor = pl.select(pl.coalesce(whole, floor.cast(pl.Int64, strict=False))).to_series()
    if not (part > 0).any():
        return floor
    peak, scaled = int(floor.drop_nulls().abs().to_numpy().max(initial=0)) + 1, floor
    for digits in range(3, 19, 3):
        if peak * 10**digits >= 2**63:
            break
        steps = (part * 10**digits).round()
        scaled = floor * 10**digits + steps.cast(pl.Int64).fill_null(0)
        if (steps / 10**digits + number.floor() == number).all():
            break
    return scaled


def _in_milliseconds(times: pl.Series, unit: str) -> pl.Series:
    """Int64 of a finer unit in milliseconds, where that loses nothing."""
    for _ in range(("ms", "us", "ns").index(unit)):
        if (times % 1000 != 0).any():
            break
        times = times // 1000
    return times


def _nulls(column: pl.Series) -> pl.Series:
    return pl.Series(column.name, [None] * len(column), dtype=pl.Int64)


def _as_iso(date: str) -> str:
    """A date with the year first as ISO 8601: 2023/1/4, 2023-01-04 10:00:00 UTC, 2023-01-04 10:00:00 +0100."""
    date = _DATE.sub(lambda found: f"{found[1]}-{found[3]:0>2}-{found[4]:0>2}", date)
    return _ZONE.sub(lambda found: found[1] or "Z", date)


def _iso(text: pl.Series) -> pl.Series:
    def microseconds(value: str) -> int | None:
        for form in (str, _as_iso):  # most are ISO 8601, and to make it of what is costs time
            try:
                moment = datetime.fromisoformat(form(value))
            except ValueError:
                continue
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            return (moment - _EPOCH) // _MICROSECOND
        return None

    known = {value: microseconds(value) for value in text.drop_nulls().unique().to_list()}
    return _in_milliseconds(text.replace_strict(known, default=None, return_dtype=pl.Int64), "us")
