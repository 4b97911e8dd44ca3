"""What an ID-based recommender would say of an item that it never saw: what it says of the items with the nearest text.

Not in the paper. A new item's own ID part would be zero, and a score of text alone can't compete with scores of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laserrec.memory import rows_at_once

_NEIGHBOURS, _SHARPNESS = 10, 20.0
"""Of 5, 10 and 20 neighbours, and of ridge regression, the best on amazon-scientific's validation split; dev/LOG.md."""


@torch.no_grad()
def lend_id_part(
    new: Float[Tensor, "new d_out"], known: Float[Tensor, "known d_out"], d_id: int
) -> Float[Tensor, "new d_out"]:
    """New items' embeddings with an ID part, the last d_id columns: the mean of their nearest known items' ID parts,
    nearest by the cosine of the other columns, the nearer the heavier, at those items' mean length."""
    out, text, parts = new.clone(), F.normalize(known[:, :-d_id], dim=-1), known[:, -d_id:]
    length = parts.norm(dim=-1).mean()
    size = rows_at_once(len(known), len(new))
    for at in range(0, len(new), size):
        cosines = F.normalize(new[at : at + size, :-d_id], dim=-1) @ text.T
        nearest = cosines.topk(min(_NEIGHBOURS, len(known)), dim=1)
        weights = torch.softmax(_SHARPNESS * nearest.values, dim=1)
        mean = (parts[nearest.indices] * weights[..., None]).sum(dim=1)
        out[at : at + size, -d_id:] = F.normalize(mean, dim=-1) * length
    return out
