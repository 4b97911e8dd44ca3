"""Text files as lines of UTF-8, whatever they are packed and encoded in, and what is wrong with them in words."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl

from laserrec.util.errors import UserError, option

POLARS_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
_PEEKED = 1 << 16


def ending(path: Path) -> str:
    """".csv" of orders.csv and orders.csv.gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def reason(error: BaseException) -> str:
    """An error of polars or the system in one line."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, bytes]]:
    """(1-based number, UTF-8 bytes) of every line that is not blank; .gz is unpacked on the way."""
    number = 0
    try:
        with opened(path, encoding) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: the gzip data breaks off here ({error}); get the file again") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {reason(error)}") from None


def opened(path: Path, encoding: str) -> Any:
    """The file as bytes of UTF-8 with line feeds, unpacked. Raises UserError, with the line, where another encoding
    does not fit. A file that is UTF-8 is read as such where the encoding was meant for another one beside it."""
    file = (gzip.open if path.name.endswith(".gz") else open)(path, "rb")
    with ExitStack() as closing:
        closing.callback(file.close)
        if encoding == "utf-8" and not _only_returns(file.peek(_PEEKED)):
            closing.pop_all()
            return file
        data = file.read()
    try:
        data = data if _is_utf8(data, encoding) else data.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        before = data[: getattr(error, "start", 0)].decode(encoding, "ignore")
        raise UserError(f"{path}:{before.count(chr(10)) + 1}: not {encoding} ({reason(error)}); "
                        "set the file's own encoding") from None
    return io.BytesIO(data.replace(b"\r", b"\n") if _only_returns(data[:_PEEKED]) else data)


def for_polars(path: Path, encoding: str) -> Any:
    """The path itself where polars can read it, which is faster than what `opened` gives."""
    file = opened(path, encoding)
    if isinstance(file, io.BytesIO):
        return file
    file.close()
    return path


def _only_returns(head: bytes) -> bool:
    """Whether lines end as on very old Macs, of which Excel still has an option."""
    return b"\r" in head[:-1] and b"\n" not in head


def _is_utf8(data: bytes, encoding: str) -> bool:
    """Whether data are UTF-8, although an encoding is given of which no text looks so: one byte a character, or two."""
    wide = encoding.startswith(("utf-16", "utf-32"))
    if encoding != "utf-8" and (not (wide or encoding.startswith(("cp125", "iso8859"))) or (wide and b"\0" in data)):
        return False
    try:
        data.decode("utf-8")
    except UnicodeError:
        return encoding == "utf-8"  # its lines are looked at one by one
    return True


def not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with a line that is not UTF-8, and what it may be instead."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"not UTF-8 but UTF-16, by its first bytes; set {option('encoding', 'utf-16')}"
    return (f"not UTF-8 at byte {error.start + 1}; files from Excel or Windows often are in cp1252: if yours is, set "
            f"{option('encoding', 'cp1252')}")


def excel_separator(line: bytes) -> str | None:
    """The separator that a first line such as sep=; names, as Excel writes it."""
    found = re.fullmatch(rb'"?sep=([ -~\t])"?', line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n"), re.IGNORECASE)
    return found[1].decode("ascii") if found else None


def header_hint(columns: list[str]) -> str:
    """For a header without the columns looked for: which separator or encoding it seems to have."""
    if any("\x00" in name for name in columns):
        return f". The file looks like UTF-16; set {option('encoding', 'utf-16')}"
    found = next((s for s in (";", "\t", "|", ",") if s in columns[0]), None) if len(columns) == 1 else None
    return f". The header looks separated by {found!r}; set {option('separator', found)}" if found else ""
