"""The histories a caller gives, in any of their forms -> item rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from laserrec.data.raw import to_polars
from laserrec.util.errors import UserError


@dataclass(frozen=True)
class Asked:
    """`rows[i]`: item rows of `users[i]`, never empty."""

    users: list
    rows: list[list[int]]
    user_type: pl.DataType
    pandas: bool
    """The caller's frame was a pandas one."""


def read_histories(histories: Any, index: Mapping[str, int], unknown: str = "error") -> Asked:
    """`index`: item_id -> row. Item ids are compared as strings.

    Raises UserError for an unknown item (unless unknown = "drop"), an empty history, no histories, or another type.
    """
    if unknown not in ("error", "drop"):
        raise UserError(f'unknown is "error" or "drop", not {unknown!r}')
    pandas = type(histories).__module__.split(".")[0] == "pandas"
    named = _as_mapping(histories)
    if not named:
        raise UserError("no histories were given; a recommendation needs at least one")
    rows = [_rows(user, items, index, unknown) for user, items in named.items()]
    users = list(named)
    whole = all(isinstance(u, int) for u in users)
    return Asked(users if whole else [str(u) for u in users], rows, pl.Int64 if whole else pl.String, pandas)


def _as_mapping(histories: Any) -> Mapping[Any, Sequence[Any]]:
    if isinstance(histories, Mapping):
        return histories
    if isinstance(histories, pl.DataFrame) or hasattr(histories, "iloc"):
        frame = to_polars(histories)
        missing = [c for c in ("user_id", "item_id") if c not in frame.columns]
        if missing:
            raise UserError(f"histories: column {', '.join(missing)} is missing; there are: {', '.join(frame.columns)}")
        grouped = frame.group_by("user_id", maintain_order=True).agg("item_id")
        return dict(zip(grouped["user_id"].to_list(), grouped["item_id"].to_list(), strict=True))
    if isinstance(histories, Sequence) and not isinstance(histories, str):
        if histories and (isinstance(histories[0], str) or not isinstance(histories[0], Iterable)):
            raise UserError("histories is one list of item ids; give a list of histories: [[...], ...]")
        return dict(enumerate(histories))
    raise UserError(f"histories: expected a dict, a list of lists or a frame, not {type(histories).__name__}")


def _rows(user: Any, items: Sequence[Any], index: Mapping[str, int], unknown: str) -> list[int]:
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise UserError(f"history of user {user!r} is {items!r}, not a list of item ids; give a list, even for one")
    ids = [str(i) for i in items]
    missing = [i for i in ids if i not in index]
    if missing and unknown == "error":
        raise UserError(f"history of user {user!r}: {len(missing)} unknown item ids, first {missing[:3]}; "
                        'add them with add_items, or leave them out with unknown = "drop"')
    found = [index[i] for i in ids if i in index]
    if not found:
        left = "no item of it is in the catalogue" if ids else "it is empty"
        raise UserError(f"history of user {user!r}: {left}; a recommendation needs at least one item")
    return found
