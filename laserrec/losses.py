"""The two training tasks (paper, 3.3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from laserrec.models.mformer import Route


def item_contrast(
    users: Float[Tensor, "batch d"],
    items: Float[Tensor, "n_items d"],
    targets: Int[Tensor, "batch"],
    temperature: float,
    left_out: Bool[Tensor, "batch n_items"] | None = None,
) -> Float[Tensor, ""]:
    """Full-softmax contrast of each user with all items (Eq. 8), mean over the batch.

    left_out: items that are no negatives of a user (not in the paper); the target always stays in.

    `targets` are rows of `items`. Cosines (Eq. 3) are computed here; neither input need be normalised.
    """
    logits = F.normalize(users, dim=-1) @ F.normalize(items, dim=-1).T / temperature
    if left_out is not None:
        left_out = left_out.scatter(1, targets[:, None], False)
        logits = logits.masked_fill(left_out, -torch.inf)
    return F.cross_entropy(logits, targets)


def load_balance(route: Route) -> Float[Tensor, ""]:
    """K * sum_j f_j P_j over each user's items (Eq. 9-11), mean over users that have any known item.

    f_j, the share of items whose best expert is j, is a count and carries no gradient.
    """
    experts = route.probabilities.shape[-1]
    count = route.mask.sum(dim=1)
    some = count > 0
    if not bool(some.any()):
        return route.probabilities.sum() * 0.0
    chosen = F.one_hot(route.probabilities.argmax(dim=-1), experts) * route.mask[..., None]
    share = chosen.sum(dim=1) / count.clamp(min=1)[:, None]
    probability = route.probabilities.sum(dim=1) / count.clamp(min=1)[:, None]
    return experts * (share * probability).sum(dim=1)[some].mean()


def total_loss(contrast: Tensor, balance: Tensor | None, weight: float) -> Tensor:
    """Eq. 12; without a router there is nothing to balance."""
    return contrast if balance is None else torch.add(contrast, balance, alpha=weight)
