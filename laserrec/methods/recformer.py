"""RECFORMER (Li, Wang, Li, Chen, Fu, Shen, Shang & McAuley 2023, "Text Is All You Need: Learning Language
Representations for Sequential Recommendation", KDD).

An item is the text of its attributes, a user the texts of the history's items, newest first, behind a [CLS] token. One
transformer with sliding-window attention (Longformer, Beltagy et al. 2020) reads both, and its output at [CLS] is the
embedding. Nothing is known of an item but its text. Here it starts from the frozen LLM's token embeddings, through a
trained linear map, since the authors' pre-trained weights are not to be had.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.config import Config, Cuts, RecFormerConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.llm.backbone import Backbone
from laserrec.methods.attribute_text import CLS, Attributes, Texts
from laserrec.methods.laser.examples import Batch, LaserExamples, epoch_examples
from laserrec.methods.protocol import Phase, Trainable, TwoTower
from laserrec.util.device import move
from laserrec.util.errors import UserError

_AT_ONCE = 256
"""Texts per pass where nothing is trained."""
_STD = 0.02
"""Standard deviation of fresh embeddings."""


def sliding_attention(
    q: Float[Tensor, "batch heads seq dim"], k: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq dim"], real: Bool[Tensor, "batch seq"], half: int,
) -> Float[Tensor, "batch heads seq dim"]:
    """Attention to at most `half` tokens on either side and to the first token, which reads all. Time and memory grow
    with seq * half. Queries stand in blocks of `half`; each block reads itself and its two neighbours."""
    seq, scale, device = q.shape[2], q.shape[-1] ** -0.5, q.device
    count = math.ceil(seq / half)
    blocks = [F.pad(x, (0, 0, 0, count * half - seq)).unflatten(2, (count, half)) for x in (q, k, v)]
    near_k, near_v = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x, F.pad(x, (0, 0, 0, 0, 0, 1))[:, :, 1:]],
                                dim=3) for x in blocks[1:])
    query = torch.arange(count * half, device=device).view(count, half, 1)
    key = (torch.arange(count, device=device) - 1)[:, None] * half + torch.arange(3 * half, device=device)
    near = ((query - key[:, None]).abs() <= half) & ((key > 0) & (key < seq))[:, None]  # the first token is read apart
    mask = near & real[:, key.clamp(0, seq - 1)][:, None, :, None]
    scores = (blocks[0] @ near_k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    first = blocks[0] @ k[:, :, None, 0, :, None] * scale
    weights = torch.cat([first, scores], dim=-1).softmax(dim=-1)
    out = weights[..., :1] * v[:, :, None, :1] + weights[..., 1:] @ near_v
    everywhere = (q[:, :, :1] @ k.transpose(-1, -2) * scale).masked_fill(~real[:, None, None], -torch.inf)
    return torch.cat([everywhere.softmax(dim=-1) @ v, out.flatten(2, 3)[:, :, 1:seq]], dim=2)


class Block(nn.Module):
    """Sliding-window attention, then a feed-forward, both residual and normalised behind the sum."""

    def __init__(self, config: RecFormerConfig):
        super().__init__()
        d = config.d_model
        self.heads, self.reach, self.dropout = config.heads, config.window // 2, nn.Dropout(config.dropout)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.attention_norm, self.feed_norm = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Float[Tensor, "batch seq d_model"], real: Bool[Tensor, "batch seq"]) -> Tensor:
        """[batch seq d_model]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = sliding_attention(q, k, v, real, self.reach).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.dropout(self.out(y)))
        return self.feed_norm(x + self.dropout(self.feed(x)))


class RecFormer(nn.Module, TwoTower):
    """A two-tower model of cosines that takes new items. The LLM's token table is in no state_dict."""

    def __init__(self, config: RecFormerConfig, items: pl.DataFrame, backbone: Backbone):
        super().__init__()
        d = config.d_model
        self.config, self.backbone, self.attributes = config, backbone, Attributes(backbone, config, items)
        self.word = nn.Linear(backbone.d_llm, d, bias=False)
        self.special, self.token_type = nn.Embedding(2, d), nn.Embedding(3, d)
        self.position, self.place = nn.Embedding(config.max_tokens, d), nn.Embedding(config.max_items + 1, d)
        self.norm, self.dropout = nn.LayerNorm(d), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.mask_head = nn.Linear(d, d) if config.pretrains else None
        for embedding in (self.special, self.token_type, self.position, self.place):
            nn.init.normal_(embedding.weight, std=_STD)
        token_std = float(backbone.embedding.float().std())
        nn.init.normal_(self.word.weight, std=_STD / (token_std * backbone.d_llm**0.5))
        self.to(backbone.device)
        self.vectors: Float[Tensor, "n_items d_model"] = torch.zeros(0, d, device=backbone.device)
        """The items', of unit length."""

    def words(self, tokens: Int[Tensor, "*some"]) -> Float[Tensor, "*some d_model"]:
        """Embeddings of tokens, [CLS] and [MASK]."""
        size = len(self.backbone.embedding)
        known = self.word(self.backbone.embed(tokens.clamp(max=size - 1)).float())
        own = self.special((tokens - size).clamp(min=0))
        return torch.where((tokens < size)[..., None], known, own)

    def states(self, texts: Texts) -> Float[Tensor, "batch seq d_model"]:
        """Outputs of every token; texts on the model's device."""
        x = self.words(texts.tokens) + self.position.weight[: texts.tokens.shape[1]]
        x = self.dropout(self.norm(x + self.token_type(texts.types) + self.place(texts.places)))
        for block in self.blocks:
            x = block(x, texts.real)
        return x

    def encode(self, histories: Histories, attributes: Attributes | None = None) -> Float[Tensor, "users d_model"]:
        """Of unit length. attributes: of another catalogue."""
        texts = (attributes or self.attributes).read(histories.to(torch.device("cpu")))
        return F.normalize(self.states(texts.to(self.backbone.device))[:, 0], dim=-1)

    def encode_rows(self, rows: Int[Tensor, "items"], attributes: Attributes | None = None
                    ) -> Float[Tensor, "items d_model"]:
        """Of items, each read as a history of itself."""
        return self.encode(Histories(rows, torch.arange(1, len(rows) + 1)), attributes)

    @torch.no_grad()
    def encode_items(self, first: int = 0) -> Float[Tensor, "items d_model"]:
        """Embeddings of all items from row `first` on, without dropout."""
        self.eval()
        parts = torch.arange(first, len(self.attributes)).split(_AT_ONCE)
        return torch.cat([self.encode_rows(rows) for rows in parts if len(rows)] or [self.vectors[:0]])

    @torch.no_grad()
    def users(self, histories: Histories) -> Float[Tensor, "users d_out"]:
        """Embeddings of unit length."""
        return self.encode(histories)

    def items(self, rows: Int[Tensor, "some"] | None = None) -> Float[Tensor, "items d_out"]:
        """Embeddings of unit length."""
        return self.vectors if rows is None else self.vectors[rows]

    def add_items(self, items: pl.DataFrame, vectors: Float[Tensor, "new d_out"] | None = None,
                  means: Float[Tensor, "new d_means"] | None = None) -> Float[Tensor, "new d_out"]:
        """As `Growing.add_items`; it keeps no means."""
        first = len(self.vectors)
        try:
            self.attributes.add(items)
            vectors = self.encode_items(first) if vectors is None else vectors.to(self.backbone.device)
        except BaseException:
            self.attributes.truncate(first)
            raise
        self.vectors = torch.cat([self.vectors, vectors])
        return vectors

    def transferred(self, items: pl.DataFrame) -> RecFormer:
        """The same weights over another catalogue (columns title and the other attributes)."""
        other = copy.copy(self)
        other.attributes = Attributes(self.backbone, self.config, items)
        other.vectors = other.encode_items()
        return other

    def item_tensors(self) -> dict[str, Tensor]:
        """What a model folder keeps of the items beside their text."""
        return {"vectors": self.vectors}


class RecFormerTask(Trainable):
    """One stage. fixed: the items' embeddings stay as they are (stage 2); else they are encoded anew
    before each epoch, and an epoch is validated with those that it was trained with, as in the authors' code."""

    def __init__(self, model: RecFormer, dataset: Dataset, fixed: bool):
        self.module, self.sequences, self.fixed = model, dataset.train_sequences, fixed
        self.encoded_for = 0
        """The epoch whose items' embeddings the model has."""

    def start(self, pause: Callable[[], None]) -> None:
        """Encode the items for the first epoch."""
        if not self.fixed:
            self.module.vectors, self.encoded_for = self.module.encode_items(), 1

    def decayed(self) -> Iterable[Tensor]:
        """Weights of linear maps."""
        return (m.weight for m in self.module.modules() if isinstance(m, nn.Linear))

    def begin_epoch(self, number: int) -> LaserExamples:
        """One random position of each training sequence."""
        if not self.fixed and self.encoded_for != number:  # a resumed epoch has its embeddings already
            self.module.vectors, self.encoded_for = self.module.encode_items(), number
        self.module.train()
        return _examples(self.module.attributes, self.sequences, (self.module.config.seed, 1 + self.fixed, number))

    def loss(self, batch: Batch, rows: Int[np.ndarray, "some"]) -> dict[str, Tensor]:
        """Cross-entropy over all items, the rows' share of the batch's mean."""
        logits = self.module.encode(batch.histories.take(rows)) @ self.module.vectors.T / self.module.config.temperature
        targets = move(batch.targets[torch.as_tensor(rows)], logits.device)
        return {"loss": F.cross_entropy(logits, targets, reduction="sum") / len(batch.targets)}

    def state(self) -> dict[str, Tensor]:
        """The model's, its items' embeddings, and for which epoch they were made."""
        weights = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        return {**weights, "vectors": self.module.vectors, "encoded_for": torch.tensor(self.encoded_for)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        self.module.load_state_dict({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")})
        self.module.vectors, self.encoded_for = state["vectors"], int(state["encoded_for"])


class PretrainTask(RecFormerTask):
    """Pre-training on one or more catalogues: asks for hidden tokens of a history's text, and for its next item among
    the batch's. One pass over the text with hidden tokens serves both; the authors make two."""

    def __init__(self, model: RecFormer, dataset: Dataset, sources: Sequence[Dataset]):
        super().__init__(model, dataset, fixed=False)
        wanted = "item_id", *model.config.attributes
        frames = [source.items.select(name for name in dict.fromkeys(wanted) if name in source.items.columns)
                  for source in sources]
        self.attributes = Attributes(model.backbone, model.config, pl.concat(frames, how="diagonal"))
        first = np.cumsum([0, *(source.n_items for source in sources)])
        items = [source.train_sequences.items + int(at) for source, at in zip(sources, first, strict=False)]
        ends = torch.cat([source.train_sequences.lengths for source in sources]).cumsum(0)
        self.sequences = Histories(torch.cat(items), ends)
        self.vocabulary = self.attributes.tokens.unique()

    def begin_epoch(self, number: int) -> LaserExamples:
        """One random position of each training sequence of all of them."""
        self.module.train()
        return _examples(self.attributes, self.sequences, (self.module.config.seed, 0, number))

    def loss(self, batch: Batch, rows: Int[np.ndarray, "some"]) -> dict[str, Tensor]:
        """Item contrast + mask_weight x hidden tokens, as shares of the batch's."""
        model, config, share = self.module, self.module.config, len(rows) / len(batch.targets)
        texts, targets = self.attributes.read(batch.histories.take(rows)), batch.targets[torch.as_tensor(rows)]
        asked = texts.real & (texts.types != CLS) & (torch.rand(texts.tokens.shape) < config.mask_probability)
        labels = torch.searchsorted(self.vocabulary, texts.tokens[asked])
        states = model.states(replace(texts, tokens=self._hidden(texts.tokens, asked)).to(model.backbone.device))
        users, items = F.normalize(states[:, 0], dim=-1), model.encode_rows(targets, self.attributes)
        same = (targets[:, None] == targets) & ~torch.eye(len(targets), dtype=torch.bool)
        logits = (users @ items.T / config.temperature).masked_fill(move(same, users.device), -torch.inf)
        contrast = F.cross_entropy(logits, torch.arange(len(targets), device=users.device)) * share
        at = move(asked.flatten().nonzero()[:, 0], users.device)
        assert model.mask_head is not None  # there where something is pre-trained
        words = model.words(move(self.vocabulary, users.device))
        found = model.mask_head(states.flatten(0, 1)[at]) @ words.T
        told = F.cross_entropy(found, move(labels, users.device), reduction="sum") / max(1, len(labels)) * share
        return {"loss": contrast + config.mask_weight * told, "contrast": contrast, "hidden": told}

    def _hidden(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Of the tokens asked for, 80% are [MASK], 10% random and 10% as they were, as in BERT."""
        chance = torch.rand(tokens.shape)
        drawn = self.vocabulary[torch.randint(len(self.vocabulary), tokens.shape)]
        hidden = torch.where(asked & (chance < 0.9), drawn, tokens)
        return hidden.masked_fill(asked & (chance < 0.8), self.attributes.cls + 1)

    def end_epoch(self) -> None:
        """Encode the items that are to be recommended: there may be no further epoch."""
        self.module.vectors = self.module.encode_items()


def _examples(attributes: Attributes, sequences: Histories, seed: tuple[int, ...]) -> LaserExamples:
    of, cut = epoch_examples(sequences, Cuts.RANDOM, seed)
    total = torch.cat([torch.zeros(1, dtype=torch.long), attributes.lengths[sequences.items].cumsum(0)])
    end = sequences.starts[of] + cut
    window = cut.clamp(max=attributes.config.max_items)
    return LaserExamples(sequences, of, cut, (1 + total[end] - total[end - window]).numpy(), 0.0)


def phases(model: RecFormer, config: Config, dataset: Dataset) -> list[Phase]:
    """Pre-training, if it is asked for, then the two stages. Raises UserError where a folder is no data folder, and
    where the items lack an attribute."""
    own = model.config
    if missing := [name for name in own.attributes if name not in dataset.items.columns]:
        there = ", ".join(name for name in dataset.items.columns if name not in ("item", "item_id"))
        raise UserError(f"recformer.attributes names {missing[0]!r}, which is no column of the data folder's items; "
                        f"there are: {there}")
    shared: dict[str, Any] = {"batch_size": own.batch_size, "lr": own.lr, "weight_decay": own.weight_decay,
                              "warmup_fraction": own.warmup_fraction}
    out = []
    if own.pretrains:
        sources = [dataset] * own.pretrain_own + [Dataset.load(folder) for folder in own.pretrain_on]
        out.append(Phase("pre-training", PretrainTask(model, dataset, sources), own.pretrain_epochs, validates=False,
                         **shared))
    out.append(Phase("stage 1", RecFormerTask(model, dataset, fixed=False), own.max_epochs, patience=own.patience,
                     eval_every=own.eval_every, **shared))
    if own.stage_two_epochs:
        out.append(Phase("stage 2", RecFormerTask(model, dataset, fixed=True), own.stage_two_epochs,
                         patience=own.stage_two_patience, eval_every=own.eval_every, **shared))
    return out


def restore(model: RecFormer, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> RecFormer:
    """A fresh model with fitted weights and item embeddings. Raises RuntimeError where they don't fit."""
    model.load_state_dict(weights)
    wanted = len(model.attributes), model.config.d_model
    if kept["vectors"].shape != wanted:
        raise RuntimeError(f"embeddings of shape {tuple(kept['vectors'].shape)}, not {wanted}")
    model.vectors = kept["vectors"].to(model.backbone.device)
    return model.eval().requires_grad_(False)


def shapes(config: RecFormerConfig) -> dict[str, tuple[int, ...]]:
    """Of the largest weights, as the settings claim them."""
    d = config.d_model
    return {"position.weight": (config.max_tokens, d), "place.weight": (config.max_items + 1, d),
            f"blocks.{config.blocks - 1}.qkv.weight": (3 * d, d)}
