"""From the LLM's pooled output to an embedding: nothing at all in the paper, whitening and a projection as options."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laserrec.config import HeadConfig
from laserrec.llm.whitening import fit_whitening, whiten


class Whitening(nn.Module):
    """Frozen after `fit`. A frozen LLM's last-token outputs lie in a narrow cone (cosines near .98), where a softmax
    over cosines hardly tells items apart; whitening turns the cone into a ball."""

    mean: Float[Tensor, "d_in"]
    matrix: Float[Tensor, "d_in dims"]

    def __init__(self, d_in: int, dims: int, depths: int = 1):
        super().__init__()
        self.depths, self.dims = depths, min(dims, d_in // depths)  # no more than the outputs have
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("matrix", torch.eye(d_in // depths, self.dims).repeat(depths, 1))

    def fit(self, outputs: Float[Tensor, "rows d_in"]) -> None:
        """By these outputs' mean and covariance, each depth on its own."""
        mean, matrix = fit_whitening(outputs, self.dims, self.depths)
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)

    def forward(self, outputs: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_white"]:
        """Centred and whitened."""
        return whiten(outputs, self.mean, self.matrix, self.depths)


class Head(nn.Module):
    """Outputs -> embeddings. Scores are cosines of embeddings (Eq. 3), so their length means nothing.

    Parameters: `d_in`: width of the outputs, `depths` equally wide parts side by side, which are whitened apart.
    """

    def __init__(self, config: HeadConfig, d_in: int, depths: int = 1):
        super().__init__()
        self.white = Whitening(d_in, config.whiten_dims, depths) if config.whiten_dims else None
        self.d_out = d_in if self.white is None else self.white.dims * depths
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(self.d_out, self.d_out, bias=False) if config.projection else None
        if self.projection is not None:
            nn.init.eye_(self.projection.weight)

    def whiten(self, outputs: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_white"]:
        """The part of the head that is not trained."""
        return outputs.nan_to_num(0.0) if self.white is None else self.white(outputs)

    def project(self, white: Float[Tensor, "*batch d_white"]) -> Float[Tensor, "*batch d_white"]:
        """The part that is trained."""
        return white if self.projection is None else self.projection(self.dropout(white))

    def forward(self, outputs: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_white"]:
        """Both."""
        return self.project(self.whiten(outputs))


class AddedOutput(nn.Module):
    """What the LLM's output at the suffix adds to the sum of a history's items. It starts at zero, so that training
    starts from the match of texts."""

    def __init__(self, config: HeadConfig, d_llm: int, d_out: int):
        super().__init__()
        self.white = Whitening(d_llm, config.whiten_dims or d_llm)  # these outputs lie in a cone of their own
        self.dropout = nn.Dropout(config.dropout)
        self.map = nn.Linear(self.white.dims, d_out, bias=False)
        nn.init.zeros_(self.map.weight)

    def forward(self, outputs: Float[Tensor, "batch d_llm"]) -> Float[Tensor, "batch d_out"]:
        """To be added."""
        return self.map(self.dropout(self.white(outputs)))
