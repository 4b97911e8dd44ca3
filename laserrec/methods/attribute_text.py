"""Items as key-value text (Li et al. 2023, "Text Is All You Need", 2.2): what RECFORMER reads of a history."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from laserrec.config import RecFormerConfig
from laserrec.data.clean import text
from laserrec.data.histories import Histories
from laserrec.llm.backbone import Backbone
from laserrec.util.device import move

CLS, KEY, VALUE = 0, 1, 2
"""Token types. Padding, the published fourth, is hidden from attention instead."""
_CHARACTERS_PER_TOKEN = 64
"""No tokeniser makes fewer than one token of so many characters."""


@dataclass(frozen=True)
class Texts:
    """A batch of [CLS] and items' texts, padded on the right."""

    tokens: Int[Tensor, "batch seq"]
    """Rows of the LLM's token table; behind its end come [CLS] and [MASK]."""
    types: Int[Tensor, "batch seq"]
    places: Int[Tensor, "batch seq"]
    """1 for tokens of the newest item, 2 for those of the one before, ...; 0 for [CLS]."""
    real: Bool[Tensor, "batch seq"]

    def to(self, device: torch.device) -> Texts:
        """The same on another device."""
        return Texts(*(move(x, device) for x in (self.tokens, self.types, self.places, self.real)))


class Attributes:
    """Items' attributes as tokens, by row: each attribute's name, then its value; unknown ones are left out."""

    def __init__(self, backbone: Backbone, config: RecFormerConfig, items: pl.DataFrame):
        self.tokenizer, self.config, self.cls = backbone.tokenizer, config, len(backbone.embedding)
        self.tokens, self.types, self.starts = (torch.zeros(n, dtype=torch.long) for n in (0, 0, 1))
        self.add(items)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int[Tensor, "n_items"]:
        """Tokens of each item."""
        return self.starts.diff()

    def add(self, items: pl.DataFrame) -> None:
        """Append items (columns title and the other attributes)."""
        rows: list[list[np.ndarray]] = [[] for _ in range(items.height)]
        for name in self.config.attributes:
            key, values = self._ids([f"{name}: "])[0], self._values(items, name)
            known = [row for row, value in enumerate(values) if value]
            for row, ids in zip(known, self._ids([values[row] for row in known]), strict=True):
                both = np.array([key + ids, [KEY] * len(key) + [VALUE] * len(ids)], dtype=np.int64)
                rows[row].append(both[:, : self.config.attribute_tokens])
        flat = np.concatenate([np.zeros((2, 0), np.int64), *(part for row in rows for part in row)], axis=1)
        ends = torch.tensor([sum(part.shape[1] for part in row) for row in rows], dtype=torch.long).cumsum(0)
        self.tokens = torch.cat([self.tokens, torch.from_numpy(flat[0])])
        self.types = torch.cat([self.types, torch.from_numpy(flat[1])])
        self.starts = torch.cat([self.starts, self.starts[-1] + ends])

    def truncate(self, count: int) -> None:
        """Forget the items behind the first `count`."""
        self.starts = self.starts[: count + 1]
        self.tokens, self.types = self.tokens[: int(self.starts[-1])], self.types[: int(self.starts[-1])]

    def _values(self, items: pl.DataFrame, name: str) -> list[str]:
        column = items[name].to_list() if name in items.columns else [None] * items.height
        values = [(text(value) or "")[: self.config.attribute_tokens * _CHARACTERS_PER_TOKEN] for value in column]
        return [value or "untitled" for value in values] if name == "title" else values

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # split_special_tokens: a title that holds "<|im_end|>" is text.
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def read(self, histories: Histories) -> Texts:
        """Of each history (on the CPU) the newest items' texts, newest first, as many tokens as fit."""
        newest = histories.last(self.config.max_items)
        order = (newest.users * (self.config.max_items + 1) + newest.ages).argsort()
        items, users, places = newest.items[order], newest.users[order], newest.ages[order] + 1
        counts = self.lengths[items]
        each = torch.arange(len(items)).repeat_interleave(counts)  # the item of each token
        token = torch.arange(len(each)) - (counts.cumsum(0) - counts)[each] + self.starts[items][each]
        totals = torch.zeros(len(histories), dtype=torch.long).index_add_(0, users, counts)
        user = users[each]
        column = torch.arange(len(each)) - (totals.cumsum(0) - totals)[user] + 1
        kept = column < self.config.max_tokens
        user, column, each, token = user[kept], column[kept], each[kept], token[kept]
        size = len(histories), 1 + (int(column.max()) if len(column) else 0)
        tokens, types = torch.full(size, self.cls), torch.full(size, CLS)
        place, real = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.bool)
        tokens[user, column], types[user, column] = self.tokens[token], self.types[token]
        place[user, column], real[user, column], real[:, 0] = places[each], True, True
        return Texts(tokens, types, place, real)
