"""What Laser takes from the frozen ID-based recommender below it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from laserrec.data.histories import Histories
from laserrec.methods.sequence import SequenceModel
from laserrec.util.device import move


class IdStates:
    """States of histories and items under a frozen sequence model; under none, nothing is known of anything.

    Items that it does not know are left out of histories: those added since, and those that stand in none of its
    training sequences, as many do after a temporal split. product: see `HeadConfig.id_product`.
    """

    def __init__(self, model: SequenceModel | None, device: torch.device, product: bool = False):
        self.model, self.device, self.product = model, device, product
        if model is not None:
            self.model = model.to(device).eval().requires_grad_(False)
            self._known = model.known.cpu()

    def knows(self, rows: Int[Tensor, "items"]) -> Bool[Tensor, "items"]:
        """Which of these items the model was trained on."""
        if self.model is None:
            return torch.zeros_like(rows, dtype=torch.bool)
        last = self.model.n_items - 1
        return (rows <= last) & self._known.to(rows.device)[rows.clamp(max=last)]

    def _known_part(self, histories: Histories) -> Histories:
        kept = self.knows(histories.items)
        return histories if bool(kept.all()) else histories.where(kept)

    @property
    def d_id(self) -> int:
        """Width of the states [d_i]."""
        return 1 if self.model is None else self.model.d_id

    @torch.no_grad()
    def states(self, histories: Histories, hide: Bool[Tensor, "batch"] | None = None
               ) -> tuple[Float[Tensor, "batch items d_id"], Bool[Tensor, "batch items"]]:
        """C_u and which of them are real. hide: histories whose states are hidden."""
        if self.model is None:
            mask = torch.zeros(len(histories), 1, dtype=torch.bool, device=self.device)
            return torch.zeros(*mask.shape, self.d_id, device=self.device), mask
        known = self._known_part(histories).last(self.model.max_history)
        mask = torch.zeros(len(known), 1, dtype=torch.bool)
        if len(known.items) == 0:
            return torch.zeros(*mask.shape, self.d_id, device=self.device), move(mask, self.device)
        padded = known.padded(self.model.pad)
        mask = padded != self.model.pad
        mask = mask if hide is None else mask & ~hide[:, None]
        # A history without any known item would be all padding, which attention can't read.
        padded[:, 0] = padded[:, 0].where(known.lengths > 0, 0)
        states = self.model.states(move(padded, self.device)).float()
        return states, move(mask, self.device)

    @torch.no_grad()
    def user(self, histories: Histories) -> Float[Tensor, "batch d_id"]:
        """The state for the next item; zeros for a history without known items."""
        out = torch.zeros(len(histories), self.d_id, device=self.device)
        if self.model is None:
            return out
        known = self._known_part(histories)
        some = (known.lengths > 0).nonzero()[:, 0]
        if len(some):
            out[move(some, self.device)] = self.model.last_states(known.take(some)).float()
        return out

    @torch.no_grad()
    def item(self, rows: Int[Tensor, "items"]) -> Float[Tensor, "items d_id"]:
        """The items' own embeddings; zeros for items that the model does not know."""
        if self.model is None:
            return torch.zeros(len(rows), self.d_id, device=self.device)
        own = self.model.item_embeddings()[rows.clamp(max=self.model.n_items - 1)]
        return torch.where(self.knows(rows)[:, None], own, 0.0)

    # -- the ID part of embeddings ------------------------------------------------------------------------------

    @property
    def d_part(self) -> int:
        """Its width."""
        return self.d_id + 2 if self.product else self.d_id

    @torch.no_grad()
    def user_part(self, histories: Histories) -> Float[Tensor, "batch d_part"]:
        """Of any length; zeros for a history without known items."""
        state = self.user(histories)
        if not self.product:
            return state
        some = state.any(dim=1, keepdim=True).float()
        return torch.cat([state, some, torch.zeros_like(some)], dim=1)

    @torch.no_grad()
    def item_part(self, rows: Int[Tensor, "items"]) -> Float[Tensor, "items d_part"]:
        """Of any length, with `product` of length one; zeros for items that the model does not know. The cosine with a
        user's part is then, but for a factor of each user, the ID model's own logit."""
        if not self.product:
            return self.item(rows)
        if self.model is None:
            return torch.zeros(len(rows), self.d_part, device=self.device)
        every = self.model.items()  # embeddings, and the biases behind them
        longest = every[self._known.to(every.device)].norm(dim=1).max().clamp(min=1e-12)
        scaled = every[rows.clamp(max=self.model.n_items - 1)] / longest
        rest = (1 - scaled.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
        return torch.where(self.knows(rows)[:, None], torch.cat([scaled, rest], dim=1), 0.0)
