"""Ids and texts that come over HTTP mean what they mean in files and frames: see `laserrec.data.clean`."""

from __future__ import annotations

from typing import Any

from laserrec.data import clean
from laserrec.server.settings import MAX_TEXT
from laserrec.util.errors import UserError


def clean_id(value: Any) -> str:
    """The id as text. Raises ValueError for what is none."""
    try:
        return clean.item_id(value)
    except UserError as error:
        raise ValueError(str(error)) from None


def clean_text(value: Any) -> str | None:
    """One line without markup, of any JSON value; None if nothing is left. Raises ValueError for more than MAX_TEXT
    characters, markup included, and for lists in lists without end."""
    try:
        plain = clean.flat(value)
    except RecursionError:
        raise ValueError("lists in lists, too deep to read") from None
    if plain is not None and len(plain) > MAX_TEXT:
        raise ValueError(f"a text of {len(plain):,} characters; send at most {MAX_TEXT:,}")
    return clean.text(plain)


def clean_title(value: Any) -> str:
    """As `clean_text`. Raises ValueError if nothing is left."""
    text = clean_text(value)
    if text is None:
        raise ValueError("a title can't be blank")
    return text
