"""The catalogue as it is shown and searched: texts by the model's row, apart from the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12


class Item(TypedDict):
    """One item's texts; None where the catalogue has none."""

    item_id: str
    title: str | None
    brand: str | None
    category: str | None


class More(TypedDict, total=False):
    """What an item may have beside its texts, where the catalogue has it."""

    columns: dict[str, str | None]
    """Further columns of text."""
    vector: list[float]
    """A vector of the caller's own."""


class NewItem(Item, More):
    """An item that a caller adds."""


def item_of(row: Mapping[str, Any]) -> Item:
    """The texts of a table's row, which may have other columns too."""
    return Item(item_id=row["item_id"], title=row["title"], brand=row["brand"], category=row["category"])


class Listing:
    """All items that can be recommended, in the catalogue's order. Only one thread may change it; any may search, and
    sees it whole from before or after a change. Parameters: `items`: (row, texts)."""

    def __init__(self, items: Iterable[tuple[int, Item]] = ()):
        self._items: dict[int, Item] = {}
        self._rows: dict[str, int] = {}
        self._live = pl.DataFrame(schema={"row": pl.Int64, "text": pl.String})
        self.add(items)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Item:
        """A removed item's texts stay, for answers that are under way."""
        return self._items[row]

    def row(self, item_id: str) -> int | None:
        """None if no such item can be recommended."""
        return self._rows.get(item_id)

    def add(self, items: Iterable[tuple[int, Item]]) -> None:
        """`items`: (row, texts)."""
        new = list(items)
        self._items |= dict(new)
        texts = pl.DataFrame([(row, _text(item)) for row, item in new], schema=self._live.schema, orient="row")
        self._live = pl.concat([self._live, texts], rechunk=True)
        self._rows |= {item["item_id"]: row for row, item in new}

    def remove(self, item_ids: Iterable[str]) -> None:
        """Ids that are not listed change nothing."""
        rows = [self._rows.pop(item_id) for item_id in item_ids if item_id in self._rows]
        self._live = self._live.filter(~pl.col("row").is_in(rows))

    def search(self, query: str, limit: int, offset: int) -> tuple[Sequence[Item], int]:
        """A page of the items of which every word of `query` is in title, brand or category, and how many there are in
        all. Case does not matter; no words find everything. It takes time in proportion to the catalogue."""
        found = self._live
        for word in dict.fromkeys(query.casefold().split()):
            found = found.filter(pl.col("text").str.contains(word, literal=True))
        return [self._items[row] for row in found["row"].slice(offset, limit)], found.height


def _text(item: Item) -> str:
    # A word of the query has no white space in it, so that none is found across two fields.
    return "\n".join(item[name] or "" for name in ("title", "brand", "category")).casefold()
