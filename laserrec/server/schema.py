"""What goes in and out over HTTP. The bounds here stand in the API's description (/docs)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from laserrec.server.settings import (
    MAX_CANDIDATES,
    MAX_COLUMNS,
    MAX_EXCLUDE,
    MAX_HISTORY,
    MAX_ID,
    MAX_K,
    MAX_NEW_ITEMS,
    MAX_PATH,
    MAX_TEXT,
    MAX_VECTOR,
)
from laserrec.server.texts import clean_id, clean_text, clean_title


def _described(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(kinds)})


_NUMBER = {"type": "number"}
ItemId = Annotated[str, BeforeValidator(clean_id), _described({"type": "string", "minLength": 1}, _NUMBER)]
"""Any id that a catalogue may hold: text or a number."""
_NewId = Annotated[str, StringConstraints(max_length=MAX_ID), BeforeValidator(clean_id),
                   _described({"type": "string", "minLength": 1, "maxLength": MAX_ID}, _NUMBER)]
_TEXT = {"type": "string", "maxLength": MAX_TEXT}
_OTHER_TEXTS = ({"type": "array"}, {"type": "object"}, _NUMBER, {"type": "boolean"})
_Title = Annotated[str, BeforeValidator(clean_title), _described({**_TEXT, "minLength": 1}, *_OTHER_TEXTS)]
_Text = Annotated[str | None, BeforeValidator(clean_text), _described(_TEXT, *_OTHER_TEXTS, {"type": "null"})]
_Path = Annotated[str, Field(min_length=1, max_length=MAX_PATH, pattern=r"^[^\x00]+$")] | None


class _Body(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_fields(cls, given: Any) -> Any:
        # Not extra="forbid", which makes one error of each of a hundred thousand fields.
        if isinstance(given, dict) and (unknown := given.keys() - cls.model_fields.keys()):
            raise ValueError(f"{len(unknown)} unknown fields, among them {min(unknown)[:40]!r}; "
                             f"known are: {', '.join(cls.model_fields)}")
        return given


class RecommendRequest(_Body):
    """A user is a history; nothing else about users is sent or stored."""

    history: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_HISTORY, fail_fast=True)]
    """Item ids, oldest first."""
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    """How many items at most."""
    exclude_seen: bool = False
    """Never recommend items of the history."""
    exclude: Annotated[list[ItemId], Field(max_length=MAX_EXCLUDE, fail_fast=True)] = []
    """Never recommend these items. Ids that are not in the catalogue change nothing."""
    candidates: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES, fail_fast=True)] | None = None
    """Recommend only from among these items."""
    explain: bool = False
    """Name for each recommended item the item of the history that is nearest to it."""


class NewItem(_Body):
    """An item to add. Texts are cleaned as when a model is fitted: without HTML, white space folded, lists joined."""

    item_id: _NewId
    title: _Title
    brand: _Text = None
    category: _Text = None
    columns: Annotated[dict[str, _Text], Field(max_length=MAX_COLUMNS)] = {}
    """Further columns of text, by their names, where the catalogue has such."""
    vector: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]],
                      Field(min_length=1, max_length=MAX_VECTOR, fail_fast=True)] | None = None
    """A vector of your own, where the catalogue's items have such; as long as theirs."""


class NewItems(_Body):
    """Items to add to the catalogue."""

    items: Annotated[list[NewItem], Field(min_length=1, max_length=MAX_NEW_ITEMS, fail_fast=True)]


class LoadModel(_Body):
    """A model to serve from now on."""

    folder: _Path = None
    """A model folder on the server's machine. Null: the folder that is served, which was replaced."""
    index: _Path = None
    """An index of that model (laserrec index build). Null: none, or with the same folder the same index."""


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ItemText(_Answer):
    """An item's texts, as the catalogue has them."""

    item_id: str
    title: str | None = None
    brand: str | None = None
    category: str | None = None


class Near(_Answer):
    """The history's item that is nearest to a recommended one."""

    item_id: str
    title: str | None
    similarity: float
    """Cosine of the two items' embeddings."""


class Scored(ItemText):
    """An item with its place."""

    rank: int
    score: float
    nearest_history_item: Near | None = None


class RecommendAnswer(_Answer):
    """Recommendations for one history, best first."""

    items: list[Scored]
    expert: int | None
    """The query expert (from 0) that the router chose for this history; null where the model has no router."""
    unknown: list[str]
    """Ids of the history that are not in the catalogue; they were left out."""


class SimilarAnswer(_Answer):
    """Items similar to one item, most similar first."""

    items: list[Scored]


class ItemsPage(_Answer):
    """One page of the catalogue."""

    items: list[ItemText]
    total: int
    """Items found in all."""


class Changed(_Answer):
    """A finished change: it is on disk."""

    changed: int
    """Items that were added or removed; those that were there already, just so, are not counted."""
    n_items: int
    """Items in the catalogue now."""


class ChangeStatus(_Answer):
    """A change of the catalogue and how far it is."""

    id: str
    state: Literal["running", "done", "failed"]
    """Only a change that is done is on disk; of one that failed nothing remains."""
    done: int
    """Items changed so far."""
    total: int
    """Items to change."""
    status_url: str
    """Where to ask again."""
    detail: str | None = None
    """Why it failed."""


class ModelFacts(_Answer):
    """Facts about the served model."""

    name: str
    version: str
    """Of laserrec."""
    method: str
    n_items: int
    backbone: str | None
    """The LLM; null where the method reads no text."""
    experts: int | None
    """Query experts of the router; null where the model has none."""
    max_items: int | None
    """The LLM reads the last so many items of a history."""
    added: int
    """Items added since the fit."""
    removed: int
    """Fitted items that were removed."""


class Problem(_Answer):
    """Every error's body."""

    detail: str
    """What is wrong and what to do."""
