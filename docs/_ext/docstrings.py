"""laserrec's docstrings are plain text with `code`; this makes them reStructuredText, so that nothing else in them
(`*`, `|`, a name with _ at its end) is taken for markup."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


def escape(line: str) -> str:
    """`code` becomes a literal, the rest plain text."""
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(f"`{p}`" if p.startswith("`") else re.sub(r"([\\*|`_])", r"\\\1", p) for p in parts)


def _process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [escape(line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
