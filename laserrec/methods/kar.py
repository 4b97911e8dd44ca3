"""KAR (Xi et al. 2023, "Towards Open-World Recommendation with Knowledge Augmentation from Large Language Models").

Texts that an LLM wrote about items (facts) and users (preferences) are encoded by the frozen LLM, and a hybrid-expert
adaptor makes them further inputs of a recommender, here a SASRec.

An item's vector is its trained one plus its facts. A text about a user is a text about how the history began: it is
made of the first n items and is added to the states from the n-th item on, so that no state sees a text that knew its
target, in training as in use. Whoever has the same first n items has the same text; all others have none.
"""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import KARConfig
from laserrec.data.prompt import item_line
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.knowledge import LONGEST, NOTHING, Knowledge, read_knowledge
from laserrec.methods.parts import CausalEncoder, ItemVectors, vectors_of_texts
from laserrec.methods.sequence import NextItemModel, initialise, seen_offset

_HASH = 6364136223846793005
"""Multiplier of a polynomial hash modulo 2 ** 64 (Knuth's)."""


class HybridExperts(nn.Module):
    """Adaptor of one kind of text (the paper's Eq. 5 and 6): outputs of experts that all kinds share and of the kind's
    own, weighed by the softmax of a gate over the text's vector."""

    def __init__(self, config: KARConfig, shared: nn.ModuleList, d_text: int):
        super().__init__()
        self.shared = shared
        self.own = nn.ModuleList(expert(config, d_text) for _ in range(config.own_experts))
        self.gate = nn.Linear(d_text, len(shared) + config.own_experts)

    def forward(self, texts: Float[Tensor, "*batch d_text"]) -> Float[Tensor, "*batch d_model"]:
        """Knowledge vectors."""
        outputs = torch.stack([one(texts) for one in (*self.shared, *self.own)], dim=-2)
        return (self.gate(texts).softmax(dim=-1)[..., None] * outputs).sum(dim=-2)


def expert(config: KARConfig, d_text: int) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(d_text, config.d_expert), nn.ReLU(), nn.Linear(config.d_expert, config.d_model))


class KAR(NextItemModel):
    """keys: hashes of beginnings of histories that there are texts about, ascending; texts: those texts' vectors."""

    keys: Int[Tensor, "texts"]
    texts: Float[Tensor, "texts d_text"]

    def __init__(self, config: KARConfig, n_items: int, d_text: int, n_texts: int):
        super().__init__()
        self.config, self.n_items, self.pad = config, n_items, n_items
        self.item = nn.Embedding(n_items + 1, config.d_model, padding_idx=self.pad)
        self.body = CausalEncoder(config)
        initialise(self)  # the experts keep PyTorch's start, as published: else facts drown in the trained vectors
        shared = nn.ModuleList(expert(config, d_text) for _ in range(config.shared_experts))
        self.facts = HybridExperts(config, shared, d_text)
        self.preferences = HybridExperts(config, shared, d_text) if n_texts else None
        self.seen = seen_offset(config.seen_offset)
        self.register_buffer("keys", torch.zeros(n_texts, dtype=torch.long))
        self.register_buffer("texts", torch.zeros(n_texts, d_text))
        self.item_facts = ItemVectors(self.facts)

    def item_embeddings(self) -> Float[Tensor, "n_items d_model"]:
        """Trained vectors and facts."""
        return self.item.weight[: self.n_items] + self.item_facts()

    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """SASRec's, and the preferences from where they are known."""
        states = self.body(self.item(items) + self.item_facts(items))
        if self.preferences is None:
            return states
        text, since = self.begun(items)
        known = (torch.arange(items.shape[1], device=items.device) >= since[:, None]) & (text >= 0)[:, None]
        return states + known[..., None] * self.preferences(self.texts[text.clamp(min=0)])[:, None]

    def begun(self, items: Int[Tensor, "batch seq"]) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
        """The text about the longest known beginning of each history, -1 where there is none, and the place of the
        beginning's last item. A history that is cut to its newest max_history items begins with the first of them."""
        key = torch.zeros(len(items), dtype=torch.long, device=items.device)
        text, since = torch.full_like(key, -1), torch.zeros_like(key)
        for place in range(min(items.shape[1], LONGEST)):
            key = _longer(key, items[:, place])
            at = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
            hit = (self.keys[at] == key) & (items[:, place] != self.pad)
            text, since = torch.where(hit, at, text), torch.where(hit, place, since)
        return text, since

    def know(self, beginnings: list[list[int]], texts: Float[Tensor, "texts d_text"]) -> None:
        """Take texts about beginnings of histories, in item rows."""
        keys = torch.tensor([_key(rows) for rows in beginnings], dtype=torch.long, device=texts.device)
        order = keys.argsort()
        self.keys.copy_(keys[order])
        self.texts.copy_(texts[order])

    def item_tensors(self) -> dict[str, Tensor]:
        """What a model folder keeps of the items: their facts, adapted."""
        return {"facts": self.item_facts()}

    # -- making and reading one ---------------------------------------------------------------------------------

    @staticmethod
    def fresh(config: Any, items: pl.DataFrame, features: TextFeatures) -> KAR:
        """Over these items, untrained. Raises UserError where the folder of texts can't be read or none of it is about
        these items, and warns where much of it is about others."""
        own: KARConfig = config.kar
        row = {name: number for number, name in enumerate(items["item_id"])}
        knowledge = NOTHING if own.knowledge is None else read_knowledge(own.knowledge).about(row, own.knowledge)
        about = knowledge.histories
        facts = _facts(items, knowledge, features)
        model = KAR(own, items.height, facts.shape[1], len(about)).to(features.device)
        if about:
            model.know([[row[i] for i in begun] for begun in about], vectors_of_texts(features, [*about.values()])[0])
        model.item_facts = ItemVectors(model.facts, (facts,))
        return model

    @staticmethod
    def restored(config: Any, items: pl.DataFrame, n_known: int, features: TextFeatures, weights: dict[str, Tensor],
                 kept: dict[str, Tensor]) -> KAR:
        """Ready for `weights`, with the item tensors. Raises RuntimeError where they don't fit."""
        if kept["facts"].shape != (n_known, config.kar.d_model):
            raise RuntimeError(f"facts of shape {tuple(kept['facts'].shape)} of {n_known} items")
        n_texts, d_text = weights["texts"].shape
        model = KAR(config.kar, n_known, d_text, n_texts)
        model.item_facts = ItemVectors(model.facts, vectors=kept["facts"])
        return model

    @staticmethod
    def shapes(config: Any, n_known: int) -> dict[str, tuple[int, ...]]:
        """Of its largest weights."""
        own: KARConfig = config.kar
        return {"item.weight": (n_known + 1, own.d_model), "body.position.weight": (own.max_history, own.d_model),
                f"body.blocks.{own.blocks - 1}.feed.0.weight": (own.d_inner, own.d_model),
                f"facts.own.{own.own_experts - 1}.2.weight": (own.d_model, own.d_expert),
                f"facts.shared.{own.shared_experts - 1}.2.weight": (own.d_model, own.d_expert)}


def _facts(items: pl.DataFrame, knowledge: Knowledge, features: TextFeatures) -> Float[Tensor, "items d_text"]:
    """Vectors of the items' texts, with what was written about them behind."""
    if not (knowledge.items or knowledge.histories):
        return features.vectors(items)  # which other methods read too
    rows = items.iter_rows(named=True)
    lines = [f"{item_line(row, features.prompt.attributes)}. {knowledge.items.get(row['item_id'], '')}".rstrip(". ")
             for row in rows]
    return vectors_of_texts(features, lines)[0]


def _longer(key: Tensor, item: Tensor) -> Tensor:
    """The hash of a history that is one item longer; wraps at 64 bits."""
    return key * _HASH + item + 1


def _key(rows: list[int]) -> int:
    key = 0
    for row in rows:
        key = (key * _HASH + row + 1) % 2**64
    return key - 2**64 if key >= 2**63 else key
