"""FDSA (Zhang et al. 2019, "Feature-level Deeper Self-Attention Network for Sequential Recommendation", IJCAI): one
causal transformer over the history's items and one over their features; the two last states give the user's vector.

Features are vectors of the items' texts from the frozen LLM, each field through a layer of its own. All positions are
targets with a full softmax, as in our SASRec; the paper samples one negative each.
"""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.config import FDSAConfig, PromptConfig
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.parts import CausalEncoder, ItemVectors, vectors_of_texts
from laserrec.methods.sequence import NextItemModel, initialise, seen_offset


class FieldPooling(nn.Module):
    """The paper's vanilla attention over the fields of an item: the softmax of one score for each field weighs them."""

    def __init__(self, fields: int, d_text: int, d_model: int):
        super().__init__()
        self.adaptors = nn.ModuleList(nn.Linear(d_text, d_model) for _ in range(fields))
        self.score = nn.Linear(d_model, 1)

    def forward(self, texts: Float[Tensor, "items fields d_text"], known: Bool[Tensor, "items fields"]
                ) -> Float[Tensor, "items d_model"]:
        """Feature vectors of items; fields that an item does not have are left out."""
        x = torch.stack([layer(field) for layer, field in zip(self.adaptors, texts.unbind(1), strict=True)], dim=1)
        scores = self.score(x)[..., 0].masked_fill(~known, -torch.inf)
        return (scores.softmax(dim=-1)[..., None] * x).sum(dim=1)


class FDSA(NextItemModel):
    """Scores are products of the user's vector with the table of IDs."""

    def __init__(self, config: FDSAConfig, n_items: int, fields: int, d_text: int):
        super().__init__()
        self.config, self.n_items, self.pad, d = config, n_items, n_items, config.d_model
        self.item = nn.Embedding(n_items + 1, d, padding_idx=self.pad)
        self.pooling = FieldPooling(fields, d_text, d)
        self.ids, self.texts = CausalEncoder(config), CausalEncoder(config)
        self.joined, self.norm, self.dropout = nn.Linear(2 * d, d), nn.LayerNorm(d), nn.Dropout(config.dropout)
        initialise(self)
        self.seen = seen_offset(config.seen_offset)
        self.features = ItemVectors(self.pooling)

    def item_embeddings(self) -> Float[Tensor, "n_items d_model"]:
        """The table of IDs."""
        return self.item.weight[: self.n_items]

    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """Both transformers' states, joined by one layer and normalised."""
        both = torch.cat([self.ids(self.item(items)), self.texts(self.features(items))], dim=-1)
        return self.dropout(self.norm(self.joined(both)))

    def item_tensors(self) -> dict[str, Tensor]:
        """What a model folder keeps of the items: their feature vectors."""
        return {"features": self.features()}

    # -- making and reading one ---------------------------------------------------------------------------------

    @staticmethod
    def fresh(config: Any, items: pl.DataFrame, features: TextFeatures) -> FDSA:
        """Over these items, untrained."""
        texts, known = field_vectors(features, items, config.prompt, config.fdsa.separate_fields)
        model = FDSA(config.fdsa, items.height, texts.shape[1], texts.shape[2]).to(features.device)
        model.features = ItemVectors(model.pooling, (texts, known))
        return model

    @staticmethod
    def restored(config: Any, items: pl.DataFrame, n_known: int, features: TextFeatures, weights: dict[str, Tensor],
                 kept: dict[str, Tensor]) -> FDSA:
        """Ready for `weights`, with the item tensors. Raises RuntimeError where they don't fit."""
        fields = sum(name.startswith("pooling.adaptors.") and name.endswith(".weight") for name in weights)
        model = FDSA(config.fdsa, n_known, fields, weights["pooling.adaptors.0.weight"].shape[1])
        if kept["features"].shape != (n_known, config.fdsa.d_model):
            raise RuntimeError(f"features of shape {tuple(kept['features'].shape)} of {n_known} items")
        model.features = ItemVectors(model.pooling, vectors=kept["features"])
        return model

    @staticmethod
    def shapes(config: Any, n_known: int) -> dict[str, tuple[int, ...]]:
        """Of its largest weights."""
        own: FDSAConfig = config.fdsa
        return {"item.weight": (n_known + 1, own.d_model), "texts.position.weight": (own.max_history, own.d_model),
                f"ids.blocks.{own.blocks - 1}.feed.0.weight": (own.d_inner, own.d_model)}


def field_vectors(features: TextFeatures, items: pl.DataFrame, prompt: PromptConfig, separate: bool
                  ) -> tuple[Float[Tensor, "items fields d_text"], Bool[Tensor, "items fields"]]:
    """Whitened text vectors of each field of each item, and which of them there are: title and attributes, or the whole
    text as the only field. The first is always there."""
    if not separate:
        vectors = features.vectors(items)[:, None]
        return vectors, torch.ones(len(vectors), 1, dtype=torch.bool, device=vectors.device)
    names = ["title", *(name for name in prompt.attributes if name in items.columns and items[name].count())]
    columns = [items[name].fill_null("untitled") if name == "title" else items[name] for name in names]
    read = [vectors_of_texts(features, column.cast(pl.String).to_list()) for column in columns]
    vectors, known = zip(*read, strict=True)
    return torch.stack(vectors, dim=1), torch.stack(known, dim=1)
