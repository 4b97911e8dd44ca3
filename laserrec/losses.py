"""The two training tasks (paper, 3.3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.memory import columns_at_once
from laserrec.models.mformer import Route


@dataclass(frozen=True)
class Seen:
    """Pairs (user row, item row): the item stands in the user's history."""

    users: Int[Tensor, "pairs"]
    items: Int[Tensor, "pairs"]

    @staticmethod
    def of(histories: Sequence[np.ndarray]) -> Seen:
        """From histories of dense items (item j is row j - 1)."""
        unique = [np.unique(h) for h in histories]
        users = np.repeat(np.arange(len(unique)), [len(h) for h in unique])
        return Seen(torch.as_tensor(users), torch.as_tensor(np.concatenate(unique).astype(np.int64) - 1))


def item_contrast(
    users: Float[Tensor, "batch d"],
    items: Float[Tensor, "n_items d"],
    targets: Int[Tensor, "batch"],
    temperature: float,
    left_out: Seen | None = None,
    columns: int | None = None,
) -> Float[Tensor, ""]:
    """Full-softmax contrast of each user with all items (Eq. 8), mean over the batch.

    `targets` are rows of `items`. Cosines (Eq. 3) are computed here; neither input need be normalised.
    left_out: items that are no negatives of a user (not in the paper); the target always stays in.
    columns: items taken at a time, else as many as fit into 256 MiB. The logits of all items are never held at once;
    they are computed again for the gradient.
    """
    columns = columns or columns_at_once(len(users), *items.shape)
    if left_out is not None:
        others = left_out.items != targets[left_out.users]
        left_out = Seen(left_out.users[others], left_out.items[others])
    return _ItemContrast.apply(F.normalize(users, dim=-1), items, targets, temperature, left_out, columns)


class _ItemContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, users, items, targets, temperature, left_out, columns):
        ctx.temperature, ctx.left_out, ctx.columns = temperature, left_out, columns
        lse = users.new_full((len(users),), -torch.inf)
        own = torch.empty_like(lse)
        for at in range(0, len(items), columns):
            logits = _logits(users, F.normalize(items[at : at + columns], dim=-1), at, ctx)
            here = ((targets >= at) & (targets < at + columns)).nonzero().squeeze(1)
            own[here] = logits[here, targets[here] - at]
            lse = torch.logaddexp(lse, logits.logsumexp(dim=1))
        ctx.save_for_backward(users, items, targets, lse)
        return (lse - own).mean()

    @staticmethod
    def backward(ctx, d_loss):
        users, items, targets, lse = ctx.saved_tensors
        d_users = torch.zeros_like(users)
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        scale = d_loss / (len(users) * ctx.temperature)
        for at in range(0, len(items), ctx.columns):
            raw = items[at : at + ctx.columns]
            length = raw.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            unit = raw / length
            d_cosine = _logits(users, unit, at, ctx).sub_(lse[:, None]).exp_()
            here = ((targets >= at) & (targets < at + ctx.columns)).nonzero().squeeze(1)
            d_cosine[here, targets[here] - at] -= 1
            d_cosine *= scale
            d_users += d_cosine @ unit
            if d_items is not None:
                d_unit = d_cosine.T @ users
                d_items[at : at + ctx.columns] = (d_unit - unit * (d_unit * unit).sum(dim=-1, keepdim=True)) / length
        return d_users, d_items, None, None, None, None


def _logits(users: Tensor, unit_items: Tensor, at: int, ctx) -> Tensor:
    """Of the items from row `at` on, those left out at -inf."""
    logits = (users @ unit_items.T).div_(ctx.temperature)
    if ctx.left_out is not None:
        here = (ctx.left_out.items >= at) & (ctx.left_out.items < at + len(unit_items))
        logits[ctx.left_out.users[here], ctx.left_out.items[here] - at] = -torch.inf
    return logits


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
