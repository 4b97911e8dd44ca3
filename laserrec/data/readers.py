"""One reader per published format; each returns `Raw` (two polars frames with fixed columns).

JSON lines are parsed in chunks, so that memory holds the few columns kept and never the reviews' texts. Every broken
line is a UserError naming file and line, or with on_error = "skip" is left out and counted.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from laserrec.data.raw import Raw, Table, check_on_error, from_tables
from laserrec.util.errors import UserError

_CHUNK_ROWS = 200_000
_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
_SKIP_HINT = "Mend the line, or leave broken lines out: --on-error skip"


# -- Amazon -------------------------------------------------------------------------------------------------------


def read_amazon_2018(reviews: Path | str, metadata: Path | str, on_error: str = "raise") -> Raw:
    """Amazon reviews 2018 (Ni, Li, McAuley 2019) as published: one JSON object a line, plain or .gz.

    Reviews: reviewerID, asin, unixReviewTime (seconds). Metadata: asin, title, brand, category (a path, joined with
    spaces) or else main_cat.
    """
    def review(o: dict) -> tuple:
        return _id(o, "reviewerID"), _id(o, "asin"), _integer(o, "unixReviewTime")

    def item(o: dict) -> tuple:
        category = o.get("category") or o.get("main_cat")
        return _id(o, "asin"), _text(o.get("title")), _text(o.get("brand")), _text(category)

    return _amazon(reviews, metadata, review, item, on_error)


def read_amazon_2023(reviews: Path | str, metadata: Path | str, on_error: str = "raise") -> Raw:
    """Amazon reviews 2023 (Hou et al. 2024), JSON lines, plain or .gz.

    Reviews: user_id, parent_asin (else asin), timestamp (milliseconds). Metadata: parent_asin (else asin), title,
    store (read as brand), categories (a path, joined with spaces) or else main_category.
    """
    def review(o: dict) -> tuple:
        return _id(o, "user_id"), _id(o, "parent_asin", "asin"), _integer(o, "timestamp")

    def item(o: dict) -> tuple:
        category = o.get("categories") or o.get("main_category")
        return _id(o, "parent_asin", "asin"), _text(o.get("title")), _text(o.get("store")), _text(category)

    return _amazon(reviews, metadata, review, item, on_error)


def _amazon(reviews: Path | str, metadata: Path | str, review: Callable, item: Callable, on_error: str) -> Raw:
    acts = _json_table(Path(reviews), review, {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64},
                       on_error)
    texts = dict.fromkeys(("item_id", "title", "brand", "category"), pl.String)
    return from_tables(acts, _json_table(Path(metadata), item, texts, on_error), on_error=on_error)


def _id(o: dict, *names: str) -> str:
    """The first of `names` that holds something."""
    value = next((o[name] for name in names if o.get(name) not in (None, "")), None)
    if value is None or isinstance(value, (list, dict, bool)) or not str(value).strip():
        raise ValueError(f"no {' or '.join(names)} in it (there are: {', '.join(o)})")
    return str(value)


def _integer(o: dict, name: str) -> int:
    if o.get(name) is None:
        raise ValueError(f"no {name} in it (there are: {', '.join(o)})")
    try:
        value = int(o[name])
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} is no whole number: {str(o[name])[:40]!r}") from None
    if abs(value) >= 2**63:
        raise ValueError(f"{name} is out of range: {value}")
    return value


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(str(v) for v in value if v is not None)
    return None if value is None else str(value)


# -- JSON lines ---------------------------------------------------------------------------------------------------


def _json_table(path: Path, row: Callable[[dict], tuple], schema: dict[str, Any], on_error: str) -> Table:
    """One tuple per line in `schema`'s columns, collected chunk by chunk."""
    check_on_error(on_error)
    skipped: list[str] = []
    rows = _json_rows(path, row, on_error, skipped)
    chunks = []
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        chunks.append(pl.DataFrame(chunk, schema=schema, orient="row"))
    if not chunks:
        raise UserError(skipped[0] if skipped else f"{path} is empty")
    return Table(pl.concat(chunks), str(path), lambda n: f"{path}:{_nth_line(path, n)}", len(skipped))


def _json_rows(path: Path, row: Callable[[dict], tuple], on_error: str, skipped: list[str]) -> Iterator[tuple]:
    for number, line in lines(path):
        try:
            yield row(json_object(line))
        except ValueError as error:
            message = f"{path}:{number}: {_reason(error)}. {_SKIP_HINT}"
            if on_error == "raise":
                raise UserError(message) from None
            skipped.append(message)


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start + 1}"
    # json knows only this line, so its own message would say "line 1".
    return f"not JSON: {error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def json_object(line: bytes) -> dict:
    text = line.decode("utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if re.match(r"\s*\{\s*u?'", text):
            raise ValueError("a Python literal as in the 2014 files, not JSON; convert the file with "
                             "json.dumps(ast.literal_eval(line))") from None
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object {...}")
    if "\\ud" in text or "\\uD" in text:  # half a surrogate pair can be written in JSON but not in UTF-8
        value = {k: _whole_characters(v) for k, v in value.items()}
    return value


def _whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return [_whole_characters(v) for v in value] if isinstance(value, list) else value


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of every line that is not blank; .gz is unpacked on the way."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: the gzip data breaks off here ({error}); get the file again") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def _nth_line(path: Path, row: int) -> int:
    return next((number for number, _ in islice(lines(path), row, None)), 0)


# -- CSV, Parquet, JSON lines with a column map -----------------------------------------------------------------------


def read_tables(interactions: Path | str, items: Path | str, columns: Mapping[str, str] | None = None,
                on_error: str = "raise") -> Raw:
    """Files by their endings: .csv, .tsv, .jsonl, .ndjson, .json (objects line by line), each also .gz, or .parquet.

    Columns and `columns` as in `raw.from_frames`.
    """
    return from_tables(read_table(Path(interactions), on_error), read_table(Path(items), on_error), columns, on_error)


def read_table(path: Path, on_error: str = "raise", separator: str | None = None) -> Table:
    """One file as it is: all columns, text files' values as text."""
    check_on_error(on_error)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        try:
            return Table(pl.read_parquet(path), str(path))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{path} is not readable as Parquet: {str(error).splitlines()[0]}") from None
    if name.endswith(_JSON_ENDINGS):
        return _any_json_table(path, on_error)
    if not separator and not name.endswith((".csv", ".tsv", ".txt")):
        raise UserError(f"{path}: unknown ending; there are .csv, .tsv, .jsonl, .json, each also .gz, and .parquet")
    return _read_delimited(path, separator or ("\t" if name.endswith(".tsv") else ","), on_error)


def _any_json_table(path: Path, on_error: str) -> Table:
    """All keys of all lines as text columns (lists joined)."""
    skipped: list[str] = []
    rows = _json_rows(path, lambda o: ({k: _text(v) for k, v in o.items()},), on_error, skipped)
    chunks = []
    while chunk := [o for (o,) in islice(rows, _CHUNK_ROWS)]:
        keys = dict.fromkeys(k for o in chunk for k in o)
        chunks.append(pl.DataFrame(chunk, schema=dict.fromkeys(keys, pl.String)))
    if not chunks:
        raise UserError(skipped[0] if skipped else f"{path} is empty")
    return Table(pl.concat(chunks, how="diagonal"), str(path), lambda n: f"{path}:{_nth_line(path, n)}", len(skipped))


def _read_delimited(path: Path, separator: str, on_error: str) -> Table:
    """polars reads it; where polars gives up, a slow reading finds the lines at fault, which polars doesn't name."""
    quote = None if separator == "\t" and path.name.removesuffix(".gz").endswith((".inter", ".item")) else '"'
    try:
        frame = pl.read_csv(path, separator=separator, infer_schema=False, quote_char=quote)
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
        return Table(frame, str(path), lambda n: f"{path}:{_nth_record(path, separator, quote, n)}")
    except (pl.exceptions.PolarsError, OSError):
        rows, skipped, first = _slow_delimited(path, separator, quote, on_error)
    header, *body = [fields for _, fields in rows]
    if len(set(header)) < len(header):
        raise UserError(f"{path}:1: a column name stands twice in the header: {', '.join(header)}")
    frame = pl.DataFrame([[f or None for f in fields] for fields in body], orient="row",
                         schema=dict.fromkeys(header, pl.String))
    if frame.is_empty() and first:
        raise UserError(first)
    return Table(frame, str(path), lambda n: f"{path}:{rows[n + 1][0]}", skipped)


def _slow_delimited(path: Path, separator: str, quote: str | None, on_error: str) -> tuple[list, int, str | None]:
    rows: list[tuple[int, list[str]]] = []
    skipped, first = 0, None
    for number, fields in _records(path, separator, quote):
        why = fields if isinstance(fields, str) else None
        if why is None and rows and len(fields) != len(rows[0][1]):
            why = f"{len(fields)} fields, the header has {len(rows[0][1])}"
        if why is None:
            rows.append((number, fields))
            continue
        message = f"{path}:{number}: {why}. {_SKIP_HINT}"
        if on_error == "raise" or not rows:
            raise UserError(message)
        skipped, first = skipped + 1, first or message
    if not rows:
        raise UserError(f"{path} is empty; its first line should name the columns")
    return rows, skipped, first


def _records(path: Path, separator: str, quote: str | None) -> Iterator[tuple[int, list[str] | str]]:
    """(line number, fields) per record, or (line number, what is wrong)."""
    bad: list[int] = []

    def text() -> Iterator[str]:
        for number, line in lines(path):
            last[0] = number
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                bad.append(number)

    last = [0]
    options = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    reader = csv.reader(text(), delimiter=separator, **options)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield last[0], str(error)
            continue
        yield from ((number, "not UTF-8") for number in bad)
        bad.clear()
        if fields is None:
            return
        yield last[0], fields


def _nth_record(path: Path, separator: str, quote: str | None, row: int) -> int:
    return next((number for number, _ in islice(_records(path, separator, quote), row + 1, None)), 0)


# -- RecBole and MovieLens ------------------------------------------------------------------------------------------

_RECBOLE_NAMES = {
    "interactions.user_id": ("user_id", "session_id"),
    "interactions.item_id": ("item_id", "product_id", "movie_id", "business_id", "artist_id"),
    "interactions.timestamp": ("timestamp", "time", "date"),
    "items.item_id": ("item_id", "product_id", "movie_id", "business_id", "artist_id"),
    "items.title": ("title", "item_name", "movie_title", "product_name", "artist_name", "name"),
    "items.brand": ("brand", "store", "manufacturer"),
    "items.category": ("category", "categories", "class", "genre", "genres", "tags"),
}


def read_recbole(interactions: Path | str, items: Path | str, columns: Mapping[str, str] | None = None,
                 on_error: str = "raise") -> Raw:
    """RecBole's atomic files `.inter` and `.item`: tab-separated, header `name:type`.

    The names RecBole's own data sets use are found (title, item_name, movie_title ...; categories, class, genre ...);
    `columns` maps others by their names without the type. Times in `.inter` may be floats (see `raw`).
    """
    acts, goods = (_without_types(read_table(Path(p), on_error, separator="\t")) for p in (interactions, items))
    if "item_id_list" in acts.frame.columns:
        raise UserError(f"{acts.name}: holds augmented sequences (item_id_list); give the .inter file with one "
                        "interaction a line")
    found, override = {}, dict(columns or {})
    for ours, theirs in _RECBOLE_NAMES.items():
        kind, _, column = ours.partition(".")
        have = (acts if kind == "interactions" else goods).frame.columns
        name = next((name for name in theirs if name in have), None)
        if name and column not in override:
            found[ours] = name
    return from_tables(acts, goods, {**found, **override}, on_error)


def _without_types(table: Table) -> Table:
    names = [name.split(":")[0] for name in table.frame.columns]
    if len(set(names)) < len(names):
        raise UserError(f"{table.name}:1: a column name stands twice in the header: {', '.join(names)}")
    frame = table.frame.rename(dict(zip(table.frame.columns, names, strict=True)))
    return Table(frame, table.name, table.locate, table.skipped)


def read_movielens(folder: Path | str, on_error: str = "raise") -> Raw:
    """A MovieLens folder: ratings.csv and movies.csv (ml-latest, ml-20m ...) or ratings.dat and movies.dat (ml-1m,
    ml-10m; UTF-8 or Latin-1). The genres are the category, every rating is an interaction, times are seconds."""
    folder = Path(folder)
    if (folder / "ratings.csv").is_file():
        ratings, movies = read_table(folder / "ratings.csv", on_error), read_table(folder / "movies.csv", on_error)
    elif (folder / "ratings.dat").is_file():
        ratings = _read_dat(folder / "ratings.dat", ["userId", "movieId", "rating", "timestamp"], on_error)
        movies = _read_dat(folder / "movies.dat", ["movieId", "title", "genres"], on_error)
    else:
        raise UserError(f"{folder} holds neither ratings.csv nor ratings.dat; give the unpacked MovieLens folder")
    columns = {"user_id": "userId", "item_id": "movieId"}
    if "genres" in movies.frame.columns:
        columns["category"] = "genres"
        genres = pl.col("genres").str.replace_all("|", " ", literal=True).replace("(no genres listed)", None)
        movies = Table(movies.frame.with_columns(genres), movies.name, movies.locate, movies.skipped)
    return from_tables(ratings, movies, columns, on_error)


def _read_dat(path: Path, names: list[str], on_error: str) -> Table:
    rows, numbers, skipped = [], [], 0
    for number, line in lines(path):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        fields = text.rstrip("\r\n").split("::")
        if len(fields) == len(names):
            rows.append(fields)
            numbers.append(number)
            continue
        if on_error == "raise":
            raise UserError(f"{path}:{number}: {len(fields)} fields, not {len(names)} separated by '::'. {_SKIP_HINT}")
        skipped += 1
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
    return Table(frame, str(path), lambda n: f"{path}:{numbers[n]}", skipped)
