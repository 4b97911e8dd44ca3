"""The records of delimited text with their lines, read by the csv module, and quotes that were never closed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from laserrec.data.lines import lines, not_utf8

_ENOUGH = 2
"""So many lines inside one field that look like records are no text with line breaks."""


@dataclass(frozen=True)
class Records:
    """An iterator over (last line, fields, how many lines it has) per record, or (line, what is wrong, how many)."""

    path: Path
    separator: str
    quote: str | None
    encoding: str
    before: int = 0
    """Lines before the header."""

    def line_of(self, row: int) -> int:
        """Line of a 0-based row; 0 where there is none."""
        return next((number for number, _, _ in islice(self, row + 1, None)), 0)

    def __iter__(self) -> Iterator[tuple[int, list[str] | str, int]]:
        bad: list[tuple[int, str]] = []
        own: list[tuple[int, str]] = []
        ended = False

        def text() -> Iterator[str]:
            nonlocal ended
            for number, line in lines(self.path, self.encoding):
                if number <= self.before:
                    continue
                try:
                    own.append((number, line.decode("utf-8-sig" if number == 1 else "utf-8")))
                    yield own[-1][1]
                except UnicodeDecodeError as error:
                    bad.append((number, not_utf8(line, error)))
            ended = True

        reader, width = self._reader(text()), 0
        while True:
            own.clear()
            try:
                fields = next(reader, None)
            except csv.Error as error:  # such as a field too long
                why = str(error) if len(own) < 2 else f"a quote opens here and does not close in {len(own)} lines"
                yield own[0][0], why, len(own)
                continue
            yield from ((number, why, 1) for number, why in bad)
            bad.clear()
            if fields is None:
                return
            width = width or len(fields)
            if ended:
                within = min(fields[-1].rstrip("\r\n").count("\n"), len(own) - 1)
                yield own[-1 - within][0], "a quote opens here and is never closed", len(own)
            elif len(own) > 1 and self._takes_rows(fields, [line for _, line in own], width):
                yield own[0][0], "a quote opens here and closes lines later, with other rows in between", len(own)
            else:
                yield own[-1][0], fields, len(own)

    def _takes_rows(self, fields: list[str], raw: list[str], width: int) -> bool:
        """Whether a record of several lines has others in it."""
        if swallows(fields, self.separator, width):
            return True
        try:
            list(self._reader(iter(raw), strict=True))
        except csv.Error:  # a quote closes in the middle of a value
            return all(_is_row(line.rstrip("\r\n"), self.separator, width) for line in raw[1:])
        return False

    def _reader(self, text: Iterator[str], strict: bool = False) -> Iterator[list[str]]:
        quoting = csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE
        return csv.reader(text, delimiter=self.separator, quotechar=self.quote or None, quoting=quoting, strict=strict)


def swallows(values: Iterable[str | None], separator: str, width: int) -> bool:
    """Whether a value holds whole lines that are records of so many fields, each without spaces where text has them:
    rows that a quote has taken in. A text with line breaks is none."""
    return any(_is_rows(value.split("\n")[1:-1], separator, width) for value in values if value and "\n" in value)


def _is_rows(inner: list[str], separator: str, width: int) -> bool:
    return len(inner) >= _ENOUGH and width > 1 and all(_is_row(line.rstrip("\r"), separator, width) for line in inner)


def _is_row(line: str, separator: str, width: int) -> bool:
    fields = next(csv.reader([line], delimiter=separator), [])
    return len(fields) == width and bool(fields[0]) and " " not in fields[0] and not any(f[:1] == " " for f in fields)
