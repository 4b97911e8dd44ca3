"""The catalogue's texts as the frozen LLM sees them: tokens, and for layout text_first keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor

from laserrec.config import Layout, PromptConfig
from laserrec.data.histories import Histories
from laserrec.data.prompt import PromptEncoder
from laserrec.llm.attention import Past, TextCache
from laserrec.llm.backbone import Backbone
from laserrec.llm.decoder import NativeDecoder
from laserrec.llm.fetch import cache_folder
from laserrec.util.device import move
from laserrec.util.distributed import World
from laserrec.util.errors import UserError
from laserrec.util.mapped import mapped
from laserrec.util.memory import available_bytes
from laserrec.util.progress import Progress

_READ_AT_ONCE = 64
"""Item texts per pass when the cache is filled."""


class Texts:
    """Item texts by row, as tokens and, for layout text_first, as the frozen LLM's keys and values.

    world: processes that read the texts together, each its share; afterwards each has all.
    Raises UserError where the layout and the LLM do not go together.
    """

    def __init__(self, backbone: Backbone, prompt: PromptConfig, items: pl.DataFrame, progress: bool = False,
                 world: World | None = None):
        self.backbone, self.config = backbone, prompt
        self.prompt = PromptEncoder(backbone.tokenizer, prompt)
        self.shared = prompt.layout == Layout.TEXT_FIRST
        """Whether each text is read once, for all histories that hold the item."""
        self.tokens: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        if self.shared:
            if not isinstance(backbone.decoder, NativeDecoder):
                raise UserError("prompt.layout text_first needs the native decoder (Llama, Mistral, Qwen2, Qwen3) and "
                                f"backbone {backbone.name!r} runs on transformers'; use layout prefix_first")
            self.decoder = backbone.decoder  # it and the cache are there for text_first alone
            self._read_instruction()
        with Progress("reading item texts", items.height, progress and self.shared) as bar:
            self.add(items, bar.advance, world)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, items: pl.DataFrame, progress: Callable[[int], None] | None = None,
            world: World | None = None) -> None:
        """Append items (columns title and the attributes) behind the last row."""
        self.tokens += self.prompt.item_tokens(items)
        if self.shared:
            self._read(progress, world or World())

    def truncate(self, count: int) -> None:
        """Forget the items behind the first `count`."""
        del self.tokens[count:]
        if len(self._rows) > count:
            self._used = int(self._rows[count][0])
            del self._rows[count:]

    def lengths(self) -> Int[np.ndarray, "n_items"]:
        """Tokens of each item in a list."""
        return np.array([len(self.prompt.block(tokens)) for tokens in self.tokens], dtype=np.int64)

    def texts(self, histories: Histories, as_item: bool) -> list[np.ndarray]:
        """Int32[text] token ids of each history; as_item: of one item each, that stand for the items themselves."""
        return [self.prompt.history([self.tokens[i] for i in row], as_item) for row in histories.lists()]

    def past(self, histories: Histories) -> Past:
        """Where the LLM finds these histories' text; the last max_items of each."""
        recent = histories.last(self.config.max_items).lists()
        rows = [np.concatenate([self._instruction_rows, *(self._rows[i] for i in row)]) for row in recent]
        lengths = torch.tensor([len(r) for r in rows])
        index = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r) for r in rows], batch_first=True)
        device = self.backbone.device
        return Past(self._cache, move(index, device), move(lengths, device))

    # -- the cache ----------------------------------------------------------------------------------------------

    def _read_instruction(self) -> None:
        device, decoder = self.backbone.device, self.decoder
        ids = torch.as_tensor(self.prompt.instruction, dtype=torch.long, device=device)[None]
        self._instruction_rows = np.arange(ids.shape[1])
        if ids.shape[1] == 0:
            empty = torch.zeros(decoder.shape.layers, 0, decoder.shape.kv_dim, dtype=decoder.dtype, device=device)
            self._cache = TextCache(empty, empty)
        else:
            keys, values = decoder.encode_text(self.backbone.embed(ids))
            self._cache = TextCache(keys[:, 0], values[:, 0])
        self._used = ids.shape[1]  # rows of the cache that hold text; behind them is room for more

    def _read(self, progress: Callable[[int], None] | None, world: World) -> None:
        """Each unread item's block after the instruction: it sees the instruction and itself. Sorted by length for
        speed."""
        blocks = [self.prompt.block(tokens) for tokens in self.tokens[len(self._rows) :]]
        lengths = np.array([len(b) for b in blocks], dtype=np.int64)
        ends = self._used + np.cumsum(lengths)
        self._make_room(int(ends[-1]) if len(ends) else self._used)
        order = np.argsort(lengths, kind="stable")
        chunks = [order[at : at + _READ_AT_ONCE] for at in range(0, len(order), _READ_AT_ONCE)]
        for mine in world.share(len(chunks)):
            self._read_chunk([(blocks[i], int(ends[i])) for i in chunks[mine]])
            if progress:
                progress(sum(map(len, chunks[mine : mine + world.size])))
        rows = [np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)]
        if world.size > 1:
            self._exchange([np.concatenate([rows[i] for i in chunk]) for chunk in chunks], world)
        self._rows += rows
        self._used = int(ends[-1]) if len(ends) else self._used

    def _read_chunk(self, blocks: list[tuple[np.ndarray, int]]) -> None:
        """Token ids, and the cache's row behind their last."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(b, dtype=torch.long) for b, _ in blocks], True)
        embeds = self.backbone.embed(move(ids, self.backbone.device))
        k, v = self.decoder.encode_text(embeds, self._instruction(len(blocks)))
        for row, (block, end) in enumerate(blocks):
            where = slice(end - len(block), end)
            self._cache.keys[:, where], self._cache.values[:, where] = k[:, row, : len(block)], v[:, row, : len(block)]

    def _instruction(self, batch: int) -> Past:
        rows = torch.as_tensor(self._instruction_rows, device=self.backbone.device)
        return Past(self._cache, rows.expand(batch, -1), torch.full((batch,), len(rows), device=rows.device))

    def _exchange(self, chunks: list[np.ndarray], world: World) -> None:
        """Rows of the cache, a chunk of them from each process in turn."""
        for number, rows in enumerate(chunks):
            for kept in (self._cache.keys, self._cache.values):
                part = kept[:, rows].contiguous()
                world.follow([part], leader=number % world.size)
                kept[:, rows] = part

    def _make_room(self, total: int) -> None:
        """A few items more must not copy the whole cache, which may take gigabytes: it grows by a quarter at a time.
        Memory that nothing was written to takes no room."""
        old: tuple[Tensor, Tensor] = self._cache.keys, self._cache.values
        if total <= old[0].shape[1]:
            return
        layers, _, kv_dim = old[0].shape
        size = layers, total + total // 4, kv_dim
        on_disk = self._too_large(2 * math.prod(size) * old[0].element_size())
        new = tuple(mapped(size, x.dtype, cache_folder() / "texts") if on_disk
                    else torch.empty(size, dtype=x.dtype, device=x.device) for x in old)
        for grown, kept in zip(new, old, strict=True):
            grown[:, : self._used] = kept[:, : self._used]
        self._cache = TextCache(*new)

    def _too_large(self, size: int) -> bool:
        """For memory."""
        most = self.config.text_cache_gib
        limit = available_bytes() / 2 if most is None else most * 2**30
        return self.backbone.device.type == "cpu" and size > limit
