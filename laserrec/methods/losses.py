"""The two training tasks (paper, 3.3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.methods.laser.mformer import Route
from laserrec.methods.seen import Seen
from laserrec.util.memory import columns_at_once


def item_contrast(
    users: Float[Tensor, "batch d"],
    items: Float[Tensor, "n_items d"],
    targets: Int[Tensor, "batch"],
    temperature: float | Float[Tensor, ""],
    seen: Seen | None = None,
    seen_offset: Float[Tensor, ""] | None = None,
    columns: int | None = None,
) -> Float[Tensor, ""]:
    """Full-softmax contrast of each user with all items (Eq. 8), mean over the batch.

    `targets` are rows of `items`. Cosines (Eq. 3) are computed here; neither input need be normalised.
    seen (not in the paper): items that stand in a user's history. With `seen_offset` that is added to their cosines,
    the target's as well if it is among them; without, they are no negatives, and the target always stays in.
    temperature: a number, or a tensor that gets a gradient.
    columns: items taken at a time, else as many as fit into 256 MiB. The logits of all items are never held at once;
    they are computed again for the gradient.
    """
    columns = columns or columns_at_once(len(users), *items.shape)
    if seen is not None and seen_offset is None:
        others = seen.items != targets[seen.users]
        seen, offset = Seen(seen.users[others], seen.items[others]), users.new_tensor(-torch.inf)
    else:
        offset = None if seen_offset is None else seen_offset / temperature
    # Over tau already, as is the offset: so the gradient below needs to know nothing of it.
    scaled_users = F.normalize(users, dim=-1) / temperature
    return _ItemContrast.apply(scaled_users, items, targets, seen, offset, columns)


class _ItemContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, users, items, targets, seen, offset, columns):
        ctx.seen, ctx.columns = seen, columns
        lse = users.new_full((len(users),), -torch.inf)
        own = torch.empty_like(lse)
        for at in range(0, len(items), columns):
            unit = F.normalize(items[at : at + columns], dim=-1)
            logits = _logits(users, unit, _pairs_from(seen, at, columns), offset)
            here = ((targets >= at) & (targets < at + columns)).nonzero().squeeze(1)
            own[here] = logits[here, targets[here] - at]
            lse = torch.logaddexp(lse, logits.logsumexp(dim=1))
        ctx.save_for_backward(users, items, targets, lse, offset)
        return (lse - own).mean()

    @staticmethod
    def backward(ctx, d_loss):
        users, items, targets, lse, offset = ctx.saved_tensors
        d_users = torch.zeros_like(users)
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        d_offset = torch.zeros_like(offset) if ctx.needs_input_grad[4] else None
        scale = d_loss / len(users)
        for at in range(0, len(items), ctx.columns):
            raw = items[at : at + ctx.columns]
            length = raw.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            unit, pairs = raw / length, _pairs_from(ctx.seen, at, ctx.columns)
            d_cosine = _logits(users, unit, pairs, offset).sub_(lse[:, None]).exp_()
            here = ((targets >= at) & (targets < at + ctx.columns)).nonzero().squeeze(1)
            d_cosine[here, targets[here] - at] -= 1
            d_cosine *= scale
            d_users += d_cosine @ unit
            if d_offset is not None:
                d_offset += d_cosine[pairs].sum()
            if d_items is not None:
                d_unit = d_cosine.T @ users
                d_items[at : at + ctx.columns] = (d_unit - unit * (d_unit * unit).sum(dim=-1, keepdim=True)) / length
        return d_users, d_items, None, None, d_offset, None


def _pairs_from(seen: Seen | None, at: int, columns: int) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of the chunk's matrix that are seen."""
    if seen is None:
        return None
    here = (seen.items >= at) & (seen.items < at + columns)
    return seen.users[here], seen.items[here] - at


def _logits(users: Tensor, unit_items: Tensor, pairs: tuple[Tensor, Tensor] | None, offset: Tensor | None) -> Tensor:
    logits = users @ unit_items.T
    if pairs is not None:
        logits[pairs] += offset
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
