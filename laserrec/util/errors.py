"""Errors that the user can fix."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Wrong input or settings. The message says what is wrong, where, and what to do; the CLI prints only that."""


def option(name: str, value: str | None = None) -> str:
    """How a message names an option: as a flag of the command line, and as an argument in Python. value: None for a
    switch."""
    flag = "--" + name.replace("_", "-")
    if value is None:
        return f"{flag} (Python: {name}=True)"
    quoted = json.dumps(value)
    return f"{flag} {value if re.fullmatch('[a-z0-9-]+', value) else quoted} (Python: {name}={quoted})"


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """What the operating system refuses to read, as a UserError; FileNotFoundError passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        hint = "; give this user the right to read it" if isinstance(error, PermissionError) else ""
        raise UserError(f"{error.filename or path} can't be read: {error.strerror or error}{hint}") from None
