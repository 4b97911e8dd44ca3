"""Raw files and frames -> two polars frames, whatever the source.

interactions: user_id String, item_id String, timestamp Int64 (null where the source has none), order Int64 (the
source's own order: its position column, else the row number)
items: item_id, title, brand, category String (null where unknown)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from laserrec.errors import UserError

INTERACTION_SCHEMA = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "order": pl.Int64}
ITEM_SCHEMA = {"item_id": pl.String, "title": pl.String, "brand": pl.String, "category": pl.String}


@dataclass(frozen=True)
class Raw:
    """What a reader returns."""

    interactions: pl.DataFrame
    items: pl.DataFrame
    skipped_lines: int = 0
    """Broken lines left out (on_error = skip)."""


# -- JSON lines: Amazon 2018 and 2023 ---------------------------------------------------------------------------


def read_amazon_2018(reviews: Path, metadata: Path, on_error: str = "raise") -> Raw:
    """Amazon reviews 2018 (Ni et al. 2019) as published: one JSON object a line, plain or .gz.
    Reviews: reviewerID, asin, unixReviewTime (seconds). Metadata: asin, title, brand, category or main_cat."""
    def review(o: dict) -> tuple:
        return str(o["reviewerID"]), str(o["asin"]), int(o["unixReviewTime"])

    def item(o: dict) -> tuple:
        return str(o["asin"]), _text(o.get("title")), _text(o.get("brand")), _text(o.get("category") or o.get("main_cat"))

    return _amazon(reviews, metadata, review, item, on_error)


def read_amazon_2023(reviews: Path, metadata: Path, on_error: str = "raise") -> Raw:
    """Amazon reviews 2023 (Hou et al. 2024), JSON lines, plain or .gz. Reviews: user_id, parent_asin (else asin),
    timestamp (milliseconds). Metadata: parent_asin, title, store (read as brand), categories or main_category."""
    def review(o: dict) -> tuple:
        return str(o["user_id"]), str(o.get("parent_asin") or o["asin"]), int(o["timestamp"])

    def item(o: dict) -> tuple:
        category = o.get("categories") or o.get("main_category")
        return str(o.get("parent_asin") or o["asin"]), _text(o.get("title")), _text(o.get("store")), _text(category)

    return _amazon(reviews, metadata, review, item, on_error)


def _amazon(reviews: Path, metadata: Path, review: Callable, item: Callable, on_error: str) -> Raw:
    rows, bad_reviews = _json_rows(reviews, review, on_error)
    interactions = pl.DataFrame(rows, schema=list(INTERACTION_SCHEMA.items())[:3], orient="row")
    rows, bad_items = _json_rows(metadata, item, on_error)
    items = pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")
    return _raw(interactions, items, bad_reviews + bad_items)


def _json_rows(path: Path, row: Callable[[dict], tuple], on_error: str) -> tuple[list[tuple], int]:
    rows, skipped = [], 0
    for number, line in _lines(path):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
            rows.append(row(value))
        except (ValueError, KeyError, TypeError) as error:
            if on_error == "skip":
                skipped += 1
                continue
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            hint = ""
            if line.startswith(("{'", '{"')) and "'" in line[:3]:
                hint = " (a Python literal as in the 2014 files; convert it to JSON)"
            raise UserError(f"{path}:{number}: {reason}{hint}. Mend the line, or skip broken lines "
                            "with --on-error skip") from None
    return rows, skipped


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number + 1}: not UTF-8 ({error.reason}); convert the file") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}:{number + 1}: gzip data ends or breaks here ({error}); download it again") from None


def _text(value: Any) -> str | None:
    """A list (Amazon's category path) is joined; empty is unknown."""
    if isinstance(value, list):
        value = " ".join(str(v) for v in value)
    text = " ".join(str(value).split()) if value is not None else ""
    return text or None


# -- tables: CSV, Parquet, RecBole, MovieLens ---------------------------------------------------------------------


def read_tables(interactions: Path, items: Path, columns: dict[str, str] | None = None) -> Raw:
    """CSV (.csv, .tsv, .gz), JSON lines or Parquet files. `columns` maps our names to the file's: {"user_id":
    "customer", "title": "name"}. Interactions need user_id and item_id, and may have timestamp and position;
    items need item_id and title, and may have brand and category."""
    return from_frames(_read_table(Path(interactions)), _read_table(Path(items)), columns,
                       names=(str(interactions), str(items)))


def read_recbole(interactions: Path, items: Path, columns: dict[str, str] | None = None) -> Raw:
    """RecBole atomic files: tab-separated, header `name:type`. Usual names (title, item_name, brand, categories,
    class, genre) are found; others are mapped with `columns`."""
    frames = [_strip_types(_read_table(Path(p), separator="\t")) for p in (interactions, items)]
    found = set(frames[1].columns)
    guess = {"title": ("title", "item_name", "movie_title", "name"), "brand": ("brand", "store"),
             "category": ("category", "categories", "class", "genre")}
    mapped = {ours: next(t for t in theirs if t in found) for ours, theirs in guess.items() if found & set(theirs)}
    return from_frames(*frames, {**mapped, **(columns or {})}, names=(str(interactions), str(items)))


def _strip_types(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.rename({name: name.split(":")[0] for name in frame.columns})


def read_movielens(folder: Path) -> Raw:
    """MovieLens: ml-1m's .dat files, or the .csv files of the later sets. Genres are the category."""
    folder = Path(folder)
    if (folder / "ratings.csv").is_file():
        ratings, movies = _read_table(folder / "ratings.csv"), _read_table(folder / "movies.csv")
    else:
        ratings = _read_dat(folder / "ratings.dat", ["userId", "movieId", "rating", "timestamp"])
        movies = _read_dat(folder / "movies.dat", ["movieId", "title", "genres"])
    columns = {"user_id": "userId", "item_id": "movieId", "category": "genres"}
    movies = movies.with_columns(pl.col("genres").cast(pl.String).str.replace_all("|", " ", literal=True))
    return from_frames(ratings, movies, columns, names=("ratings", "movies"))


def _read_dat(path: Path, names: list[str]) -> pl.DataFrame:
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected MovieLens' ratings and movies as .csv or .dat")
    rows = []
    for number, line in enumerate(path.read_bytes().decode("latin-1").splitlines(), 1):
        fields = line.split("::")
        if len(fields) != len(names):
            raise UserError(f"{path}:{number}: {len(fields)} fields, not {len(names)} separated by '::'")
        rows.append(fields)
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _read_table(path: Path, separator: str | None = None) -> pl.DataFrame:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            return pl.read_parquet(path)
        if name.endswith((".jsonl", ".ndjson", ".json")):
            return pl.DataFrame([json.loads(line) for _, line in _lines(path)], infer_schema_length=None)
        separator = separator or ("\t" if name.endswith(".tsv") else ",")
        return pl.read_csv(path, separator=separator, infer_schema=False, quote_char='"' if separator == "," else None)
    except (pl.exceptions.PolarsError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} could not be read: {str(error).splitlines()[0]}") from None


def from_frames(interactions: Any, items: Any, columns: dict[str, str] | None = None,
                names: tuple[str, str] = ("interactions", "items")) -> Raw:
    """Polars or pandas frames with the columns of `read_tables`. Ids may be of any type; they become strings."""
    columns = columns or {}
    interactions, items = to_polars(interactions), to_polars(items)
    acts = _pick(interactions, {"user_id", "item_id"}, {"timestamp", "position"}, columns, names[0])
    goods = _pick(items, {"item_id", "title"}, {"brand", "category"}, columns, names[1])
    for frame, name, keys in ((acts, names[0], ("user_id", "item_id")), (goods, names[1], ("item_id",))):
        for key in keys:
            _no_nulls(frame, key, name)
    acts = acts.with_columns(_timestamp(acts, names[0]).alias("timestamp"))
    if "position" in acts.columns:
        order = acts["position"].cast(pl.Float64, strict=False)
        if order.null_count():
            raise UserError(f"{names[0]}: row {_first(order.is_null())}, column position: not a number")
        acts = acts.with_columns((order.rank("dense")).cast(pl.Int64).alias("order"))
    return _raw(acts, goods, 0)


def to_polars(frame: Any) -> pl.DataFrame:
    """A polars or pandas frame as polars."""
    if isinstance(frame, pl.DataFrame):
        return frame
    if isinstance(frame, pl.LazyFrame):
        return frame.collect()
    if type(frame).__module__.split(".")[0] == "pandas":
        return pl.from_pandas(frame)
    raise UserError(f"expected a polars or pandas frame, not {type(frame).__name__}")


def _pick(frame: pl.DataFrame, needed: set[str], optional: set[str], columns: dict[str, str], name: str) -> pl.DataFrame:
    source = {ours: columns.get(ours, ours) for ours in needed | optional}
    missing = sorted(ours for ours in needed if source[ours] not in frame.columns)
    missing += sorted(o for o in optional if o in columns and columns[o] not in frame.columns and name != "items")
    if missing and (set(missing) & needed):
        wanted = ", ".join(f"{m} (looked for {source[m]!r})" for m in missing)
        raise UserError(f"{name}: column {wanted} is missing; there are: {', '.join(frame.columns)}. "
                        f"Map it: --columns {missing[0]}=YOUR_COLUMN")
    have = [ours for ours in sorted(source) if source[ours] in frame.columns]
    return frame.select(pl.col(source[ours]).alias(ours) for ours in have)


def _no_nulls(frame: pl.DataFrame, column: str, name: str) -> None:
    empty = frame[column].is_null() | (frame[column].cast(pl.String).str.strip_chars() == "")
    if empty.any():
        raise UserError(f"{name}: row {_first(empty)}, column {column}: empty id")


def _first(mask: pl.Series) -> int:
    """1-based data row of the first True."""
    return int(mask.arg_max() or 0) + 1


def _timestamp(frame: pl.DataFrame, name: str) -> pl.Series:
    """Numbers as they are (any unit, fractions cut), dates and times as epoch milliseconds."""
    if "timestamp" not in frame.columns:
        return pl.Series([None] * frame.height, dtype=pl.Int64)
    raw = frame["timestamp"]
    if raw.dtype.is_temporal():
        return raw.cast(pl.Datetime("ms")).dt.epoch("ms")
    parsed = raw.cast(pl.Float64, strict=False).cast(pl.Int64) if not raw.dtype.is_integer() else raw.cast(pl.Int64)
    if raw.dtype == pl.String and parsed.null_count() == frame.height and frame.height:
        parsed = raw.str.to_datetime(strict=False, time_unit="ms").dt.epoch("ms")
    if parsed.null_count():
        row = _first(parsed.is_null())
        raise UserError(f"{name}: row {row}, column timestamp: {raw[row - 1]!r} is neither a number nor an ISO date")
    return parsed


def _raw(interactions: pl.DataFrame, items: pl.DataFrame, skipped: int) -> Raw:
    """Common last step: types, order of appearance, text of strings, later duplicates of an item dropped."""
    if "order" not in interactions.columns:
        interactions = interactions.with_row_index("order")
    if "timestamp" not in interactions.columns:
        interactions = interactions.with_columns(pl.lit(None, pl.Int64).alias("timestamp"))
    for column in ITEM_SCHEMA:
        if column not in items.columns:
            items = items.with_columns(pl.lit(None, pl.String).alias(column))
    nested = [c for c, t in items.schema.items() if isinstance(t, pl.List)]
    items = items.with_columns(pl.col(c).cast(pl.List(pl.String)).list.join(" ") for c in nested)
    items = items.select(pl.col(c).cast(pl.String) for c in ITEM_SCHEMA)
    folded = [pl.col(c).str.replace_all(r"\s+", " ").str.strip_chars() for c in ("title", "brand", "category")]
    items = items.with_columns(folded).with_columns(
        pl.when(pl.col(c) != "").then(pl.col(c)).alias(c) for c in ("title", "brand", "category"))
    interactions = interactions.select(pl.col(c).cast(t) for c, t in INTERACTION_SCHEMA.items())
    return Raw(interactions, items.unique("item_id", keep="first", maintain_order=True), skipped)
