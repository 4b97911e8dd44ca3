"""Files of any known ending -> one `Table` each: CSV, JSON lines and Parquet, packed or not, whole or in parts.

A path is a file, a folder of parts (as Spark and others write them) or a pattern such as `orders-*.csv`. Every broken
line is a UserError that names file and line, or with on_error = "skip" is left out and counted.
"""

from __future__ import annotations

import codecs
import glob
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import polars as pl

from laserrec.data.clean import alike, column_of
from laserrec.data.lines import POLARS_ERRORS, ending, excel_separator, for_polars, header_hint, lines, not_utf8, reason
from laserrec.data.records import Records, swallows
from laserrec.util.errors import UserError, option, reading

ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".inter", ".item")
SKIP_HINT = f"Mend the line, or leave broken lines out: {option('on_error', 'skip')}"
_WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
_NOTE = re.compile(r"(readme|licen[cs]e|copying|notice|changelog|citation)([-_.].*)?\.(txt|json)(\.gz)?", re.IGNORECASE)
_CHUNK_ROWS = 200_000


@dataclass(frozen=True)
class FileOptions:
    """How text files are read. Raises UserError for values that can't be."""

    on_error: str = "raise"
    """Broken lines: "raise", or "skip" to leave them out and count them."""
    separator: str | None = None
    """Of delimited text; None: a tab in .tsv, .inter and .item, else a comma. A first line such as sep=; of the file's
    own counts for more."""
    encoding: str = "utf-8"
    """Any that Python knows, such as cp1252 or utf-16."""

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise UserError(f"on_error is 'raise' or 'skip', not {self.on_error!r}")
        if self.separator == "\\t":  # as shells hand it over
            object.__setattr__(self, "separator", "\t")
        if self.separator is not None and not (len(self.separator) == 1 and self.separator.isascii()):
            raise UserError(f"separator is one character such as ; or , (\\t for a tab), not {self.separator!r}")
        try:
            name = codecs.lookup(self.encoding).name
        except LookupError:
            raise UserError(f"unknown encoding {self.encoding!r}; there are utf-8, cp1252, utf-16, latin-1 and all "
                            "others that Python knows") from None
        object.__setattr__(self, "encoding", "utf-8" if name in ("utf-8-sig", "ascii") else name)


@dataclass(frozen=True)
class Table:
    """A frame with the caller's columns, and where its rows come from."""

    frame: pl.DataFrame
    name: str
    locate: Callable[[int], str] | None = None
    """0-based row -> "file:line" for messages."""
    skipped: int = 0
    """Broken lines already left out."""

    def where(self, row: int) -> str:
        """The row's place, in words."""
        return self.locate(row) if self.locate else f"{self.name}: row {row + 1}"


def read_table(path: Path | str, options: FileOptions | None = None) -> Table:
    """All columns: text files' values as text (JSON's lists and mixtures see `clean.column_of`), Parquet's in their own
    types.

    Raises UserError for a missing or unreadable file, an unknown ending, and broken lines.
    """
    options = options or FileOptions()
    return read_parts(path, lambda part: _read_file(part, options))


def read_parts(path: Path | str, read: Callable[[Path], Table]) -> Table:
    """The parts of `path`, each read by `read`, below each other."""
    files = parts_of(path)
    tables = [read(part) for part in files]
    if len(tables) == 1:
        return tables[0]
    ends = list(accumulate(t.frame.height for t in tables))

    def locate(row: int) -> str:
        part = bisect_right(ends, row)
        return tables[part].where(row - (ends[part - 1] if part else 0))

    frames = [t.frame for t in tables]
    frame = below_each_other(path, frames if ending(files[0]) == ".parquet" else alike(frames))
    return Table(frame, str(path), locate, sum(t.skipped for t in tables))


def below_each_other(path: Path | str, frames: list[pl.DataFrame]) -> pl.DataFrame:
    """The parts of `path` with the columns of all, each as wide as any part has it. Raises UserError where there is no
    such type."""
    try:
        return pl.concat(frames, how="diagonal_relaxed")
    except POLARS_ERRORS as error:
        raise UserError(f"{path}: the parts' columns differ in type: {reason(error)}; write them with one schema"
                        ) from None


def parts_of(path: Path | str) -> list[Path]:
    """The files that make up one table, by name: the file itself, those in a folder or those that match a pattern.
    Of a folder's, names that begin with _ or . are left out (Spark's _SUCCESS), and notes and data folders and models
    in it. Raises UserError where there are none."""
    path = Path(path)
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            below = ((p, p.relative_to(path).parts) for p in path.rglob("*"))
            found = [p for p, names in below if not any(n.startswith(("_", ".")) for n in names) and not is_note(p)]
            made = {p for p in found if p.is_dir() and is_made(p)}
            found = [p for p in found if made.isdisjoint(p.parents)]
        elif glob.has_magic(str(path)):
            found = [Path(p) for p in glob.glob(str(path), recursive=True)]
        else:
            raise UserError(f"no such file: {path}")
        files = sorted(p for p in found if p.is_file() and ending(p) in ENDINGS)
    except OSError as error:
        raise UserError(f"{path} can't be read: {reason(error)}") from None
    if not files:
        raise UserError(f"{path}: no data files here; their names end in {', '.join(ENDINGS)} (text also .gz)")
    if other := next((p for p in files if ending(p) != ending(files[0])), None):
        raise UserError(f"{path}: the parts of one table end alike, and here are {files[0].name} and {other.name}; "
                        "give one file or pattern")
    return files


def is_note(path: Path) -> bool:
    """Whether a name is that of a text about the data, such as README.txt."""
    return _NOTE.fullmatch(path.name) is not None


def is_made(folder: Path) -> bool:
    """Whether it is a data folder or a model's, such as those that were made inside their own source."""
    data = all((folder / name).is_file() for name in ("meta.json", "interactions.parquet"))
    return data or (folder / "model.json").is_file()


def _read_file(path: Path, options: FileOptions) -> Table:
    kind = ending(path)
    if kind == ".parquet":
        try:
            with reading(path):
                return Table(pl.read_parquet(path), str(path))
        except (*POLARS_ERRORS, OSError) as error:
            raise UserError(f"{path} is not readable as Parquet: {reason(error)}; write it again") from None
    if kind in _JSON_ENDINGS:
        return _any_json(path, options)
    if kind not in ENDINGS:
        refuse_workbook(path)
        raise UserError(f"{path}: unknown ending; there are {', '.join(ENDINGS)}, text also with .gz")
    tabs = kind in (".tsv", ".inter", ".item")
    return _read_delimited(path, options, *_separator(path, options, "\t" if tabs else ","))


def refuse_workbook(path: Path) -> None:
    """Raises UserError for a file of a spreadsheet program, which holds several tables."""
    if ending(path) in _WORKBOOKS:
        raise UserError(f"{path} is a workbook; save the sheet as CSV (in Excel: CSV UTF-8) and give that file")


def _separator(path: Path, options: FileOptions, usual: str) -> tuple[str, int]:
    """The one that the first line names, else the one that was set, unless the header has only the usual one: of two
    files one may be written otherwise. And the number of lines before the header."""
    number, header = next(lines(path, options.encoding), (0, b""))
    if named := excel_separator(header):
        return named, number
    if options.separator is None:
        return usual, 0
    only_usual = options.separator.encode() not in header and usual.encode() in header
    return (usual if only_usual else options.separator), 0


# -- JSON lines ---------------------------------------------------------------------------------------------------


def read_json_lines(path: Path, options: FileOptions, make: Callable[[list], pl.DataFrame],
                    row: Callable[[dict], Any] = lambda o: o) -> Table:
    """`make` gets what `row` makes of each line's object, in chunks, so that memory holds the columns kept alone. A
    ValueError of `row` says what is wrong with a line."""
    skipped: list[str] = []
    rows = _json_rows(path, row, options, skipped)
    chunks = []
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        chunks.append(make(chunk))
    if not chunks:
        raise UserError(skipped[0] if skipped else f"{path} is empty")
    return Table(pl.concat(alike(chunks), how="diagonal"), str(path),
                 lambda n: f"{path}:{_nth_line(path, options.encoding, n)}", len(skipped))


def _nth_line(path: Path, encoding: str, row: int) -> int:
    return next((number for number, _ in islice(lines(path, encoding), row, None)), 0)


def _any_json(path: Path, options: FileOptions) -> Table:
    """All keys of all lines."""
    def make(chunk: list[dict]) -> pl.DataFrame:
        keys = dict.fromkeys(k for o in chunk for k in o)
        return pl.DataFrame([column_of(k, [o.get(k) for o in chunk]) for k in keys])

    return read_json_lines(path, options, make)


def _json_rows(path: Path, row: Callable[[dict], Any], options: FileOptions, skipped: list[str]) -> Iterator[Any]:
    for number, line in lines(path, options.encoding):
        try:
            yield row(json_object(line))
        except ValueError as error:
            message = f"{path}:{number}: {_json_reason(error, line)}. {SKIP_HINT}"
            if options.on_error == "raise":
                raise UserError(message) from None
            skipped.append(message)


def _json_reason(error: ValueError, line: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(line, error)
    # json knows only this line, so its own message would say "line 1".
    return f"not JSON: {error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def json_object(line: bytes) -> dict:
    """The object on one line. Raises ValueError that says what else it is."""
    text = line.decode("utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if re.match(r"\s*\{\s*u?'", text):
            raise ValueError("a Python literal as in the 2014 files, not JSON; convert the file with "
                             "json.dumps(ast.literal_eval(line))") from None
        if text.lstrip().startswith("["):
            raise ValueError("a JSON array over several lines; write one object {...} a line (JSON lines)") from None
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object {...}; write one object a line (JSON lines)")
    return value


# -- delimited text -----------------------------------------------------------------------------------------------


def _read_delimited(path: Path, options: FileOptions, separator: str, before: int) -> Table:
    """polars reads it; where polars gives up, a slow reading finds the lines at fault, which polars doesn't name."""
    quote = None if ending(path) in (".inter", ".item") else '"'
    records = Records(path, separator, quote, options.encoding, before)
    _check_header(records)
    try:
        source = for_polars(path, options.encoding)
        frame = pl.read_csv(source, separator=separator, infer_schema=False, quote_char=quote, skip_lines=before)
        broken = (frame[name].filter(frame[name].str.contains("\n", literal=True)) for name in frame.columns)
        if not any(swallows(values.to_list(), separator, frame.width) for values in broken):
            frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
            return Table(frame, str(path), lambda n: f"{path}:{records.line_of(n)}")
    except (*POLARS_ERRORS, OSError, EOFError, zlib.error):
        pass
    rows, skipped, first = _good(records, options.on_error)
    header, *body = [fields for _, fields in rows]
    names = [name or f"column {place}" for place, name in enumerate(header, 1)]
    frame = pl.DataFrame([[f or None for f in fields] for fields in body], orient="row",
                         schema=dict.fromkeys(names, pl.String))
    if frame.is_empty() and first:
        raise UserError(first)
    return Table(frame, str(path), lambda n: f"{path}:{rows[n + 1][0]}", skipped)


def _check_header(records: Records) -> None:
    """Raises UserError for a name that stands twice: polars would call the second one otherwise. Columns without a name
    are no columns of ours."""
    number, header, _ = next(iter(records), (0, "", 0))
    if twice := [] if isinstance(header, str) else [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"{records.path}:{number}: the column name {twice[0]!r} stands twice in the header; rename one "
                        "of the columns or leave one out")


def _good(records: Records, on_error: str) -> tuple[list[tuple[int, list[str]]], int, str | None]:
    """Good records with the header first, the number of broken lines, and the first one's message."""
    rows: list[tuple[int, list[str]]] = []
    skipped, first = 0, None
    for number, fields, count in records:
        if isinstance(fields, str):
            why = fields
        elif rows and len(fields) != len(rows[0][1]):
            header = rows[0][1]
            why = f"{len(fields)} fields, the header has {len(header)}{header_hint(header)}"
        else:
            rows.append((number, fields))
            continue
        message = f"{records.path}:{number}: {why}. {SKIP_HINT}"
        if on_error == "raise" or not rows:
            raise UserError(message)
        skipped, first = skipped + count, first or message
    if not rows:
        raise UserError(f"{records.path} is empty; its first line should name the columns")
    return rows, skipped, first
