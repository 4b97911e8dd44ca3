"""Bi-Tuning: trained prefix and suffix around a history's text, through the frozen LLM (paper, 3.1.2; Eq. 1-2)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from laserrec.config import Config, Layout, Pooling, Prefix, Template
from laserrec.data.histories import Histories
from laserrec.data.prompt import INSTRUCTIONS
from laserrec.llm.backbone import Backbone
from laserrec.methods.laser.id_states import IdStates
from laserrec.methods.laser.mformer import MFormer, Route
from laserrec.methods.laser.texts import Texts
from laserrec.util.device import move


class Reader(nn.Module):
    """Histories -> the LLM's pooled outputs. Prefix and suffix are trained; the LLM is held beside them and is in
    neither parameters nor state_dict."""

    plain_suffix: Float[Tensor, "1 d_llm"]

    def __init__(self, config: Config, backbone: Backbone, texts: Texts, ids: IdStates):
        super().__init__()
        self.backbone, self.texts, self.ids, self.pooling = backbone, texts, ids, config.head.pooling
        settings, d_llm, device = config.mformer, backbone.d_llm, backbone.device
        token_std = float(backbone.embedding.float().std())
        self.mformer = self.learned_prefix = None
        if settings.prefix in (Prefix.MFORMER, Prefix.ONE_EXPERT):
            base = self._token_start(settings.queries) if settings.zero_init else None
            self.mformer = MFormer(settings, ids.d_id, d_llm, token_std, base)
        elif settings.prefix == Prefix.LEARNED:
            self.learned_prefix = nn.Parameter(torch.randn(settings.queries, d_llm) * token_std)
        eos = backbone.embedding[backbone.tokenizer.eos_token_id or 0].float().cpu()
        start = eos if config.head.suffix_from_eos else torch.randn(d_llm) * token_std
        frozen = self.pooling == Pooling.EOS
        self.suffix = nn.Parameter((eos if frozen else start)[None].clone(), requires_grad=not frozen)
        self.register_buffer("plain_suffix", eos[None].clone(), persistent=False)
        self.to(device)

    def _token_start(self, count: int) -> Float[Tensor, "count d_llm"]:
        """Embeddings of the instruction's first words, repeated as needed: a prefix that reads as text."""
        ids = self.backbone.tokenizer(INSTRUCTIONS[Template.PAPER], add_special_tokens=False)["input_ids"]
        return self.backbone.embed(self.backbone.tokens((ids * count)[:count])).float().cpu()

    def read(self, histories: Histories, hide: Bool[Tensor, "batch"] | None = None
             ) -> tuple[Float[Tensor, "batch d_llm"], Route | None]:
        """Outputs at the suffix and how each prefix was routed. hide: histories whose ID states are hidden."""
        prefix, route = self.prefix(*self.ids.states(histories, hide))
        return self._outputs(histories, prefix, self.suffix, as_item=False), route

    def read_items(self, histories: Histories, plain: bool) -> Float[Tensor, "batch d_llm"]:
        """Outputs of histories of one item, which stand for the items. plain: without a prefix and with a frozen [EOS]
        as the suffix."""
        if plain:
            empty = self.suffix.new_zeros(len(histories), 0, self.backbone.d_llm)
            return self._outputs(histories, empty, self.plain_suffix, as_item=True)
        prefix, _ = self.prefix(*self.ids.states(histories))
        return self._outputs(histories, prefix, self.suffix, as_item=True)

    def prefix(
        self, states: Float[Tensor, "batch items d_id"], mask: Bool[Tensor, "batch items"]
    ) -> tuple[Float[Tensor, "batch queries d_llm"], Route | None]:
        """The prefix P; no tokens at all for mformer.prefix = none."""
        if self.mformer is not None:
            return self.mformer(states, mask)
        if self.learned_prefix is not None:
            return self.learned_prefix.expand(states.shape[0], -1, -1), None
        return states.new_zeros(states.shape[0], 0, self.backbone.d_llm), None

    @torch.no_grad()
    def route(self, histories: Histories) -> Route | None:
        """The router's choice alone, without the LLM; None where there is no router."""
        if self.mformer is None or self.mformer.router is None:
            return None
        return self.mformer.router(*self.ids.states(histories))

    @property
    def overhead(self) -> int:
        """Tokens of every history beside its items: prefix, instruction and suffix."""
        queries = self.mformer.config.queries if self.mformer is not None else 0
        queries = queries if self.learned_prefix is None else len(self.learned_prefix)
        return queries + len(self.texts.prompt.instruction) + 1

    @abstractmethod
    def _outputs(self, histories: Histories, prefix: Tensor, suffix: Tensor, as_item: bool) -> Tensor:
        """[batch d_llm]; prefix [batch queries d_llm], suffix [1 d_llm]."""


class PrefixFirst(Reader):
    """[prefix][text][suffix], the paper's layout."""

    def _outputs(self, histories: Histories, prefix: Tensor, suffix: Tensor, as_item: bool) -> Tensor:
        backbone, texts = self.backbone, self.texts.texts(histories, as_item)
        # One transfer for the batch: the texts lie one behind another.
        ids = torch.cat([torch.as_tensor(t, dtype=torch.long) for t in texts])
        embeds = backbone.embed(move(ids, backbone.device)).to(prefix.dtype)
        parts = embeds.split([len(t) for t in texts])
        rows = [torch.cat([p, t, suffix]) for p, t in zip(prefix, parts, strict=True)]
        if self.pooling == Pooling.MEAN:
            outputs = backbone.decoder.read_rows(rows, last_only=False).split([len(row) for row in rows])
            return torch.stack([out[:-1].mean(dim=0) for out in outputs])  # all but the suffix
        return backbone.decoder.read_rows(rows, last_only=True)


class TextFirst(Reader):
    """[text][prefix][suffix] (not in the paper): texts don't depend on the user and are read once."""

    def _outputs(self, histories: Histories, prefix: Tensor, suffix: Tensor, as_item: bool) -> Tensor:
        added = torch.cat([prefix, suffix.expand(len(prefix), 1, -1)], dim=1)
        decoder = self.texts.decoder
        behind = decoder.behind(self.texts.past(histories), added.shape[1])
        return decoder.read(added.flatten(0, 1), behind, last_only=True)


READERS: dict[Layout, type[Reader]] = {Layout.PREFIX_FIRST: PrefixFirst, Layout.TEXT_FIRST: TextFirst}
"""Of the layouts in which the LLM reads histories."""
