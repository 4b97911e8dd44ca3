"""The catalogue as it is shown and searched: texts by dense item, apart from the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict


class Item(TypedDict):
    """One item's texts; the title is never None."""

    item_id: str
    title: str
    brand: str | None
    category: str | None


@dataclass(frozen=True)
class _Entry:
    dense: int
    item: Item
    text: str


class Listing:
    """All items that can be recommended, in the catalogue's order. Only one thread may change it; any may search, and
    sees it whole from before or after a change."""

    def __init__(self, items: Iterable[tuple[int, Item]]):
        self._by_dense: dict[int, Item] = {}
        self._entries: tuple[_Entry, ...] = ()
        self.add(items)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, dense: int) -> Item:
        """A removed item's texts stay, for answers that are under way."""
        return self._by_dense[dense]

    def add(self, items: Iterable[tuple[int, Item]]) -> None:
        """`items`: (dense item, its texts)."""
        new = [_Entry(dense, item, _text(item)) for dense, item in items]
        self._by_dense |= {entry.dense: entry.item for entry in new}
        self._entries = (*self._entries, *new)

    def remove(self, dense: Iterable[int]) -> None:
        gone = set(dense)
        self._entries = tuple(entry for entry in self._entries if entry.dense not in gone)

    def search(self, query: str, limit: int, offset: int) -> tuple[Sequence[Item], int]:
        """A page of the items of which every word of `query` is in title, brand or category, and how many there are in
        all. Case does not matter; no words find everything."""
        words, entries = query.casefold().split(), self._entries
        if words:
            entries = tuple(entry for entry in entries if all(word in entry.text for word in words))
        return [entry.item for entry in entries[offset : offset + limit]], len(entries)


def _text(item: Item) -> str:
    # A word of the query has no white space in it, so that none is found across two fields.
    return "\n".join(item[name] or "" for name in ("title", "brand", "category")).casefold()
