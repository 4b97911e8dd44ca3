"""One cleaning for the texts that come over HTTP: the one that `laserrec fit` gives to tables."""

from __future__ import annotations

import polars as pl

from laserrec.data import raw


def clean_id(value: str) -> str:
    """White space around it is dropped. Raises ValueError if nothing is left."""
    value = value.strip()
    if not value:
        raise ValueError("an item id can't be blank")
    return value


def clean_text(value: str | None) -> str | None:
    """HTML decoded and white space folded; None if nothing is left."""
    return None if value is None else raw.clean_text(pl.Series([value], dtype=pl.String))[0]


def clean_title(value: str) -> str:
    """As `clean_text`. Raises ValueError if nothing is left of it."""
    text = clean_text(value)
    if text is None:
        raise ValueError("a title can't be blank")
    return text
