"""A fitted model's weights carried over to another catalogue, to be trained on from there."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.new_items import nearest_known
from laserrec.methods.sequence import SequenceModel
from laserrec.util.errors import UserError

_BY_ITEM = ("item.weight", "bias", "known", "text")
"""Of a sequence model: tensors with a row per item."""


@torch.no_grad()
def carry_sequence_model(new: SequenceModel, old: SequenceModel, rows: Int[Tensor, "n_items"],
                         text: Float[Tensor, "n_items d_text"] | None = None) -> None:
    """Weights of `old` into `new`. rows: `old`'s row of each item of `new`, -1 for items that it does not know.

    Known items keep their embeddings and biases. New ones start as the mean of the known items nearest by text; without
    text, as the mean of all known items plus their own random start. An item table that is made of text stays in the
    space of `old`'s text vectors. Raises UserError where the two differ in more than their items.
    """
    _copy(new, old, _BY_ITEM)
    known, rows = rows >= 0, rows.to(new.device)
    ours, theirs = new.item.weight, old.item.weight.to(new.device)
    old_table = torch.cat([theirs[: old.n_items], old.bias.to(new.device)[:, None]], dim=1)[rows[known]]
    if text is None or new.adaptor is not None:
        start = torch.cat([ours[: new.n_items], new.bias[:, None]], dim=1)[~known] + old_table.mean(dim=0)
    else:
        parents, weights = nearest_known(text[~known], text[known])
        start = (old_table[parents] * weights[..., None]).sum(dim=1)
    for at, table in ((known, old_table), (~known, start)):
        ours[: new.n_items][at] = table[:, :-1]
        new.bias[at] = table[:, -1]
    ours[new.n_items :] = theirs[old.n_items :]  # padding and mask token
    if new.adaptor is not None:
        ours_text, theirs_text = new.get_buffer("text"), old.get_buffer("text").to(new.device)
        ours_text.copy_(_in_old_space(ours_text, theirs_text[rows[known]], known))


def _in_old_space(text: Float[Tensor, "n_items d_text"], old: Float[Tensor, "known d_text"], known: Tensor
                  ) -> Float[Tensor, "n_items d_text"]:
    """Another catalogue's texts are whitened by another map; both are affine, and so is the way between them."""
    ones = torch.cat([text, text.new_ones(len(text), 1)], dim=1).cpu()
    way = torch.linalg.lstsq(ones[known.cpu()], old.cpu(), driver="gelsd").solution
    out = (ones @ way).to(text.device)
    out[known] = old
    return out


@torch.no_grad()
def carry_laser(new: Laser, old: Laser, rows: Int[Tensor, "n_items"]) -> None:
    """All weights but the neighbours', which are made anew; the whitening of LLM outputs stays as it was, since what
    is trained behind it counts on it. rows: `old`'s row of each item of `new`, -1 for items that it does not know; the
    others keep their text parts. Raises UserError where the two differ in more than their items."""
    _copy(new, old, ("neighbours.items", "neighbours.weights", "neighbours.log_scale"))
    text = F.normalize(old.vectors[:, : old.d_text], dim=-1).to(new.device)
    new.carried = torch.where((rows >= 0)[:, None], text[rows.clamp(min=0)], torch.nan)


def _copy(new: nn.Module, old: nn.Module, without: Collection[str]) -> None:
    ours, theirs = ({n: t for n, t in m.state_dict().items() if n not in without} for m in (new, old))
    differ = [name for name in sorted(ours.keys() | theirs.keys())
              if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape]
    if differ:
        raise UserError(f"a model of these settings has other weights than the one to go on from ({differ[0]}); keep "
                        "its settings, or fit from nothing")
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
