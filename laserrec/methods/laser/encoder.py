"""Histories of dense items -> embeddings: text, ID states, prefix, LLM, head, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from laserrec.config import ItemSide, Layout, Prefix
from laserrec.data.prompt import PromptEncoder
from laserrec.llm.attention import Past, TextCache
from laserrec.llm.text_features import mean_outputs
from laserrec.methods.laser.mformer import Route
from laserrec.methods.laser.model import Laser
from laserrec.methods.neighbours import weighed_sums
from laserrec.methods.sequence import pad_histories
from laserrec.util.distributed import World
from laserrec.util.errors import UserError
from laserrec.util.progress import Progress

_READ_AT_ONCE = 64
"""Item texts per pass when the cache is filled."""


class Catalogue:
    """Item texts by dense item, as tokens and, for layout text_first, as the frozen LLM's keys and values.

    Items 1..n_known are the ID model's; later ones (`add`) have text alone. world: processes that read the texts
    together, each its share; afterwards each has all. means: what `means` would hold, if it was kept. later: don't
    read a text before a history needs it, which may be never.
    """

    def __init__(self, laser: Laser, items: pl.DataFrame, n_known: int, progress: bool = False,
                 world: World | None = None, means: Float[Tensor, "n_items d_means"] | None = None,
                 later: bool = False):
        self.laser, self.n_known, self._later = laser, n_known, later
        self.prompt = PromptEncoder(laser.backbone.tokenizer, laser.config.prompt)
        self.tokens: list[np.ndarray] = []
        self.shared = laser.config.prompt.layout == Layout.TEXT_FIRST
        if self.shared and not laser.backbone.native:
            raise UserError("prompt.layout text_first needs the native decoder (Llama, Mistral, Qwen2, Qwen3) and "
                            f"backbone {laser.backbone.name!r} runs on transformers'; use layout prefix_first")
        self.means: Tensor = torch.zeros(0, laser.backbone.d_means) if means is None else means
        """Float[n_items d_means], the mean of the LLM's outputs over each item's text; for those settings that use it
        (prompt.item_side mean, neighbours), else empty."""
        self._rows: list[np.ndarray] = []
        self._cache: TextCache | None = None
        self._used = 0  # rows of the cache that hold text; behind them is room for more
        self._average(items, progress)
        with Progress("reading item texts", items.height, progress) as bar:
            self.add(items, bar.advance, world)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, items: pl.DataFrame, progress: Callable[[int], None] | None = None,
            world: World | None = None) -> None:
        """Append items (rows with title and the attributes) behind the last dense item."""
        new = self.prompt.item_tokens(items)
        self._average(items)
        self.tokens += new
        if self.shared and not self._later:
            self._read(progress, world or World())

    def _average(self, items: pl.DataFrame, show: bool = False) -> None:
        """Append to `means`, unless it holds these items."""
        config = self.laser.config
        uses_means = config.prompt.item_side == ItemSide.MEAN or config.neighbours.count
        if not uses_means or len(self.means) >= len(self.tokens) + items.height:
            return
        with Progress("averaging item texts", items.height, show) as bar:
            means = mean_outputs(self.laser.backbone, config.prompt, items, bar.advance)
        self.means = torch.cat([self.means, means])

    def _read_instruction(self) -> None:
        ids = torch.as_tensor(self.prompt.instruction, dtype=torch.long)[None]
        self._instruction_rows = np.arange(ids.shape[1])
        shape = self.laser.backbone.decoder.shape
        if ids.shape[1] == 0:
            empty = torch.zeros(shape.layers, 0, shape.kv_dim, dtype=self.laser.backbone.decoder.dtype)
            self._cache = TextCache(empty, empty)
        else:
            keys, values = self.laser.backbone.decoder.encode_text(self.laser.backbone.embed(ids))
            self._cache = TextCache(keys[:, 0], values[:, 0])
        self._used = ids.shape[1]

    def _read(self, progress: Callable[[int], None] | None, world: World) -> None:
        """Each unread item's block after the instruction: it sees the instruction and itself. Sorted by length for
        speed."""
        if self._cache is None:
            self._read_instruction()
        blocks = [self.prompt.block(tokens) for tokens in self.tokens[len(self._rows) :]]
        lengths = np.array([len(b) for b in blocks], dtype=np.int64)
        ends = self._used + np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else self._used
        self._make_room(total)
        keys, values = self._cache.keys, self._cache.values
        order = np.argsort(lengths, kind="stable")
        chunks = [order[at : at + _READ_AT_ONCE] for at in range(0, len(order), _READ_AT_ONCE)]
        for mine in world.share(len(chunks)):
            chunk = chunks[mine]
            ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(blocks[i], dtype=torch.long) for i in chunk], True)
            embeds, instruction = self.laser.backbone.embed(ids), self._instruction(len(chunk))
            k, v = self.laser.backbone.decoder.encode_text(embeds, instruction)
            for row, i in enumerate(chunk):
                where = slice(int(ends[i] - lengths[i]), int(ends[i]))
                keys[:, where], values[:, where] = k[:, row, : lengths[i]], v[:, row, : lengths[i]]
            if progress:
                progress(sum(map(len, chunks[mine : mine + world.size])))
        rows = [np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)]
        if world.size > 1:
            self._exchange([np.concatenate([rows[i] for i in chunk]) for chunk in chunks], world)
        self._rows += rows
        self._used = total

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
        old = self._cache.keys
        if total <= old.shape[1]:
            return
        keys, values = (torch.empty(old.shape[0], total + total // 4, old.shape[2], dtype=old.dtype) for _ in range(2))
        keys[:, : self._used], values[:, : self._used] = old[:, : self._used], self._cache.values[:, : self._used]
        self._cache = TextCache(keys, values)

    def truncate(self, count: int) -> None:
        """Forget the items behind the first `count`."""
        del self.tokens[count:]
        self.means = self.means[:count]
        if len(self._rows) > count:
            self._used = int(self._rows[count][0])
            del self._rows[count:]

    def _instruction(self, batch: int) -> Past:
        rows = torch.as_tensor(self._instruction_rows)
        return Past(self._cache, rows.expand(batch, -1), torch.full((batch,), len(rows)))

    def past(self, histories: Sequence[np.ndarray]) -> Past:
        """Where the LLM finds these histories' text; the last max_items of each."""
        if self._cache is None or len(self._rows) < len(self.tokens):
            self._read(None, World())
        window = self.laser.config.prompt.max_items
        rows = [np.concatenate([self._instruction_rows, *(self._rows[i - 1] for i in h[-window:])]) for h in histories]
        lengths = torch.tensor([len(r) for r in rows])
        index = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r) for r in rows], batch_first=True)
        return Past(self._cache, index, lengths)

    def text(self, history: np.ndarray, as_item: bool) -> np.ndarray:
        """Int32[text] token ids of one history."""
        return self.prompt.history([self.tokens[i - 1] for i in history], as_item)

    def text_length(self, history: np.ndarray) -> int:
        """Tokens of a history's items, for batches of like length."""
        return sum(len(self.tokens[i - 1]) for i in history[-self.laser.config.prompt.max_items :])


class Encoder:
    """One Laser, one frozen ID model, one catalogue."""

    def __init__(self, laser: Laser, id_model: torch.nn.Module, catalogue: Catalogue):
        self.laser, self.id_model, self.catalogue = laser, id_model.eval().requires_grad_(False), catalogue

    @torch.no_grad()
    def states(
        self, histories: Sequence[np.ndarray]
    ) -> tuple[Float[Tensor, "batch items d_id"], Bool[Tensor, "batch items"]]:
        """The frozen ID model's states C_u and which of them are real. Items it never saw are left out."""
        some, known = self._known(histories)
        padded = pad_histories(known, self.id_model.max_history) if known else torch.zeros(0, 1, dtype=torch.long)
        mask = torch.zeros(len(histories), padded.shape[1], dtype=torch.bool)
        states = torch.zeros(*mask.shape, self.id_model.d_id)
        if known:
            mask[some] = padded > 0
            states[some] = self.id_model.states(padded).float()
        return states, mask

    def _known(self, histories: Sequence[np.ndarray]) -> tuple[Bool[Tensor, "batch"], list[np.ndarray]]:
        """Which histories hold items of the ID model, and those histories without any other item."""
        known = [h[h <= self.catalogue.n_known] for h in histories]
        return torch.tensor([len(h) > 0 for h in known]), [h for h in known if len(h)]

    def outputs(
        self, histories: Sequence[np.ndarray], as_item: bool = False, hide_states: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch d_llm"], Route | None]:
        """The LLM's pooled outputs for one batch, with gradient to what Laser trains.
        hide_states: Bool[batch], rows whose ID states are hidden (mformer.state_dropout)."""
        plain = as_item and self.laser.config.prompt.item_side != ItemSide.TRAINED
        states, mask = self.states(histories)
        if hide_states is not None:
            mask = mask & ~hide_states[:, None]
        if self.catalogue.shared:
            return self.laser.read_past(self.catalogue.past(histories), states, mask, plain)
        return self.laser([self.catalogue.text(h, as_item) for h in histories], states, mask, plain)

    def tokens(self, history: np.ndarray, as_item: bool = False) -> int:
        """What the LLM reads for one history in layout prefix_first: prefix, text, suffix."""
        mformer = self.laser.config.mformer
        prefix = 0 if mformer.prefix == Prefix.NONE else mformer.queries
        if as_item and self.laser.config.prompt.item_side != ItemSide.TRAINED:
            prefix = 0
        return prefix + len(self.catalogue.text(history, as_item)) + 1

    @torch.no_grad()
    def route(self, histories: Sequence[np.ndarray]) -> Route | None:
        """The router's choice alone, without the LLM; None where there is no router."""
        mformer = self.laser.mformer
        return None if mformer is None or mformer.router is None else mformer.router(*self.states(histories))

    @torch.no_grad()
    def id_part(self, histories: Sequence[np.ndarray], as_item: bool = False) -> Float[Tensor, "batch d_id"]:
        """The ID model's state for the next item, or (as_item) the item's own embedding; zeros where it knows none."""
        some, rows = self._known(histories)
        part = torch.zeros(len(histories), self.id_model.d_id)
        if rows and as_item:
            part[some] = self.id_model.item_embeddings()[torch.tensor([int(h[-1]) - 1 for h in rows])]
        elif rows:
            part[some] = self.id_model.next_item_state(pad_histories(rows, self.id_model.max_history)).float()
        return part

    def embed(
        self, histories: Sequence[np.ndarray], as_item: bool = False
    ) -> tuple[Float[Tensor, "batch d_out"], Route | None]:
        """Embeddings of one batch, as they are compared."""
        part = self._id_part_if_used(histories, as_item)
        if as_item and self.mean_items:
            items = torch.tensor([int(h[-1]) - 1 for h in histories])
            return self.laser.head(self.catalogue.means[items], part), None
        outputs, route = self.outputs(histories, as_item)
        return (self.laser.head(outputs, part) if as_item else self.users(outputs, histories, part)), route

    @property
    def mean_items(self) -> bool:
        """Whether items are mean outputs over their texts (prompt.item_side)."""
        return self.laser.config.prompt.item_side == ItemSide.MEAN

    def users(self, outputs: Float[Tensor, "batch d_llm"], histories: Sequence[np.ndarray],
              id_part: Float[Tensor, "batch d_id"] | None = None) -> Float[Tensor, "batch d_out"]:
        """The head on users' LLM outputs."""
        if not self.mean_items:
            return self.laser.head(outputs, id_part)
        return self.laser.head.users(outputs, self._sums(histories), id_part)

    @torch.no_grad()
    def _sums(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch d_text"]:
        """The histories' items as whitened mean outputs of unit length, summed, newer ones heavier."""
        means, whiten = self.catalogue.means, self.laser.head.whiten_items
        return weighed_sums(histories, lambda items: whiten(means[items - 1]), self.laser.config.neighbours.recency)

    def embed_item_outputs(
        self, outputs: Float[Tensor, "items d_items"], first: int = 1
    ) -> Float[Tensor, "items d_out"]:
        """The head on the LLM outputs of items `first`, first + 1 ..."""
        items = [np.array([i], dtype=np.int32) for i in range(first, first + len(outputs))]
        return self.laser.head(outputs, self._id_part_if_used(items, as_item=True))

    def _id_part_if_used(self, histories: Sequence[np.ndarray], as_item: bool) -> Tensor | None:
        return self.id_part(histories, as_item) if self.laser.head.id_share else None

    @torch.no_grad()
    def encode(
        self,
        histories: Sequence[np.ndarray],
        batch_size: int,
        as_item: bool = False,
        raw: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "histories d_out"]:
        """Embeddings of any number of histories, in the order given, without gradient or dropout.
        raw: the LLM's outputs before the head."""
        training = self._stop_training()
        order = np.argsort([self.catalogue.text_length(h) for h in histories], kind="stable")
        parts = []
        for at in range(0, len(order), batch_size):
            chunk = [histories[i] for i in order[at : at + batch_size]]
            parts.append((self.outputs if raw else self.embed)(chunk, as_item)[0])
            if progress:
                progress(len(chunk))
        if training:
            self.laser.train()
        out = torch.cat(parts)
        return out[torch.as_tensor(np.argsort(order, kind="stable"))]

    @torch.no_grad()
    def read(self, histories: Sequence[np.ndarray]) -> tuple[Float[Tensor, "batch d_out"], Route | None]:
        """`embed` without gradient or dropout: one batch, one forward."""
        training = self._stop_training()
        read = self.embed(histories)
        if training:
            self.laser.train()
        return read

    def _stop_training(self) -> bool:
        """Whether dropout was on; where it is off already, the walk over all modules is saved."""
        training = self.laser.training
        if training:
            self.laser.eval()
        return training

    def encode_items(self, batch_size: int, first: int = 1, raw: bool = False,
                     progress: Callable[[int], None] | None = None) -> Float[Tensor, "items d_out"]:
        """Embeddings of the items from dense item `first` on; each is a history of itself (paper, 3.1.1), or the mean
        of the outputs over its text. raw: before the head."""
        if raw and self.mean_items:
            return self.catalogue.means[first - 1 :].clone()
        histories = [np.array([i], dtype=np.int32) for i in range(first, len(self.catalogue) + 1)]
        return self.encode(histories, batch_size, as_item=True, raw=raw, progress=progress)
