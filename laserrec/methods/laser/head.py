"""From the LLM's pooled output to an embedding: nothing at all in the paper, whitening and a projection as options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from laserrec.config import HeadConfig


class Head(nn.Module):
    """Outputs -> embeddings. Scores are cosines of embeddings (Eq. 3), so their length means nothing.

    A frozen LLM's last-token outputs lie in a narrow cone (cosines near .98), where a softmax over cosines hardly
    tells items apart; `fit_whitening` turns the cone into a ball once, before training.

    Parameters: `mean_items`: items are mean outputs over their texts and users start as sums of them
    (prompt.item_side mean): then `users` makes users' embeddings, `forward` items'. mean_layers: depths at which the
    means were taken; they stand side by side and are whitened apart, each to whiten_dims.
    """

    def __init__(self, config: HeadConfig, d_llm: int, mean_items: bool = False, mean_layers: int = 1):
        super().__init__()
        self.id_share = config.id_share
        self.dropout = nn.Dropout(config.dropout)
        d_kept, self.depths = config.whiten_dims or d_llm, mean_layers
        d_out = d_kept * mean_layers
        if config.whiten_dims:
            self.register_buffer("mean", torch.zeros(d_llm * mean_layers))
            self.register_buffer("whitening", torch.eye(d_llm, d_kept).repeat(mean_layers, 1))
        self.added = None
        if mean_items:
            # From zero: training starts from the match of texts. The suffix's outputs lie in a cone of their own.
            self.added = nn.Linear(d_kept, d_out, bias=False)
            nn.init.zeros_(self.added.weight)
            self.register_buffer("suffix_mean", torch.zeros(d_llm))
            self.register_buffer("suffix_whitening", torch.eye(d_llm, d_kept))
        self.whiten = bool(config.whiten_dims)
        self.projection = nn.Linear(d_out, d_out, bias=False) if config.projection else None
        if self.projection is not None:
            nn.init.eye_(self.projection.weight)

    def d_text(self, d_out: int, d_id: int) -> int:
        """Width of the text part of embeddings d_out wide; the ID part, if there is one, stands behind it."""
        return d_out - (d_id if self.id_share else 0)

    @property
    def needs_whitening(self) -> bool:
        return self.whiten

    @torch.no_grad()
    def fit_whitening(self, outputs: Float[Tensor, "n_items d_items"]) -> None:
        """Centre and whiten items by these outputs' covariance, keeping its largest directions (PCA whitening; for text
        embeddings: Su et al. 2021, "Whitening Sentence Representations for Better Semantics and Faster Retrieval")."""
        parts = (x.chunk(self.depths, dim=dim) for x, dim in ((outputs, 1), (self.mean, 0), (self.whitening, 0)))
        for own in zip(*parts, strict=True):
            self._fit(*own)

    @torch.no_grad()
    def fit_suffix(self, outputs: Float[Tensor, "n_items d_llm"]) -> None:
        """The same for the outputs at a suffix, by those of the untrained items (mean_items)."""
        self._fit(outputs, self.suffix_mean, self.suffix_whitening)

    @staticmethod
    def _fit(outputs: Tensor, into_mean: Tensor, into_whitening: Tensor) -> None:
        x = outputs.double()
        mean = x.mean(dim=0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        keep = into_whitening.shape[1]
        values, vectors = values[-keep:].flip(0).clamp(min=1e-8), vectors[:, -keep:].flip(1)
        # The sign of an eigenvector is arbitrary; fix it so that two machines agree.
        sign = torch.sign(vectors[vectors.abs().argmax(dim=0), torch.arange(keep)])
        into_mean.copy_(mean)
        into_whitening.copy_(vectors * sign / values.sqrt())

    def whiten_items(self, outputs: Float[Tensor, "*batch d_items"]) -> Float[Tensor, "*batch d_out"]:
        """Outputs of items (d_items: d_llm for each depth), whitened if they are to be."""
        if not self.whiten:
            return outputs
        parts = (outputs - self.mean).chunk(self.depths, dim=-1), self.whitening.chunk(self.depths)
        return torch.cat([x @ whitening for x, whitening in zip(*parts, strict=True)], dim=-1)

    def forward(
        self, outputs: Float[Tensor, "batch d_items"], id_part: Float[Tensor, "batch d_id"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """`id_part`: the ID model's user state or item embedding, zeros where it knows none; None leaves it out.

        With both parts of unit length, scaled by the roots of their shares, the cosine of two embeddings is the
        shares' weighted sum of the parts' cosines.
        """
        return self.embed_white(self.whiten_items(outputs), id_part)

    def embed_white(
        self, x: Float[Tensor, "batch d_white"], id_part: Float[Tensor, "batch d_id"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """`forward` behind the whitening, which never changes while the rest is trained."""
        return self.joined(x if self.projection is None else self.projection(self.dropout(x)), id_part)

    def users(
        self, outputs: Float[Tensor, "batch d_llm"], history: Float[Tensor, "batch d_text"],
        id_part: Float[Tensor, "batch d_id"] | None = None,
    ) -> Float[Tensor, "batch d_out"]:
        """With mean_items: outputs at the suffix, and the sums of the histories' whitened items (any length)."""
        at_suffix = (outputs - self.suffix_mean) @ self.suffix_whitening
        start = F.normalize(history, dim=-1) * history.shape[-1] ** 0.5  # as long as a whitened output
        return self.joined(self.projection(self.dropout(start)) + self.added(self.dropout(at_suffix)), id_part)

    def joined(
        self, x: Float[Tensor, "batch d_text"], id_part: Float[Tensor, "batch d_id"] | None
    ) -> Float[Tensor, "batch d_out"]:
        """The text part (any length) and the ID part side by side; the text part as it is where there is no other."""
        if id_part is None:
            return x
        parts = F.normalize(x, dim=-1), F.normalize(id_part, dim=-1)
        return torch.cat([(1 - self.id_share) ** 0.5 * parts[0], self.id_share**0.5 * parts[1]], dim=-1)
