"""The histories a caller gives, in any of the usual forms -> item rows, oldest first.

Ids, times and order mean here what they mean in `laserrec prepare` and `fit` (module `clean`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import polars as pl

from laserrec.data.clean import as_id, ids, is_missing, is_nested, names_nothing, short, unmixed, why_no_id
from laserrec.data.losses import (
    Losses,
    LossWarning,
    likely_cause,
    tell_items_not_barred,
    tell_users_not_barred,
    two_of,
)
from laserrec.data.raw import first_problem, no_column, time_and_order, to_polars, unused
from laserrec.util.errors import UserError, option

__all__ = ["Asked", "LossWarning", "read_histories"]
_LISTS = ("item_id", "items", "item_ids", "history")
_Named = list[tuple[Any, list[str | None]]]
"""(user as given, cleaned item ids oldest first, None where there is none)."""


@dataclass(frozen=True)
class Asked:
    """Histories that were read; users in the order in which they were given."""

    users: list
    """int each where all of them are whole numbers, else str."""
    rows: list[list[int]]
    """Known items of each user as the index gives them, oldest first; possibly none."""
    user_type: pl.DataType
    pandas: bool
    """The caller's frame or Series was a pandas one."""
    lost: Losses
    excluded: list[list[int]]
    """Per user the items that must not be recommended."""


def read_histories(histories: Any, index: Mapping[str, int], unknown: str = "error", exclude: Any = None,
                   tell: bool = True) -> Asked:
    """Read {user: [item id, ...]}, a list of lists, a 2-D array or a Series of lists (users are then the places from 0,
    or pandas' index), or a polars or pandas frame or Arrow table: user_id and item_id a row per interaction, ordered by
    timestamp, position or else the rows' order, or a row per user with a list column.

    index: item id -> row. unknown: items that are not in it, "error" or "drop". exclude: item ids that nobody is
    recommended, or {user: [item id, ...]}; ids that are not in the catalogue can't be recommended and are ignored. A
    LossWarning where that leaves none of them, or none of its users is one of the histories'.
    With "drop", users without any known item get no rows and are counted. `lost.tell(index)` then warns of more than a
    tenth lost and raises where nothing is left; tell = False leaves that to the caller, who sums the parts of a file.
    Raises UserError for an unknown item or an empty history (unless dropped), no histories, a user without an id or
    given twice, and another type.
    """
    if unknown not in ("error", "drop"):
        raise UserError(f'unknown is "error" or "drop", not {unknown!r}')
    named = _named(histories, tell)
    if not named:
        raise UserError("no histories were given; a recommendation needs at least one")
    users, user_type = _users([user for user, _ in named])
    rows, lost = [], []
    for user, (_, items) in zip(users, named, strict=True):
        known = [index[i] for i in items if i is not None and i in index]
        missing = [i for i in items if i not in index] if len(known) < len(items) else []
        if unknown == "error" and (missing or not items):
            raise _refused(user, items, missing, index)
        rows.append(known)
        lost += missing
    found = Losses(sum(len(items) for _, items in named), len(lost), len(users), sum(not r for r in rows),
                   tuple(dict.fromkeys(i for i in lost if i is not None))[:1000])
    if tell and unknown == "drop":
        found.tell(index)
    module = type(histories).__module__.split(".")[0]
    return Asked(users, rows, user_type, module == "pandas", found, _excluded(exclude, users, index))


def _refused(user: Any, items: list, missing: list, index: Mapping[str, int]) -> UserError:
    if not items:
        return UserError(f"history of user {user!r}: it is empty; a recommendation needs at least one item")
    if None in missing:
        return UserError(f"history of user {user!r}: place {items.index(None) + 1} holds no item id; leave it out, or "
                         f"all such with {option('unknown', 'drop')}")
    cause = likely_cause(missing, index) if len(missing) == len(items) else ""
    leave = f"Leave them out with {option('unknown', 'drop')}, or add them in Python: add_items"
    advice = "Write both sides alike" if cause else leave
    return UserError(f"{cause + ': ' if cause else ''}history of user {user!r}: {len(missing)} unknown item ids, first "
                     f"{missing[:3]}; the catalogue's are like {two_of(index)}. {advice}")


def _users(given: list) -> tuple[list, pl.DataType]:
    """Users under the rule for ids, as int where all are whole numbers."""
    names: list[str] = []
    for place, user in enumerate(given, 1):
        if (name := as_id(user)) is None:
            raise UserError(f"histories: user {place}: {why_no_id(user)} (found {short(user)}); give each user an id")
        names.append(name)
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"histories: two users are called {twice!r}; give each one history")
    whole = all(isinstance(u, (int, float, np.number)) for u in given) and all(n.lstrip("-").isdecimal() for n in names)
    if whole and all(abs(int(n)) < 2**63 for n in names):
        return [int(n) for n in names], pl.Int64()
    return names, pl.String()


def _excluded(exclude: Any, users: list, index: Mapping[str, int]) -> list[list[int]]:
    """Per user the rows that `exclude` bars. Warns where it bars nothing, although it holds something."""
    if exclude is None:
        return [[]] * len(users)
    if isinstance(exclude, Mapping):
        own = _barred_by_user(exclude, users)
        lists = [own.get(str(user), []) for user in users]
    else:
        lists = [_barred("exclude", exclude)]
    tell_items_not_barred("exclude", list(chain(*lists)), index)
    rows = [[index[item] for item in items if item in index] for items in lists]
    return rows if isinstance(exclude, Mapping) else rows * len(users)


def _barred_by_user(exclude: Mapping, users: list) -> dict[str, list[str]]:
    """Item ids by user. Warns where they are of other users than the histories; one user alone may well have none."""
    column = next((name for name in ("item_id", "user_id") if name in exclude and name not in users), None)
    if column:
        raise UserError(f"exclude is a dict with the column {column}, not a dict of lists by user; give one list of "
                        "item ids, or {user: [item id, ...]}")
    own: dict[str, list[str]] = {}
    for user, items in exclude.items():
        if found := _barred(f"exclude of user {user!r}", items):
            own.setdefault(as_id(user) or "", []).extend(found)
    tell_users_not_barred("exclude", own, [str(user) for user in users])
    return own


def _barred(what: str, items: Any) -> list[str]:
    """Item ids; missing values and empty texts are none. Raises UserError for other values, and for what is no list."""
    if isinstance(items, pl.LazyFrame) or hasattr(items, "columns"):
        raise UserError(f"{what} is a {type(items).__name__}, not a list of item ids; give its column item_id, or "
                        "{user: [item id, ...]}")
    if not is_nested(items) or isinstance(items, Mapping):
        raise UserError(f"{what} is {short(items)}; exclude is a list of item ids, or a dict of such lists by user")
    found = []
    for place, value in enumerate(items.to_pylist() if hasattr(items, "to_pylist") else items, 1):
        name = as_id(value)
        if name is not None:
            found.append(name)
        elif not names_nothing(value):
            raise UserError(f"{what}: place {place} is {short(value)}: {why_no_id(value)}; exclude is a flat list of "
                            "item ids, or a dict of such lists by user")
    return found


# -- the caller's forms -------------------------------------------------------------------------------------------


def _named(histories: Any, tell: bool) -> _Named:
    if isinstance(histories, Mapping):
        return [(user, _ids(user, items)) for user, items in histories.items()]
    if type(histories).__name__.endswith("GroupBy"):
        raise UserError("histories: a pandas group holds no lists yet; give .agg(list) of its column item_id")
    if isinstance(histories, pl.LazyFrame) or hasattr(histories, "columns"):
        return _of_frame(to_polars(histories, "histories"), tell)
    if type(histories).__module__.startswith("pyarrow"):
        histories = pl.Series(pl.from_arrow(histories))
    if hasattr(histories, "to_list"):  # a Series, of which pandas' has an index
        lists = histories.to_list()
        return _listed(list(getattr(histories, "index", range(len(lists)))), lists)
    if not isinstance(histories, (str, bytes, AbstractSet)) and isinstance(histories, Iterable):
        lists = list(histories)
        return _listed(range(len(lists)), lists)
    raise UserError(f"histories: expected a dict, a list of lists or a frame, not {type(histories).__name__}")


def _listed(users: Sequence, lists: list) -> _Named:
    if lists and not is_nested(lists[0]) and not is_missing(lists[0]):
        raise UserError("histories is one list of item ids; give a list of histories: [[...], ...]")
    return [(user, _ids(user, items)) for user, items in zip(users, lists, strict=True)]


def _ids(user: Any, items: Any) -> list[str | None]:
    nested = is_nested(items) and not hasattr(items, "columns")
    if isinstance(items, (AbstractSet, Mapping)) or not (nested or is_missing(items)):
        raise UserError(f"history of user {user!r} is {short(items)}, not a list of item ids; give a list, even for "
                        "one")
    return [] if is_missing(items) else [as_id(i) for i in items]


def _lists(column: pl.Series) -> bool:
    return unmixed(column).dtype.is_nested()


def tell_dates(frame: pl.DataFrame) -> None:
    """Warns (LossWarning) of rows that are taken in their order although a column that is not read holds dates."""
    if not {"timestamp", "position"}.isdisjoint(frame.columns) or any(_lists(frame[c]) for c in frame.columns):
        return
    if dates := unused(frame, ("user_id", "item_id"))["unused_dates"]:
        warnings.warn("histories: there is no column timestamp, so the rows are taken in their order, oldest first, "
                      f"and the dates in {dates[0]!r} are not used; if they tell it, call this column timestamp.",
                      LossWarning, stacklevel=2)


def _of_frame(frame: pl.DataFrame, tell: bool) -> _Named:
    """A row per interaction, or per user with a list column; several rows of one user are one history."""
    column = next((c for c in _LISTS if c in frame.columns and (c == "item_id" or _lists(frame[c]))), None)
    if column is None or "user_id" not in frame.columns:
        there = {"user_id": "user_id" in frame.columns, "item_id": column is not None}
        raise no_column("histories", [name for name, found in there.items() if not found], frame.columns)
    if tell:
        tell_dates(frame)
    users, given = ids(frame["user_id"]), frame["user_id"]
    time, order, problems = time_and_order(frame)
    problems = [("user_id", users.is_null(), ""), *problems]
    if problem := first_problem(frame, problems, lambda row: f"histories: row {row + 1}"):
        raise UserError(f"{problem}; mend it")
    table = pl.DataFrame({"user": users, "given": given if given.dtype.is_numeric() else users, "time": time,
                          "order": order})
    everyone = table.select("user", "given").unique("user", keep="first", maintain_order=True)
    if _lists(frame[column]):
        lists = [_ids(user, items) for user, items in zip(users, unmixed(frame[column]).to_list(), strict=True)]
        table = table.with_columns(item=pl.Series(lists, dtype=pl.List(pl.String)))
        table = table.filter(pl.col("item").list.len() > 0).sort("time", "order", maintain_order=True).explode("item")
    else:
        table = table.with_columns(item=ids(frame[column])).sort("time", "order", "item", maintain_order=True)
    grouped = everyone.join(table.group_by("user", maintain_order=True).agg("item"), "user", "left",
                            maintain_order="left")
    return [(user, items or []) for user, items in grouped.select("given", "item").iter_rows()]
