"""What goes in and out over HTTP. The bounds here stand in the API's description (/docs)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from laserrec.server.settings import MAX_CANDIDATES, MAX_HISTORY, MAX_ID, MAX_K, MAX_NEW_ITEMS, MAX_TEXT

ItemId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID)]
_Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RecommendRequest(_Body):
    """Who asks is not said: a user is a history."""

    history: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_HISTORY)]
    """Item ids, oldest first."""
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    """How many items at most."""
    exclude_seen: bool = False
    """Never recommend what stands in the history."""
    candidates: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES)] | None = None
    """Recommend only from among these items."""
    explain: bool = False
    """Say for each item which item of the history is the nearest to it."""


class ItemText(_Body):
    """An item's texts."""

    item_id: ItemId
    title: Annotated[_Text, Field(min_length=1)]
    brand: _Text | None = None
    category: _Text | None = None


class Near(_Body):
    """The history's item that is nearest to a recommended one."""

    item_id: str
    title: str
    similarity: float
    """Cosine of the two items' embeddings."""


class Scored(ItemText):
    """An item with its place."""

    rank: int
    score: float
    nearest_history_item: Near | None = None


class RecommendAnswer(_Body):
    items: list[Scored]
    expert: int | None
    """The query expert (from 0) that the router chose for this history; null where the model has no router."""
    unknown: list[str]
    """Ids of the history that are not in the catalogue; they were left out."""


class SimilarAnswer(_Body):
    items: list[Scored]


class ItemsPage(_Body):
    items: list[ItemText]
    total: int
    """Items found in all."""


class NewItems(_Body):
    items: Annotated[list[ItemText], Field(min_length=1, max_length=MAX_NEW_ITEMS)]


class Changed(_Body):
    changed: int
    """Items that were added or removed."""
    n_items: int
    """Items in the catalogue now."""


class ModelFacts(_Body):
    name: str
    version: str
    """Of laserrec."""
    n_items: int
    backbone: str
    experts: int | None
    max_items: int
    """The LLM reads the last so many items of a history."""
    added: int
    """Items added since the fit."""
    removed: int
    """Fitted items that were removed."""
