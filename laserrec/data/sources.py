"""Which reader fits which files, and the data sets that come with the project."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import Path

from laserrec.data.files import (
    ENDINGS,
    FileOptions,
    ending,
    is_made,
    is_note,
    json_object,
    lines,
    parts_of,
    refuse_workbook,
)
from laserrec.data.raw import Raw
from laserrec.data.readers import read_amazon_2018, read_amazon_2023, read_movielens, read_recbole, read_tables
from laserrec.util.errors import UserError

FORMATS = ("auto", "amazon2018", "amazon2023", "recbole", "csv", "parquet", "movielens")
BUNDLED = ("amazon-scientific", "amazon-office-2014")
Source = str | Path | Sequence[str | Path]


def read_source(source: Source, format: str = "auto", columns: Mapping[str, str] | None = None,
                options: FileOptions | None = None, extra: Sequence[str] = ()) -> Raw:
    """Read `source`: two files [interactions, items], a folder that holds them, a bundled data set's name, or one file
    of interactions, which may have the items' columns too; items have no text where it has none.

    Each of the files may be a folder of parts or a pattern instead (`files.parts_of`). In a folder of both the items
    are in the file whose name starts with meta, item or product or ends in .item.
    `format` is one of FORMATS; csv and parquet both read every ending that `files.read_table` knows.
    extra: further columns of the items to keep, of csv, parquet and recbole.
    Raises UserError when the files can't be told apart or the format is unknown.
    """
    options = options or FileOptions()
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; there are: {', '.join(FORMATS)}")
    if isinstance(source, (str, Path)) and not _is_table(Path(source)):
        folder = _folder(source)
        if format == "movielens" or (format == "auto" and _is_movielens(folder)):
            _refuse_columns("movielens", columns, extra)
            return read_movielens(folder, options)
        pair = _pair_in(folder)
    else:
        pair = [Path(p) for p in ([source] if isinstance(source, (str, Path)) else source)]
        if len(pair) not in (1, 2):
            raise UserError(f"give two files, interactions and items, or one of both; {len(pair)} were given")
        if format == "movielens":
            raise UserError("format movielens reads a folder; give the folder's path")
    parts = [parts_of(path) for path in pair]  # a missing file is told before the other one is read
    format = _guess(parts[0][0], options.encoding) if format == "auto" else format
    interactions, items = pair[0], pair[1] if len(pair) == 2 else None
    if format == "recbole":
        return read_recbole(interactions, items, columns, options, extra)
    if format in ("csv", "parquet"):
        return read_tables(interactions, items, columns, options, extra)
    _refuse_columns(format, columns, extra)
    if items is None:
        raise UserError(f"{interactions} is one file of format {format}, whose items are in a file of their own; give "
                        "both")
    return (read_amazon_2018 if format == "amazon2018" else read_amazon_2023)(interactions, items, options)


def bundled(name: str = "amazon-scientific") -> Path:
    """The folder of a data set that comes with the project's source tree (`data/`); UserError where it is missing."""
    if name not in BUNDLED:
        raise UserError(f"no bundled data set {name!r}; there are: {', '.join(BUNDLED)}")
    folder = Path(__file__).resolve().parents[2] / "data" / name
    if not folder.is_dir():
        raise UserError(f"data set {name} comes with the source tree only (folder data/{name}); clone the project")
    return folder


def _folder(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if str(source) in BUNDLED:
        return bundled(str(source))
    if ending(path) in ENDINGS:
        raise UserError(f"no such file: {path}")
    raise UserError(f"no such folder: {path}; bundled data sets are: {', '.join(BUNDLED)}")


def _pair_in(folder: Path) -> list[Path]:
    found = (p for p in folder.iterdir() if not p.name.startswith((".", "_")) and not is_note(p))
    files = sorted(p for p in found if (not p.is_dir() and ending(p) in ENDINGS) or _has_parts(p))
    items = [p for p in files if _names_items(p)]
    acts = [p for p in files if not _names_items(p)]
    if any(p.name.endswith(".inter") for p in acts):
        acts = [p for p in acts if p.name.endswith(".inter")]
    if len(items) <= 1 and len(acts) == 1:
        return [*acts, *items]
    if not items and _are_parts(acts):
        return [folder]
    raise UserError(f"{folder}: can't tell interactions and items apart among: "
                    f"{', '.join(p.name for p in files) or 'no data files'}; give the two files")


def _is_table(path: Path) -> bool:
    """Whether it is a file or a pattern."""
    return path.is_file() or (not path.is_dir() and has_magic(str(path)))


def _has_parts(path: Path) -> bool:
    """Whether it is a folder of parts."""
    return path.is_dir() and not is_made(path) and any(ending(p) in ENDINGS for p in path.iterdir())


def _are_parts(files: list[Path]) -> bool:
    """Whether files are one table by their names, which differ in numbers alone or begin with part, or folders that
    Spark names column=value."""
    names = [p.name.lower() for p in files]
    if not all(p.is_file() for p in files):
        return all("=" in name for name in names) and len({name.split("=")[0] for name in names}) == 1
    alike = {re.sub(r"\d+", "", name) for name in names}
    return len(names) > 1 and (len(alike) == 1 or all(re.match(r"part[-_.\d]", name) for name in names))


def _names_items(path: Path) -> bool:
    return path.name.lower().startswith(("meta", "item", "product")) or path.name.endswith(".item")


def _is_movielens(folder: Path) -> bool:
    return any((folder / f"ratings{e}").is_file() and (folder / f"movies{e}").is_file() for e in (".csv", ".dat"))


def _guess(interactions: Path, encoding: str) -> str:
    if interactions.name.endswith(".inter"):
        return "recbole"
    kind = ending(interactions)
    if kind in (".csv", ".tsv", ".txt", ".parquet"):
        return "parquet" if kind == ".parquet" else "csv"
    if kind not in ENDINGS:
        refuse_workbook(interactions)
        raise UserError(f"{interactions}: format not known by its ending; name one of {', '.join(FORMATS[1:])}")
    keys = set()
    for _, line in lines(interactions, encoding):
        try:
            keys = set(json_object(line))
        except (json.JSONDecodeError, ValueError):
            continue
        break
    if "reviewerID" in keys:
        return "amazon2018"
    return "amazon2023" if keys & {"parent_asin", "asin"} else "csv"


def _refuse_columns(format: str, columns: Mapping[str, str] | None, extra: Sequence[str]) -> None:
    if columns:
        raise UserError(f"format {format} has fixed columns; a column map goes with csv, parquet and recbole")
    if extra:
        raise UserError(f"format {format} has fixed columns; data.item_columns ({', '.join(extra)}) goes with csv, "
                        "parquet and recbole")
