"""Parts that several rivals share: causal attention over given vectors; items that a trained layer makes of texts."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.config import SequenceRivalConfig, TransformerConfig
from laserrec.llm.text_features import TextFeatures, whitened
from laserrec.methods.sequence import Block


class CausalEncoder(nn.Module):
    """Causal self-attention over vectors. Positions, which count from the first, are added; then come layer norm and
    dropout, as in the SASRec of UniSRec (Hou et al. 2022), with which the rivals' published settings were found."""

    def __init__(self, config: SequenceRivalConfig | TransformerConfig):
        super().__init__()
        self.position = nn.Embedding(config.max_history, config.d_model)
        self.norm, self.dropout = nn.LayerNorm(config.d_model), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.d_model, config.d_inner, config.heads, config.dropout)
                                    for _ in range(config.blocks))

    def forward(self, x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        """A state per vector. Padding stands on the right, where no vector in front of it can see it."""
        x, mask = self.enter(x), causal_mask(x)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def enter(self, x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        """What the first block reads."""
        return self.dropout(self.norm(x + self.position.weight[: x.shape[1]]))


def causal_mask(x: Float[Tensor, "batch seq d"]) -> Bool[Tensor, "batch 1 seq seq"]:
    """Which positions each one reads: those up to itself."""
    seq = x.shape[1]
    return torch.ones(seq, seq, dtype=torch.bool, device=x.device).tril().expand(len(x), 1, seq, seq)


class ItemVectors:
    """What a layer makes of inputs that stay the same, a row per item: computed anew while the layer is trained, once
    and for all later. The inputs are no part of a model's weights; a model folder keeps the vectors.

    layer: (inputs of some items) -> Float[some d]. inputs: tensors with a row per item; none where vectors are given.
    """

    def __init__(self, layer: nn.Module, inputs: Sequence[Tensor] = (),
                 vectors: Float[Tensor, "items d"] | None = None):
        self.layer, self.inputs, self.vectors = layer, tuple(inputs), vectors

    def __call__(self, rows: Int[Tensor, "*batch"] | None = None) -> Float[Tensor, "*batch_or_items d"]:
        """Of these rows, in any shape; None: of all items. A row behind the last (padding) gives some vector."""
        if self.vectors is None and not any(p.requires_grad for p in self.layer.parameters()):
            with torch.no_grad():
                self.vectors, self.inputs = self.layer(*self.inputs), ()
        if self.vectors is not None:
            return self.vectors if rows is None else self.vectors[rows.clamp(max=len(self.vectors) - 1)]
        if rows is None:
            return self.layer(*self.inputs)
        found, place = torch.unique(rows.clamp(max=len(self.inputs[0]) - 1), return_inverse=True)
        return self.layer(*(x[found] for x in self.inputs))[place]


def vectors_of_texts(features: TextFeatures, texts: Sequence[str | None]
                 ) -> tuple[Float[Tensor, "texts d_text"], Bool[Tensor, "texts"]]:
    """Whitened vectors of any texts from the frozen LLM, and which there are: those of None are zeros. Equal texts are
    read, and counted in the whitening, once. Raises ValueError where there is none at all."""
    column = pl.Series("title", texts, dtype=pl.String)
    distinct = column.drop_nulls().unique(maintain_order=True)
    if not len(distinct):
        raise ValueError("no texts")
    known = torch.tensor(column.is_not_null().to_list(), dtype=torch.bool, device=features.device)
    vectors = whitened(features.llm_means(distinct.to_frame()), max(1, len(features.config.mean_layers)))
    number = {text: row for row, text in enumerate(distinct)}
    rows = torch.tensor([number.get(text, 0) for text in column], dtype=torch.long, device=vectors.device)
    return vectors[rows] * known[:, None], known
