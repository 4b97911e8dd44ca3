"""What an item that was never trained on inherits from the known items with the nearest text.

Not in the paper. A new item's own ID part would be zero, and a score of text alone can't compete with scores of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.util.memory import rows_at_once

_PARENTS, _SHARPNESS = 10, 20.0
"""Of 5, 10 and 20 parents, and of ridge regression, the best on amazon-scientific's validation split; dev/LOG.md."""


@torch.no_grad()
def nearest_known(
    new: Float[Tensor, "new d_text"], known: Float[Tensor, "known d_text"]
) -> tuple[Int[Tensor, "new parents"], Float[Tensor, "new parents"]]:
    """For each new item the rows of the known items nearest by cosine, and their weights, which sum to one: the nearer
    the heavier. Items without a text, whose vector is zero, are no parents and have none: their weights are zero."""
    size, lengths = rows_at_once(len(known), max(1, len(new))), known.norm(dim=-1)
    parents, textless = min(_PARENTS, len(known)), lengths == 0
    rows = [torch.zeros(0, parents, dtype=torch.long, device=new.device)]
    weights = [new.new_zeros(0, parents)]
    for part in F.normalize(new, dim=-1).split(size):
        nearest = (part @ known.T / lengths).masked_fill(textless, -torch.inf).topk(parents, dim=1)
        own = torch.softmax(_SHARPNESS * nearest.values, dim=1).nan_to_num(0.0)  # all parents are without a text
        rows.append(nearest.indices)
        weights.append(own * part.any(dim=1, keepdim=True))
    return torch.cat(rows), torch.cat(weights)


@torch.no_grad()
def inherit_id_part(
    new: Float[Tensor, "new d_out"], known: Float[Tensor, "known d_out"], d_id: int
) -> Float[Tensor, "new d_out"]:
    """New items' embeddings with an ID part, the last d_id columns: the weighted mean of the ID parts of their nearest
    known items (`nearest_known` by the other columns), at those items' mean length; zero without any."""
    out, parts = new.clone(), known[:, -d_id:]
    rows, weights = nearest_known(new[:, :-d_id], known[:, :-d_id])
    mean = (parts[rows] * weights[..., None]).sum(dim=1)
    out[:, -d_id:] = F.normalize(mean, dim=-1) * parts.norm(dim=-1).mean()
    return out
