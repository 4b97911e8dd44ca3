"""ZESRec (Ding et al. 2021, "Zero-Shot Recommender Systems"): an item is one layer over the frozen LLM's vector of its
text, a user a recurrent network over such items; the score is their product.

Nothing in it belongs to an item, so a fitted model takes new items and scores whole other catalogues by their texts.
Texts are whitened as the catalogue was that it was trained on, wherever it is used. The paper adds an offset of its own
to each training item, drawn around the layer's output, and leaves it out for new data; here there is none.
"""

from __future__ import annotations

import copy
from typing import Any

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import ZESRecBody, ZESRecConfig
from laserrec.llm.text_features import TextFeatures, text_whitening
from laserrec.llm.whitening import whiten
from laserrec.methods.parts import CausalEncoder, ItemVectors
from laserrec.methods.sequence import WEIGHT_STD, NextItemModel, initialise, seen_offset
from laserrec.util.errors import UserError


class Recurrent(nn.Module):
    """A GRU (Hidasi et al. 2016) over vectors, normalised before."""

    def __init__(self, config: ZESRecConfig):
        super().__init__()
        d, between = config.d_model, config.dropout if config.blocks > 1 else 0.0
        self.norm, self.dropout = nn.LayerNorm(d), nn.Dropout(config.dropout)
        self.gru = nn.GRU(d, d, config.blocks, dropout=between)

    def forward(self, x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        """A state per vector, of those up to it."""
        steps = self.dropout(self.norm(x)).transpose(0, 1).contiguous()
        return self.gru(steps)[0].transpose(0, 1)


class ZESRec(NextItemModel):
    """Item vectors are made of texts alone: the whitening's statistics and the layer over it are all that is kept."""

    mean: Float[Tensor, "d_means"]
    matrix: Float[Tensor, "d_means dims"]

    def __init__(self, config: ZESRecConfig, n_items: int, features: TextFeatures, d_means: int, dims: int,
                 parts: int):
        super().__init__()
        self.config, self.texts, self.parts = config, features, parts
        self.register_buffer("mean", torch.zeros(d_means))
        self.register_buffer("matrix", torch.zeros(d_means, dims))
        self.adaptor = nn.Linear(parts * dims, config.d_model)
        self.body = Recurrent(config) if config.body == ZESRecBody.GRU else CausalEncoder(config)
        initialise(self)
        nn.init.normal_(self.adaptor.weight, std=WEIGHT_STD * self.adaptor.in_features**-0.5)
        self.seen = seen_offset(config.seen_offset)
        self.n_items = self.pad = n_items
        self.table = ItemVectors(self.adaptor)

    def item_embeddings(self) -> Float[Tensor, "n_items d_model"]:
        """The universal item embeddings."""
        return self.table()

    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """Of the items up to each."""
        return self.body(self.table(items))

    # -- other items --------------------------------------------------------------------------------------------

    def white(self, items: pl.DataFrame) -> Float[Tensor, "items d_text"]:
        """Text vectors of any items, whitened as those that it was trained on. Raises UserError where only one of the
        two catalogues has vectors of its own, or theirs are of another length."""
        means = self.texts.means(items)
        if self.texts.parts(items) != self.parts or means.shape[1] != len(self.mean):
            raise UserError("the model was fitted on items with other vectors of their own, or with none "
                            "(backbone.item_vectors), than these items have; it can't compare them")
        return whiten(means, self.mean, self.matrix, self.parts)

    def learn_from(self, items: pl.DataFrame) -> None:
        """Have these as the catalogue, whose vectors change with the layer over their texts."""
        self.table = ItemVectors(self.adaptor, (self.white(items),))
        self.n_items = self.pad = items.height

    def take_items(self, vectors: Float[Tensor, "items d_model"]) -> None:
        """Have these as the catalogue."""
        self.table = ItemVectors(self.adaptor, vectors=vectors)
        self.n_items = self.pad = len(vectors)

    @torch.no_grad()
    def add_items(self, items: pl.DataFrame, vectors: Float[Tensor, "new d_out"] | None = None,
                  means: Float[Tensor, "new d_means"] | None = None) -> Float[Tensor, "new d_out"]:
        """As `Growing.add_items`; it keeps no means."""
        vectors = self.adaptor(self.white(items)) if vectors is None else vectors.to(self.device)
        self.take_items(torch.cat([self.table(), vectors]))
        return vectors

    @torch.no_grad()
    def transferred(self, items: pl.DataFrame) -> ZESRec:
        """The same weights over another catalogue (columns title and the attributes), which is read by the LLM."""
        other = copy.copy(self)
        other.take_items(self.adaptor(self.white(items)))
        return other

    def item_tensors(self) -> dict[str, Tensor]:
        """What a model folder keeps of the items: their embeddings."""
        return {"vectors": self.table()}

    # -- making and reading one ---------------------------------------------------------------------------------

    @staticmethod
    def fresh(config: Any, items: pl.DataFrame, features: TextFeatures) -> ZESRec:
        """Over these items, untrained."""
        parts = features.parts(items)
        mean, matrix = text_whitening(features.means(items), parts)
        model = ZESRec(config.zesrec, items.height, features, *matrix.shape, parts).to(features.device)
        model.mean.copy_(mean)
        model.matrix.copy_(matrix)
        model.learn_from(items)
        return model

    @staticmethod
    def restored(config: Any, items: pl.DataFrame, n_known: int, features: TextFeatures, weights: dict[str, Tensor],
                 kept: dict[str, Tensor]) -> ZESRec:
        """Ready for `weights`, with the item tensors. Raises RuntimeError where they don't fit."""
        if kept["vectors"].shape != (items.height, config.zesrec.d_model):
            raise RuntimeError(f"embeddings of shape {tuple(kept['vectors'].shape)} of {items.height} items")
        d_means, dims = weights["matrix"].shape
        model = ZESRec(config.zesrec, items.height, features, d_means, dims, weights["adaptor.weight"].shape[1] // dims)
        model.take_items(kept["vectors"])
        return model

    @staticmethod
    def shapes(config: Any, n_known: int) -> dict[str, tuple[int, ...]]:
        """Of its largest weights."""
        own: ZESRecConfig = config.zesrec
        if own.body == ZESRecBody.GRU:
            return {f"body.gru.weight_hh_l{own.blocks - 1}": (3 * own.d_model, own.d_model)}
        return {"body.position.weight": (own.max_history, own.d_model),
                f"body.blocks.{own.blocks - 1}.feed.0.weight": (own.d_inner, own.d_model)}
