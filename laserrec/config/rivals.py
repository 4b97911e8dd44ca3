"""Settings of the rivals that Laser is compared with, one section each. Defaults are the published values; the presets
for two CPU cores change what must be smaller."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import Field, model_validator

from laserrec.config.section import Section

FOLDERS = {"kar": ("knowledge",), "recguru": ("other",)}
"""By section: settings that are folders on this machine. A result depends on what they hold, not on where they are."""


class RivalConfig(Section):
    """How a rival is trained: AdamW, early stopping on validation NDCG."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    batch_size: int = Field(128, ge=1)
    """Users per training step."""
    max_epochs: int = Field(200, ge=1)
    """Upper bound on the epochs. Early stopping on validation usually ends training before."""
    patience: int = Field(10, ge=1)
    """Stop after this many evaluations without a better validation NDCG."""
    eval_every: int = Field(1, ge=1)
    """Epochs between two evaluations on validation."""
    seed: int = 0
    """Random seed for initialisation, batch order and dropout."""


class SequenceRivalConfig(RivalConfig):
    """A rival with a transformer over the history."""

    d_model: int = Field(300, ge=2)
    """Width of the states and of the items' vectors."""
    blocks: int = Field(2, ge=1)
    """Transformer blocks."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    d_inner: int = Field(256, ge=1)
    """Width inside the feed-forward layers."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout on inputs, attention output and feed-forward output."""
    max_history: int = Field(50, ge=2)
    """Number of most recent items that the model reads."""
    seen_offset: bool = False
    """Learn one number that is added to the logits of all items in the user's history (not published)."""
    shuffle: float = Field(0.0, ge=0, le=1)
    """Share of the training sequences whose order is shuffled in each epoch (not published)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> SequenceRivalConfig:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        return self


class FDSAConfig(SequenceRivalConfig):
    """FDSA (Zhang et al. 2019): one transformer over the items' IDs and one over their features. Published: the values
    of UniSRec's comparison (Hou et al. 2022)."""

    separate_fields: bool = True
    """true: title and attributes (prompt.attributes) are features of their own, pooled by attention (published).
    false: one feature, the whole text of the item, whose vectors other methods read too."""


class ZESRecBody(StrEnum):
    """The network over the history's item vectors."""

    GRU = "gru"
    TRANSFORMER = "transformer"


class ZESRecConfig(SequenceRivalConfig):
    """ZESRec (Ding et al. 2021): items are known by their texts alone, so that a model serves other catalogues too."""

    body: ZESRecBody = ZESRecBody.GRU
    """gru: a recurrent network of one layer for each of `blocks` (published). transformer: causal self-attention."""


class KARConfig(SequenceRivalConfig):
    """KAR (Xi et al. 2023): texts that an LLM wrote about items and users are further inputs of a SASRec."""

    d_model: int = Field(64, ge=2)
    """Width of the states, of the items' vectors and of the adaptor's outputs."""
    knowledge: Path | None = None
    """Folder of texts that `laserrec knowledge` or a person wrote. none: an item's knowledge is its own text, and
    nothing is known of users."""
    shared_experts: int = Field(2, ge=1)
    """Experts of the adaptor that items and users share."""
    own_experts: int = Field(5, ge=1)
    """Experts that only items have, and as many that only users have."""
    d_expert: int = Field(128, ge=1)
    """Width inside an expert."""


class RecGURUConfig(SequenceRivalConfig):
    """RecGURU (Li et al. 2022): an autoencoder of the history whose user vector is trained to hide its domain."""

    d_model: int = Field(32, ge=2)
    """Width of the states and of the items' vectors."""
    blocks: int = Field(3, ge=1)
    """Transformer blocks of the encoder, and as many of the decoder."""
    heads: int = Field(1, ge=1)
    """Attention heads."""
    d_inner: int = Field(512, ge=1)
    """Width inside the feed-forward layers."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on inputs, attention output and feed-forward output."""
    other: Path | None = None
    """Data folder of a second domain. none: there is one domain and nothing to hide, so no adversary."""
    autoencoder_epochs: int = Field(20, ge=0)
    """Epochs of reconstruction before the recommender is trained."""
    negatives: int = Field(30, ge=1)
    """Sampled items beside each target of the reconstruction's cross-entropy."""
    bpr_negatives: int = Field(5, ge=1)
    """Sampled items that each target of the recommender is compared with."""
    adversary_lr: float = Field(1e-4, gt=0)
    """Learning rate of the domain discriminator's Adam (betas .5 and .9)."""
    adversary_steps: int = Field(5, ge=1)
    """Steps of the discriminator for each step of the model."""
    gradient_penalty: float = Field(0.1, ge=0)
    """Weight of the discriminator's gradient penalty."""

    @model_validator(mode="after")
    def _no_seen_offset(self) -> RecGURUConfig:
        if self.seen_offset:
            raise ValueError("recguru.seen_offset: BPR compares two items at a time and can't learn one")
        return self
