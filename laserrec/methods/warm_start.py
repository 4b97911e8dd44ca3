"""A fitted model's weights carried over to another catalogue, to be trained on from there or used as they are."""

from __future__ import annotations

from collections.abc import Collection

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.new_items import nearest_known
from laserrec.methods.sequence import SequenceModel
from laserrec.methods.zesrec import ZESRec
from laserrec.util.errors import UserError

_BY_ITEM = ("item.weight", "bias", "known", "text")
"""Of a sequence model: tensors with a row per item."""


@torch.no_grad()
def carry_sequence_model(
    new: SequenceModel, old: SequenceModel, rows: Int[Tensor, "n_items"],
    texts: tuple[Float[Tensor, "n_items d_text"], Float[Tensor, "old_items d_text"]] | None = None,
) -> None:
    """Weights of `old` into `new`. rows: `old`'s row of each item of `new`, -1 for items that it does not know. texts:
    vectors of `new`'s and of `old`'s items in one space; where item tables are made of text, in the space that `old`
    reads.

    Known items keep their embeddings, biases and text vectors. New ones start as the mean of `old`'s items nearest by
    text, or of all of them if they have none; without `texts`, as that mean plus their own random start. Raises
    UserError where the two differ in more than their items, and where without texts there is no known item.
    """
    carry_weights(new, old, _BY_ITEM)
    known, rows = (rows >= 0).to(new.device), rows.to(new.device)
    if texts is None and not known.any():
        raise UserError("the model knows none of the items of this data, and it tells items by their ids alone; fit on "
                        "it from nothing")
    ours, theirs, trained = new.item.weight, old.item.weight.to(new.device), old.known.to(new.device)
    old_table = torch.cat([theirs[: old.n_items], old.bias.to(new.device)[:, None]], dim=1)
    if texts is None:
        start = torch.cat([ours[: new.n_items], new.bias[:, None]], dim=1)[~known] + old_table[trained].mean(dim=0)
    else:
        parents, weights = nearest_known(texts[0][~known], texts[1][trained])
        start = (old_table[trained][parents] * weights[..., None]).sum(dim=1)
        start[~weights.any(dim=1)] = old_table[trained].mean(dim=0)
    for at, table in ((known, old_table[rows[known]]), (~known, start)):
        ours[: new.n_items][at] = table[:, :-1]
        new.bias[at] = table[:, -1]
    ours[new.n_items :] = theirs[old.n_items :]  # padding and mask token
    if new.adaptor is not None and texts is not None:
        old_text = old.get_buffer("text").to(new.device)
        new.get_buffer("text").copy_(torch.where(known[:, None], old_text[rows.clamp(min=0)], texts[0]))


@torch.no_grad()
def carry_laser(new: Laser, old: Laser, rows: Int[Tensor, "n_items"]) -> None:
    """All weights but the neighbours' and the ranker's, which are made anew; the whitening of LLM outputs stays as it
    was, since what is trained behind it counts on it. rows: `old`'s row of each item of `new`, -1 for items that it
    does not know; the others keep their text parts. Raises UserError where the two differ in more than their items."""
    anew = ("neighbours.", "ranker.")
    carry_weights(new, old, [name for name in (*new.state_dict(), *old.state_dict()) if name.startswith(anew)])
    text = F.normalize(old.vectors[:, : old.d_text], dim=-1).to(new.device)
    new.carried = torch.where((rows >= 0)[:, None], text[rows.clamp(min=0)], torch.nan)


@torch.no_grad()
def carry_zesrec(new: ZESRec, old: ZESRec, items: pl.DataFrame) -> None:
    """All weights, and the whitening, by which the texts of `items`, which are `new`'s, are read from then on. Raises
    UserError where the two differ in more than their items."""
    carry_weights(new, old)
    new.learn_from(items)


@torch.no_grad()
def carry_weights(new: nn.Module, old: nn.Module, without: Collection[str] = ()) -> None:
    """All but those of these names. Raises UserError where the two differ in more than those."""
    ours, theirs = ({n: t for n, t in m.state_dict().items() if n not in without} for m in (new, old))
    differ = [name for name in sorted(ours.keys() | theirs.keys())
              if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape]
    if differ:
        raise UserError(f"a model of these settings has other weights than the one to go on from ({differ[0]}); keep "
                        "its settings, or fit from nothing")
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
