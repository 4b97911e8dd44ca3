"""Whitening of LLM outputs: centre them and turn their narrow cone into a ball."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_LEAST_VARIANCE = 1e-9
"""Share of the largest direction's below which a direction's variance is none: to scale such a one up to unit variance
would make large numbers of rounding errors, and larger ones of items that were not among the rows."""
_LARGEST_SHARE, _FEWEST = 0.4, 8
"""Of the number of rows, directions that are kept, and how many at least. With one for each row whitening puts all rows
equally far apart, so that nothing is near; from a third to an eighth of them texts told most about the next item
(dev/LOG.md)."""
_ROUNDING = 1e-13
"""Of float32, squared: variance below this share of the mean's square is none, as where all texts are alike."""


@torch.no_grad()
def fit_whitening(
    outputs: Float[Tensor, "rows d_all"], dims: int, depths: int = 1
) -> tuple[Float[Tensor, "d_all"], Float[Tensor, "d_all dims"]]:
    """Mean and whitening matrix of `outputs`, float32, on their device; the directions of largest variance come first.

    PCA whitening; for text embeddings: Su et al. 2021, "Whitening Sentence Representations for Better Semantics and
    Faster Retrieval". depths: `outputs` holds so many equally wide parts side by side (the LLM's outputs behind several
    layers). Each is whitened on its own to `dims` dimensions, and their matrices stand one below another. Directions in
    which the rows don't differ become zeros, and those behind two fifths of the number of rows, 8 at least. Rows with
    NaN in a part tell nothing of it and are left out there.
    """
    fitted = [_fit(part, dims) for part in outputs.chunk(depths, dim=1)]
    mean, matrix = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return mean.to(outputs.device), matrix.to(outputs.device)


def whiten(
    outputs: Float[Tensor, "*batch d_all"], mean: Float[Tensor, "d_all"], matrix: Float[Tensor, "d_all dims"],
    depths: int = 1,
) -> Float[Tensor, "*batch d_white"]:
    """`outputs` centred and whitened, each depth by its own part of `matrix`; d_white = depths * dims. NaN, which is
    not known, becomes zero, the mean."""
    parts = (outputs - mean).nan_to_num_(0.0).chunk(depths, dim=-1), matrix.chunk(depths)
    return torch.cat([x @ own for x, own in zip(*parts, strict=True)], dim=-1)


def _fit(outputs: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    if outputs.device.type == "mps":  # has no float64, which the covariance of a narrow cone needs
        outputs = outputs.cpu()
    x = outputs.double()
    x = x[~x[:, 0].isnan()]  # a part is known as a whole or not at all
    mean = x.mean(dim=0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    values, vectors = values[-dims:].flip(0), vectors[:, -dims:].flip(1)
    least = torch.maximum(_LEAST_VARIANCE * values[0], _ROUNDING * mean.square().sum())
    kept = torch.arange(len(values), device=x.device) < max(_FEWEST, _LARGEST_SHARE * len(x))
    scale = torch.where((values > least) & kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    # The sign of an eigenvector is arbitrary; fix it so that two machines agree.
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return mean.float(), (vectors * torch.sign(vectors.gather(0, largest)) * scale).float()
