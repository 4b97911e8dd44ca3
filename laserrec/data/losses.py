"""What got lost between the caller's ids and the catalogue's, and the likeliest cause."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from laserrec.util.errors import UserError

log = logging.getLogger(__name__)

LOUD = 0.1
"""A larger share lost than this is a warning."""
_LOOKED_AT = 1000


class LossWarning(UserWarning):
    """More than a tenth of something the caller gave was left out, or a user gets no answer."""


@dataclass(frozen=True)
class Losses:
    """Of histories that were read. Sums with `+`."""

    items: int = 0
    """Items in all histories, as given."""
    unknown: int = 0
    """Of these, items that are not in the catalogue, or have no id."""
    users: int = 0
    empty_users: int = 0
    """Users of whom no item is left; their answer is empty."""
    examples: tuple[str, ...] = ()
    """Some of the unknown ids."""

    def __add__(self, other: Losses) -> Losses:
        return Losses(self.items + other.items, self.unknown + other.unknown, self.users + other.users,
                      self.empty_users + other.empty_users, (self.examples + other.examples)[:_LOOKED_AT])

    def lines(self) -> list[str]:
        """One sentence per loss; none if nothing was lost."""
        found = []
        if self.unknown:
            found.append(f"{self.unknown:,} of {self.items:,} items of the histories are not in the catalogue and were "
                         "left out.")
        if self.empty_users:
            found.append(f"{self.empty_users:,} of {self.users:,} users have no known item and get no recommendation.")
        return found

    def tell(self, catalogue: Iterable[str]) -> None:
        """Warns (LossWarning) of more than a tenth of the items lost and of users without an answer, and raises
        UserError where nothing is left, with the likeliest cause and examples of both sides; logs what is less.
        catalogue: its item ids."""
        if self.unknown == self.items and not self.examples:
            raise UserError("the histories hold no item ids; a recommendation needs at least one")
        if self.unknown == self.items:
            raise UserError(f"no item of the histories is in the catalogue: {mismatch(self.examples, catalogue)}")
        if self.unknown > LOUD * self.items or self.empty_users:
            more = f" {mismatch(self.examples, catalogue)}" if self.examples else ""
            warnings.warn(" ".join(self.lines()) + more, LossWarning, stacklevel=3)
        elif self.unknown:
            log.info(*self.lines())

    def tell_unanswered(self, count: int) -> None:
        """Warns of users whose answer is empty for another reason than `tell` knows. count: all empty answers."""
        if count > self.empty_users:
            warnings.warn(f"{count - self.empty_users:,} of {self.users:,} users get no recommendation: nothing is "
                          "left for them that may be recommended.", LossWarning, stacklevel=3)


def tell_items_not_barred(what: str, items: Collection[str], catalogue: Collection[str]) -> None:
    """Warns where none of the items that must not be recommended is in the catalogue. what: names their list."""
    if items and not any(item in catalogue for item in items):
        warnings.warn(f"{what} has no effect, none of its item ids is in the catalogue: {mismatch(items, catalogue)}",
                      LossWarning, stacklevel=4)


def tell_users_not_barred(what: str, theirs: Collection[str], ours: Sequence[str]) -> None:
    """Warns where items must not be recommended to users of whom none is asked for; one user alone may well have none.
    theirs: the list's users; ours: those of the histories."""
    if theirs and set(theirs).isdisjoint(ours):
        cause = likely_cause(list(theirs), ours)
        if cause or len(ours) > 1:
            cause = cause + "; " if cause else ""
            warnings.warn(f"{what} has no effect, none of its users has a history here: {cause}its users are "
                          f"like {two_of(theirs)}, the histories' like {two_of(ours)}.", LossWarning, stacklevel=4)


def mismatch(theirs: Iterable[str], ours: Iterable[str]) -> str:
    """Why ids of the caller's are not among the catalogue's: the likeliest cause if there is one, then two of each."""
    theirs, ours = list(islice(dict.fromkeys(theirs), _LOOKED_AT)), list(ours)
    cause = likely_cause(theirs, ours)
    return f"{cause + '; ' if cause else ''}yours are like {two_of(theirs)}, the catalogue's like {two_of(ours)}."


def two_of(ids: Iterable[str]) -> str:
    """Two examples."""
    return " and ".join(map(repr, islice(ids, 2))) or "none"


_FORMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("ids are like 7.0 on one side and 7 on the other", lambda i: re.sub(r"\.0+$", "", i)),
    ("leading zeros are missing on one side (read this column as text)", lambda i: i.lstrip("0") or "0"),
    ("upper and lower case differ", str.casefold),
    ("spaces or punctuation differ", lambda i: re.sub(r"[\W_]+", "", i.casefold())),
    ("ids have letters before the number on one side only", lambda i: re.sub(r"^\D+", "", i)),
)


def likely_cause(theirs: Sequence[str], ours: Collection[str]) -> str:
    """A cause that explains at least half of `theirs`, else nothing."""
    def most(explained: Iterable[bool]) -> bool:
        return 2 * sum(explained) >= max(1, len(theirs))

    if most(i.startswith(("[", "(")) and i.endswith(("]", ")")) for i in theirs):
        return ("lists of ids are written as text; give a list column (Parquet, JSON lines) or one row per user and "
                "item")
    for what, form in _FORMS:
        known = {form(i) for i in ours}
        if most(form(i) in known and form(i) != "" for i in theirs):
            return what
    if most(i.isdecimal() for i in theirs) and not any(i.isdecimal() for i in ours):
        return "yours are numbers, such as row numbers, and the catalogue's are not"
    return ""
