"""One reader per published format; each returns `Raw` (two polars frames with fixed columns)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import polars as pl

from laserrec.data.clean import column_of
from laserrec.data.files import SKIP_HINT, FileOptions, Table, lines, read_json_lines, read_parts, read_table
from laserrec.data.raw import Raw, column_map, from_tables
from laserrec.util.errors import UserError

_PLAIN = FileOptions()

# -- Amazon: our column -> their keys, of which the first that holds something counts ---------------------------------

_REVIEWS_2018 = {"user_id": ("reviewerID",), "item_id": ("asin",), "timestamp": ("unixReviewTime",)}
_ITEMS_2018 = {"item_id": ("asin",), "title": ("title",), "brand": ("brand",), "category": ("category", "main_cat")}
_REVIEWS_2023 = {"user_id": ("user_id",), "item_id": ("parent_asin", "asin"), "timestamp": ("timestamp",)}
_ITEMS_2023 = {"item_id": ("parent_asin", "asin"), "title": ("title",), "brand": ("store",),
               "category": ("categories", "main_category")}


def read_amazon_2018(reviews: Path | str, metadata: Path | str, options: FileOptions = _PLAIN) -> Raw:
    """Amazon reviews 2018 (Ni, Li, McAuley 2019) as published: one JSON object a line, plain or .gz.

    Reviews: reviewerID, asin, unixReviewTime (seconds). Metadata: asin, title, brand, category (a path, joined with
    spaces) or else main_cat.
    """
    acts, goods = _amazon(reviews, _REVIEWS_2018, options), _amazon(metadata, _ITEMS_2018, options)
    return from_tables(acts, goods, on_error=options.on_error)


def read_amazon_2023(reviews: Path | str, metadata: Path | str, options: FileOptions = _PLAIN) -> Raw:
    """Amazon reviews 2023 (Hou et al. 2024), JSON lines, plain or .gz.

    Reviews: user_id, parent_asin (else asin), timestamp (milliseconds). Metadata: parent_asin (else asin), title,
    store (read as brand), categories (a path, joined with spaces) or else main_category.
    """
    acts, goods = _amazon(reviews, _REVIEWS_2023, options), _amazon(metadata, _ITEMS_2023, options)
    return from_tables(acts, goods, on_error=options.on_error)


def _amazon(path: Path | str, columns: Mapping[str, tuple[str, ...]], options: FileOptions) -> Table:
    def row(o: dict) -> list:
        if not o.keys() & set(chain(*columns.values())):
            raise ValueError(f"none of {', '.join(chain(*columns.values()))} in it (there are: {', '.join(o)})")
        return [next((o[key] for key in keys if o.get(key) not in (None, "", [])), None) for keys in columns.values()]

    def make(rows: list[list]) -> pl.DataFrame:
        return pl.DataFrame([column_of(name, [row[at] for row in rows]) for at, name in enumerate(columns)])

    return read_parts(path, lambda part: read_json_lines(part, options, make, row))


# -- tables with a column map -------------------------------------------------------------------------------------


def read_tables(interactions: Path | str, items: Path | str | None = None, columns: Mapping[str, str] | None = None,
                options: FileOptions = _PLAIN, extra: Sequence[str] = ()) -> Raw:
    """Tables of any ending that `files.read_table` reads. Columns, `items`, `columns` and `extra` as in
    `raw.from_frames`."""
    goods = None if items is None else read_table(items, options)
    return from_tables(read_table(interactions, options), goods, columns, options.on_error, extra)


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


def read_recbole(interactions: Path | str, items: Path | str | None = None, columns: Mapping[str, str] | None = None,
                 options: FileOptions = _PLAIN, extra: Sequence[str] = ()) -> Raw:
    """RecBole's atomic files `.inter` and `.item` (None: items have no text): tab-separated, header `name:type`.

    The names RecBole's own data sets use are found (title, item_name, movie_title ...; categories, class, genre ...);
    `columns` maps others by their names without the type. Times in `.inter` may be floats (see `clean.times`).
    """
    acts = _without_types(read_table(interactions, options))
    goods = None if items is None else _without_types(read_table(items, options))
    if "item_id_list" in acts.frame.columns:
        raise UserError(f"{acts.name}: holds augmented sequences (item_id_list); give the .inter file with one "
                        "interaction a line")
    found, override = {}, column_map(columns)
    for ours, theirs in _RECBOLE_NAMES.items():
        kind, _, column = ours.partition(".")
        have = (acts if kind == "interactions" or goods is None else goods).frame.columns
        name = next((name for name in theirs if name in have), None)
        if name and column not in override:
            found[ours] = name
    return from_tables(acts, goods, {**found, **override}, options.on_error, extra)


def _without_types(table: Table) -> Table:
    names = [name.split(":")[0] for name in table.frame.columns]
    if len(set(names)) < len(names):
        raise UserError(f"{table.name}:1: a column name stands twice in the header: {', '.join(names)}")
    frame = table.frame.rename(dict(zip(table.frame.columns, names, strict=True)))
    return Table(frame, table.name, table.locate, table.skipped)


def read_movielens(folder: Path | str, options: FileOptions = _PLAIN) -> Raw:
    """A MovieLens folder: ratings.csv and movies.csv (ml-latest, ml-20m ...) or ratings.dat and movies.dat (ml-1m,
    ml-10m; UTF-8 or Latin-1). The genres are the category, every rating is an interaction, times are seconds."""
    folder = Path(folder)
    if (folder / "ratings.csv").is_file():
        ratings, movies = read_table(folder / "ratings.csv", options), read_table(folder / "movies.csv", options)
    elif (folder / "ratings.dat").is_file():
        ratings = _read_dat(folder / "ratings.dat", ["userId", "movieId", "rating", "timestamp"], options)
        movies = _read_dat(folder / "movies.dat", ["movieId", "title", "genres"], options)
    else:
        raise UserError(f"{folder} holds neither ratings.csv nor ratings.dat; give the unpacked MovieLens folder")
    columns = {"user_id": "userId", "item_id": "movieId"}
    if "genres" in movies.frame.columns:
        columns["category"] = "genres"
        genres = pl.col("genres").str.replace_all("|", " ", literal=True).replace("(no genres listed)", None)
        movies = Table(movies.frame.with_columns(genres), movies.name, movies.locate, movies.skipped)
    return from_tables(ratings, movies, columns, options.on_error)


def _read_dat(path: Path, names: list[str], options: FileOptions) -> Table:
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
        if options.on_error == "raise":
            raise UserError(f"{path}:{number}: {len(fields)} fields, not {len(names)} separated by '::'. {SKIP_HINT}")
        skipped += 1
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
    return Table(frame, str(path), lambda n: f"{path}:{numbers[n]}", skipped)
