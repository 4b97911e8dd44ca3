"""Converts laserrec's docstrings, which are plain text with `code`, to reStructuredText.

Characters that would be markup there (`*`, `|`, a trailing underscore) are escaped. Indented lines, such as a folder's
list of files, become a literal block.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from sphinx.application import Sphinx


def escape(line: str) -> str:
    """Keep `code` as a literal and escape the rest."""
    parts = re.split(r"(`[^`\s](?:[^`]*[^`\s])?`)", line)
    return "".join(p if i % 2 else re.sub(r"([\\*|`_])", r"\\\1", p) for i, p in enumerate(parts))


def convert(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    out: list[str] = []
    for indented, group in groupby(lines, key=lambda line: line.startswith(" ")):
        same = list(group)
        out += ["", "::", "", *(f"    {line}" for line in same), ""] if indented else map(escape, same)
    return out


def _process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = convert(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
