"""The two training tasks (paper, 3.3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.data.histories import Pairs
from laserrec.methods.laser.mformer import Route
from laserrec.util.memory import columns_at_once


def item_contrast(
    users: Float[Tensor, "batch d"],
    items: Float[Tensor, "n_items d"],
    targets: Int[Tensor, "batch"],
    temperature: float | Float[Tensor, ""],
    seen: Pairs | None = None,
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
    offsets = None
    if seen is not None and seen_offset is not None:
        offsets = (seen_offset / temperature).expand(len(seen.users))
    elif seen is not None:
        others = seen.items != targets[seen.users]
        offsets = users.new_zeros(len(others)).masked_fill(others, -torch.inf)
    # Over tau already, as are the offsets: so the gradient below needs to know nothing of it.
    scaled_users = F.normalize(users, dim=-1) / temperature
    return _ItemContrast.apply(scaled_users, items, targets, seen, offsets, columns)


def contrast_of_some(
    users: Float[Tensor, "batch d"], items: Float[Tensor, "some d"], targets: Int[Tensor, "batch"],
    temperature: float | Float[Tensor, ""], correction: Float[Tensor, "#batch some"], seen: Pairs | None = None,
    seen_offset: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """As `item_contrast`, with a few items alone, all targets among them (not in the paper).

    correction: is subtracted from the logits, since some items, popular ones above all, are among the few more often
    than others. seen: pairs (user, place among these items).
    """
    logits = F.normalize(users, dim=-1) @ F.normalize(items, dim=-1).T / temperature - correction
    if seen is not None and seen_offset is not None:
        logits = logits.index_put((seen.users, seen.items), (seen_offset / temperature).expand(len(seen.users)), True)
    elif seen is not None:
        others = seen.items != targets[seen.users]
        logits = logits.index_put((seen.users, seen.items),
                                  logits.new_zeros(len(others)).masked_fill(others, -torch.inf), True)
    return F.cross_entropy(logits, targets)


class _ItemContrast(torch.autograd.Function):
    """No boolean indexing: on a GPU each would wait for the device."""

    @staticmethod
    def forward(ctx, users, items, targets, seen, offsets, columns):
        ctx.seen, ctx.columns = seen, columns
        lse = users.new_full((len(users),), -torch.inf)
        own = torch.zeros_like(lse)
        for at in range(0, len(items), columns):
            unit = F.normalize(items[at : at + columns], dim=-1)
            logits = _logits(users, unit, seen, offsets, at)
            column, inside = _column(targets, at, len(unit))
            own = torch.where(inside, logits.gather(1, column[:, None])[:, 0], own)
            lse = torch.logaddexp(lse, logits.logsumexp(dim=1))
        ctx.save_for_backward(users, items, targets, lse, offsets)
        return (lse - own).mean()

    @staticmethod
    def backward(ctx, d_loss):  # ty: ignore[incompatible-method-override]  # torch's takes any number of gradients
        users, items, targets, lse, offsets = ctx.saved_tensors
        d_users = torch.zeros_like(users)
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        d_offsets = torch.zeros_like(offsets) if ctx.needs_input_grad[4] else None
        scale = d_loss / len(users)
        for at in range(0, len(items), ctx.columns):
            raw = items[at : at + ctx.columns]
            length = raw.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            unit = raw / length
            d_logits = _logits(users, unit, ctx.seen, offsets, at).sub_(lse[:, None]).exp_()
            column, inside = _column(targets, at, len(unit))
            d_logits.scatter_add_(1, column[:, None], -inside[:, None].to(d_logits.dtype))
            d_logits *= scale
            d_users += d_logits @ unit
            if d_offsets is not None:
                place, there = _column(ctx.seen.items, at, len(unit))
                d_offsets += torch.where(there, d_logits[ctx.seen.users, place], 0.0)
            if d_items is not None:
                d_unit = d_logits.T @ users
                d_items[at : at + ctx.columns] = (d_unit - unit * (d_unit * unit).sum(dim=-1, keepdim=True)) / length
        return d_users, d_items, None, None, d_offsets, None


def _column(rows: Tensor, at: int, count: int) -> tuple[Tensor, Tensor]:
    """Where item rows stand in the chunk from `at` on, and whether they are in it."""
    return (rows - at).clamp(0, count - 1), (rows >= at) & (rows < at + count)


def _logits(users: Tensor, unit_items: Tensor, seen: Pairs | None, offsets: Tensor | None, at: int) -> Tensor:
    logits = users @ unit_items.T
    if seen is not None and offsets is not None:
        column, inside = _column(seen.items, at, len(unit_items))
        logits.index_put_((seen.users, column), torch.where(inside, offsets, 0.0), accumulate=True)
    return logits


def load_balance(route: Route) -> Float[Tensor, ""]:
    """K * sum_j f_j P_j over each user's items (Eq. 9-11), mean over users that have any known item.

    f_j, the share of items whose best expert is j, is a count and carries no gradient.
    """
    experts = route.probabilities.shape[-1]
    count = route.mask.sum(dim=1)
    chosen = F.one_hot(route.probabilities.argmax(dim=-1), experts) * route.mask[..., None]
    share = chosen.sum(dim=1) / count.clamp(min=1)[:, None]
    probability = route.probabilities.sum(dim=1) / count.clamp(min=1)[:, None]
    return experts * (share * probability).sum() / (count > 0).sum().clamp(min=1)
