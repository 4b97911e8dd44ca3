"""Laser: [prefix][text][suffix] through a frozen LLM -> an embedding (paper, 3.1.2; Eq. 1-2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.config import Config, ItemSide, Pooling, Prefix
from laserrec.llm.attention import Past
from laserrec.llm.backbone import Backbone
from laserrec.methods.laser.head import Head
from laserrec.methods.laser.mformer import MFormer, Route
from laserrec.methods.neighbours import Neighbours, Pull
from laserrec.methods.seen import Seen

_SEEN_OFFSET_START = -1.0
"""Where head.seen_offset starts: a cosine less, since most people buy something new."""


class Laser(nn.Module):
    """All that Laser trains. The frozen LLM is held beside it and is in neither parameters nor state_dict.

    Parameters: `d_id`: width of the ID model's states; `n_items`: known items, for those settings that keep something
    of each (neighbours).
    """

    def __init__(self, config: Config, backbone: Backbone, d_id: int, n_items: int = 0):
        super().__init__()
        self.config, self.backbone = config, backbone
        mformer, d_llm = config.mformer, backbone.d_llm
        token_std = float(backbone.embedding.float().std())
        self.mformer = self.learned_prefix = None
        if mformer.prefix in (Prefix.MFORMER, Prefix.ONE_EXPERT):
            base = self._token_start(mformer.queries) if mformer.zero_init else None
            self.mformer = MFormer(mformer, d_id, d_llm, token_std, base)
        elif mformer.prefix == Prefix.LEARNED:
            self.learned_prefix = nn.Parameter(torch.randn(mformer.queries, d_llm) * token_std)
        eos = backbone.embedding[self._eos_id()].float()
        start = eos if config.head.suffix_from_eos else torch.randn(d_llm) * token_std
        self.suffix = nn.Parameter(start[None].clone())
        if config.head.pooling == Pooling.EOS:
            self.suffix.data.copy_(eos)
            self.suffix.requires_grad_(False)
        self.register_buffer("plain_suffix", eos[None].clone(), persistent=False)
        mean_items = config.prompt.item_side == ItemSide.MEAN
        self.head = Head(config.head, d_llm, mean_items, backbone.mean_depths if mean_items else 1)
        self.neighbours = None
        if config.neighbours.count and n_items:
            self.neighbours = Neighbours(config.neighbours, n_items)
        self.seen_offset = nn.Parameter(torch.tensor(_SEEN_OFFSET_START)) if config.head.seen_offset else None
        tau = torch.tensor(float(config.train.temperature))
        self.log_temperature = nn.Parameter(tau.log()) if config.train.learn_temperature else None

    @property
    def temperature(self) -> float | Float[Tensor, ""]:
        """Of the loss's softmax; with gradient if it is learnt (train.learn_temperature)."""
        return self.config.train.temperature if self.log_temperature is None else self.log_temperature.exp()

    def _eos_id(self) -> int:
        eos = self.backbone.tokenizer.eos_token_id
        return 0 if eos is None else int(eos)

    def _token_start(self, count: int) -> Float[Tensor, "count d_llm"]:
        """Embeddings of the instruction's first words, repeated as needed: a prefix that reads as text."""
        from laserrec.data.prompt import INSTRUCTIONS, Template

        ids = self.backbone.tokenizer(INSTRUCTIONS[Template.PAPER], add_special_tokens=False)["input_ids"]
        return self.backbone.embedding[torch.tensor((ids * count)[:count])].float()

    @torch.no_grad()
    def finish(
        self, scores: Float[Tensor, "batch n_items"], histories: Sequence[np.ndarray]
    ) -> Float[Tensor, "batch n_items"]:
        """Cosines (changed in place) -> scores: with what the history's items pull, and the learnt offset of those
        items themselves, where there are such."""
        if self.neighbours is not None:
            for row, history in zip(scores, histories, strict=True):
                items, pulls = self.neighbours.pull(history)
                row[items - 1] = self.neighbours.join(row[items - 1], pulls)
        if self.seen_offset is not None:
            seen = Seen.of(histories)
            scores[seen.users, seen.items] += self.seen_offset
        return scores

    def pull(self, history: np.ndarray) -> Pull | None:
        """What the history's items pull; None without neighbours."""
        return None if self.neighbours is None else self.neighbours.pull(history)

    @torch.no_grad()
    def finish_some(
        self, scores: Float[Tensor, "some"], items: Int[Tensor, "some"], history: np.ndarray,
        pull: Pull | None,
    ) -> Float[Tensor, "some"]:
        """`finish` for some items of one history (changed in place). pull: of this history (`pull`)."""
        if pull is not None:
            pulled, pulls = pull
            if len(pulled):
                place = torch.searchsorted(pulled, items).clamp(max=len(pulled) - 1)
                hit = pulled[place] == items
                scores[hit] = self.neighbours.join(scores[hit], pulls[place[hit]])
        if self.seen_offset is not None:
            scores[torch.isin(items, torch.as_tensor(np.unique(history)).long())] += self.seen_offset
        return scores

    def prefix(
        self, states: Float[Tensor, "batch items d_id"], mask: Bool[Tensor, "batch items"]
    ) -> tuple[Float[Tensor, "batch queries d_llm"], Route | None]:
        """The prefix P and how it was routed; no tokens at all for prefix = none."""
        if self.mformer is not None:
            return self.mformer(states, mask)
        if self.learned_prefix is not None:
            return self.learned_prefix.expand(states.shape[0], -1, -1), None
        return self._no_prefix(states), None

    def _no_prefix(self, states: Tensor) -> Tensor:
        return states.new_zeros(states.shape[0], 0, self.backbone.d_llm)

    def _added(self, states: Tensor, mask: Tensor, plain: bool) -> tuple[Tensor, Tensor, Route | None]:
        """Prefix [batch queries d_llm], suffix [1 d_llm] and route; plain: no prefix, [EOS] as suffix."""
        if plain:
            return self._no_prefix(states), self.plain_suffix, None
        prefix, route = self.prefix(states, mask)
        return prefix, self.suffix, route

    def forward(
        self,
        tokens: Sequence[np.ndarray],
        states: Float[Tensor, "batch items d_id"],
        mask: Bool[Tensor, "batch items"],
        plain: bool = False,
    ) -> tuple[Float[Tensor, "batch d_llm"], Route | None]:
        """Pooled LLM outputs for texts given as token ids, layout prefix_first. plain: without the trained tokens."""
        prefix, suffix, route = self._added(states, mask, plain)
        embed = self.backbone.embed
        rows = [torch.cat([p, embed(torch.as_tensor(t, dtype=torch.long)).to(p.dtype), suffix])
                for p, t in zip(prefix, tokens, strict=True)]
        if self.config.head.pooling == Pooling.MEAN:
            outputs = self.backbone.decoder.read_rows(rows, last_only=False).split([len(row) for row in rows])
            return torch.stack([out[:-1].mean(dim=0) for out in outputs]), route  # all but the suffix
        return self.backbone.decoder.read_rows(rows, last_only=True), route

    def read_past(
        self,
        past: Past,
        states: Float[Tensor, "batch items d_id"],
        mask: Bool[Tensor, "batch items"],
        plain: bool = False,
    ) -> tuple[Float[Tensor, "batch d_llm"], Route | None]:
        """Pooled LLM outputs for texts that were read before, layout text_first."""
        prefix, suffix, route = self._added(states, mask, plain)
        added = torch.cat([prefix, suffix.expand(prefix.shape[0], 1, -1)], dim=1)
        decoder = self.backbone.decoder
        return decoder.read(added.flatten(0, 1), decoder.behind(past, added.shape[1]), last_only=True), route
