"""Docstrings as `--help` shows them: paragraphs without the line breaks of the source, which narrow terminals break
once more."""

from __future__ import annotations

import inspect
from itertools import groupby

from cyclopts import App


def reflow_help(app: App) -> None:
    """Of all commands below `app`."""
    for name in app:
        command = app[name]
        if name.startswith("-"):
            continue
        if command.default_command is not None and command.default_command.__doc__:
            command.default_command.__doc__ = reflowed(command.default_command.__doc__)
        reflow_help(command)


def reflowed(docstring: str) -> str:
    """Lines of one paragraph, and of one parameter's description, become one line. Indented lines elsewhere, such as
    examples, stay as they are."""
    text, rule, parameters = inspect.cleandoc(docstring).partition("\nParameters\n----------\n")
    return _joined(text, indented=False) + rule + _joined(parameters, indented=True)


def _joined(text: str, indented: bool) -> str:
    """With the lines joined that are indented or are not."""
    out: list[str] = []
    for (blank, inside), group in groupby(text.split("\n"), key=lambda line: (not line, line.startswith(" "))):
        lines = [*group]
        one = inside == indented and not blank
        out += [lines[0] + "".join(f" {line.strip()}" for line in lines[1:])] if one else lines
    return "\n".join(out)
