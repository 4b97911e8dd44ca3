"""Settings of the rivals that Laser is compared with, one section each. Defaults are the published values; the presets
for two CPU cores change what must be smaller."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import Field, model_validator

from laserrec.config.section import Section, check_heads

FOLDERS: dict[str, tuple[str, ...]] = {"recformer": ("pretrain_on",), "kar": ("knowledge",), "recguru": ("other",)}
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


class LruRecConfig(RivalConfig):
    """LRURec (Yue et al. 2024), a linear recurrence over item embeddings; alone, and as the retriever of LlamaRec."""

    d_id: int = Field(64, ge=2)
    """Width of the item embeddings; the recurrent states are twice as many complex numbers."""
    blocks: int = Field(2, ge=1)
    """Blocks of a recurrence and a feed-forward."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on embeddings, recurrence and feed-forward."""
    max_history: int = Field(50, ge=2)
    """Number of most recent items that the model reads."""
    seen_offset: bool = False
    """Learn one number that is added to the logits of all items in the user's history (not published)."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    batch_size: int = Field(64, ge=1)
    """Users per training step."""
    max_epochs: int = Field(500, ge=1)
    """Upper bound on the epochs. Early stopping on validation usually ends training before."""
    patience: int = Field(20, ge=1)
    """Stop after this many evaluations without a better validation NDCG."""
    eval_every: int = Field(4, ge=1)
    """Epochs between two evaluations on validation."""


class LlamaRecConfig(RivalConfig):
    """LlamaRec (Yue et al. 2023): the LLM ranks what LRURec (section `lrurec`) retrieves, by the letters before the
    candidates. These are the settings of its ranking."""

    candidates: int = Field(20, ge=2, le=26)
    """Retrieved items that the LLM ranks, one letter each."""
    max_history: int = Field(20, ge=1)
    """Number of most recent items in the prompt."""
    title_tokens: int = Field(32, ge=4)
    """Maximum tokens per title; longer ones are truncated at the end."""
    lora_rank: int = Field(8, ge=1)
    """Rank of the low-rank updates of the query and value maps."""
    lora_alpha: float = Field(32.0, gt=0)
    """The updates are scaled by lora_alpha / lora_rank."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on what the low-rank updates read."""
    epoch_examples: int | None = Field(None, ge=1)
    """Train on so many examples per epoch, drawn at random; none: on every position that has a history."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(16, ge=1)
    """Prompts per training step."""
    max_epochs: int = Field(1, ge=1)
    """Epochs of the ranker."""


class RecFormerConfig(RivalConfig):
    """RECFORMER (Li et al. 2023): a sliding-window transformer over the items' attributes as text."""

    d_model: int = Field(768, ge=2)
    """Width of the transformer and of the embeddings of users and items."""
    blocks: int = Field(12, ge=1)
    """Transformer blocks."""
    heads: int = Field(12, ge=1)
    """Attention heads."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on embeddings, attention output and feed-forward output."""
    window: int = Field(64, ge=2)
    """Tokens that each token reads around itself, half of them before and half behind it."""
    max_items: int = Field(50, ge=1)
    """Number of most recent items that the model reads."""
    max_tokens: int = Field(1024, ge=8)
    """Maximum tokens of a history; the oldest are left out."""
    attributes: tuple[str, ...] = ("title", "brand", "category")
    """Item columns that are read, in this order."""
    attribute_tokens: int = Field(32, ge=2)
    """Maximum tokens per attribute, its name included; longer ones are truncated at the end."""
    temperature: float = Field(0.05, gt=0)
    """The softmax's temperature, by which cosines are divided."""
    pretrain_on: tuple[str, ...] = ()
    """Data folders of other catalogues to pre-train on."""
    pretrain_own: bool = False
    """Pre-train on the training interactions of the data folder itself, beside those of pretrain_on if there are any
    (not published: it is for want of the authors' weights). Neither: no pre-training."""
    pretrain_epochs: int = Field(32, ge=1)
    """Epochs of pre-training, if there is any."""
    mask_probability: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that pre-training hides and asks for."""
    mask_weight: float = Field(0.1, ge=0)
    """Weight of the loss on hidden tokens beside that of the contrast between items."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    max_epochs: int = Field(16, ge=0)
    """Upper bound on the epochs of stage 1, in which items are encoded anew at each epoch. 0: the model stays as
    pre-training left it."""
    patience: int = Field(5, ge=1)
    """Stop stage 1 after this many evaluations without a better validation NDCG."""
    stage_two_epochs: int = Field(16, ge=0)
    """Upper bound on the epochs of stage 2, in which the best epoch's item embeddings stay fixed."""
    stage_two_patience: int = Field(3, ge=1)
    """Stop stage 2 after this many evaluations without a better validation NDCG."""
    eval_every: int = Field(3, ge=1)
    """Epochs between two evaluations on validation."""

    @property
    def pretrains(self) -> bool:
        """Whether training begins with pre-training."""
        return self.pretrain_own or bool(self.pretrain_on)

    @model_validator(mode="after")
    def _sizes_fit(self) -> RecFormerConfig:
        check_heads("d_model", self.d_model, self.heads)
        if self.window % 2:
            raise ValueError(f"window {self.window} is odd; a token reads as many tokens before as behind itself")
        return self


class LLM4RecConfig(RivalConfig):
    """LLM4REC (Wang et al. 2024): tokens of users and items in the LLM, whose attention knows the edges between them;
    all weights are trained. The number of layers is `backbone.layers`."""

    max_history: int = Field(50, ge=2)
    """Number of most recent items in the prompt."""
    seen_offset: bool = False
    """Learn one number that is added to the logits of all items in the user's history (not published)."""
    edges: bool = True
    """Add the graph's edges to the attention. False: tokens alone, as an ablation."""
    user_dropout: float = Field(0.5, ge=0, le=1)
    """Share of the training sequences whose user token is replaced by that of an unknown user, so that the model
    learns to do without."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(32, ge=1)
    """Users per training step."""


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
        check_heads("d_model", self.d_model, self.heads)
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
