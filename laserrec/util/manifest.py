"""Size and sha256 of a folder's files, to detect damaged or changed copies.

This guards against accidents, not forgery: whoever can change a file can change the manifest too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from laserrec.util.errors import UserError, reading


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Map each file name to its {"bytes", "sha256"}. Names are relative to `folder`, with "/"."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}


def check(folder: Path, files: Mapping[str, Mapping[str, Any]], advice: str, links: bool = True) -> None:
    """Compare a folder with what `describe` recorded; all sizes are checked before any file is read.

    Raises UserError for the first file that is missing or different, for malformed `files`, for names that lead out of
    the folder and, with links=False, for symbolic links. `advice` says what to do.
    """
    with reading(folder):
        _compare(folder, files, advice, links)


def _compare(folder: Path, files: Mapping[str, Mapping[str, Any]], advice: str, links: bool) -> None:
    if not (isinstance(files, Mapping) and all(map(_is_entry, files, files.values()))):
        raise UserError(f"the list of files of {folder} is damaged; {advice}")
    for name, known in files.items():
        file = folder / name
        if not links and any(place.is_symlink() for place in (file, *file.parents[: name.count("/")])):
            raise UserError(f"{file} is a link, which is not followed; {advice}")
        if not file.is_file():
            raise UserError(f"{file} is missing; {advice}")
        size = file.stat().st_size
        if size < known["bytes"]:
            raise UserError(f"{file} is cut short: it has {size:,} of {known['bytes']:,} bytes; {advice}")
        if size > known["bytes"]:
            raise UserError(f"{file} has changed: it has {size:,} bytes instead of {known['bytes']:,}; {advice}")
    for name, known in files.items():
        found = file_sha256(folder / name)
        if found != known["sha256"]:
            raise UserError(f"{folder / name} has changed: its sha256 is {found[:12]}... instead of "
                            f"{str(known['sha256'])[:12]}...; {advice}")


def _is_entry(name: object, known: object) -> bool:
    return (isinstance(name, str) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
            and isinstance(known, Mapping) and type(known.get("bytes")) is int and isinstance(known.get("sha256"), str))


def file_sha256(file: Path) -> str:
    """The file's sha256 as 64 hex digits; read in pieces, so that large files need no memory."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
