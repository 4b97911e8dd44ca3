"""The text of a history and its tokens (paper, 3.1.1 and Table 6).

Every piece (instruction, number, item line) is tokenised by itself and the ids are joined, so that an item's tokens
are the same wherever it stands and are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from laserrec.config import Layout, PromptConfig, Template
from laserrec.data.clean import text

_ROLE = "You are an intelligent recommendation assistant. "
_LISTED = "In chronological order, the user has browsed the following items:"
INSTRUCTIONS = {
    Template.PAPER: f"{_ROLE}Please summarize the user's characteristics into a single token based on the browsing "
    f"history. {_LISTED}",
    Template.NO_SINGLE_TOKEN: f"{_ROLE}Please summarize the user's characteristics based on the browsing history. "
    f"{_LISTED}",
    Template.NO_INSTRUCTION: "",
    Template.ITEM_INSTRUCTION: f"{_ROLE}Please summarize the user's characteristics into a single token based on the "
    f"browsing history. {_LISTED}",
}
ITEM_INSTRUCTION = f"{_ROLE}Please summarize the item characteristics into a single token:"
# Text longer than this can't change the tokens kept: no tokenizer here makes fewer than one token of 64 characters.
_CHARACTERS_PER_TOKEN = 64


def item_line(row: dict, attributes: Sequence[str]) -> str:
    """`Title (brand: X, category: Y)`; unknown attributes are left out."""
    title = text(row.get("title")) or "untitled"
    known = [f"{name}: {value}" for name in attributes if (value := text(row.get(name)))]
    return f"{title} ({', '.join(known)})" if known else title


class PromptEncoder:
    """Texts to token ids under one tokenizer and one PromptConfig."""

    def __init__(self, tokenizer, config: PromptConfig):
        self.tokenizer, self.config = tokenizer, config
        self.instruction = self._ids(INSTRUCTIONS[config.template])
        own = config.template == Template.ITEM_INSTRUCTION
        self.item_instruction = self._ids(ITEM_INSTRUCTION) if own else self.instruction
        numbered = config.layout == Layout.PREFIX_FIRST  # a shared item text can't carry its place in one history
        self._numbers = [self._ids(f"\n\n>> {n}. " if numbered else "\n\n>> ") for n in range(1, config.max_items + 1)]

    def _ids(self, text: str) -> np.ndarray:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return np.asarray(ids, dtype=np.int32)

    def item_tokens(self, items: pl.DataFrame) -> list[np.ndarray]:
        """Int32[tokens] per row of `items` (columns title and the config's attributes), at most max_item_tokens."""
        limit = self.config.max_item_tokens
        lines = [item_line(row, self.config.attributes)[: limit * _CHARACTERS_PER_TOKEN]
                 for row in items.iter_rows(named=True)]
        if not lines:
            return []
        # split_special_tokens: a title that holds "<|im_end|>" is text, not the end of the prompt.
        encoded = self.tokenizer(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [np.asarray(ids[:limit], dtype=np.int32) for ids in encoded]

    def block(self, tokens: np.ndarray, number: int = 1) -> np.ndarray:
        """One item of a list: `>> n. ` and its line."""
        return np.concatenate([self._numbers[number - 1], tokens])

    def history(self, lines: Sequence[np.ndarray], as_item: bool = False) -> np.ndarray:
        """Int32[text] of a history given as its items' tokens, oldest first; the last max_items are written.
        as_item: the history of one item that stands for the item itself (template item_instruction)."""
        lines = lines[-self.config.max_items :]
        parts = [self.item_instruction if as_item else self.instruction]
        parts += [self.block(tokens, n) for n, tokens in enumerate(lines, 1)]
        return np.concatenate(parts)
