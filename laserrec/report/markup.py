"""HTML from nested calls. Whatever is not markup already is escaped, so a title can never become a tag."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

_VOID = {"meta", "link", "br", "hr", "input"}


class Markup(str):
    """Text that is HTML already."""


def join(*content: Any) -> Markup:
    """Content after content: markup as it is, lists in their order, None left out, all else escaped."""
    return Markup("".join(_one(part) for part in content))


def _one(part: Any) -> str:
    if part is None:
        return ""
    if isinstance(part, Markup):
        return part
    if isinstance(part, Iterable) and not isinstance(part, str):
        return join(*part)
    return escape(str(part))


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """`tag("td", title, class_="soft", aria_label="...")`; attributes of None are left out."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
                    for key, value in attributes.items() if value is not None)
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(*content)}</{name}>")
