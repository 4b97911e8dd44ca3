"""Settings of the rivals that Laser is compared with, one section each. Defaults are the published values; the presets
for two CPU cores change what must be smaller."""

from __future__ import annotations

from pydantic import Field, model_validator

from laserrec.config.section import Section

FOLDERS = {"recformer": ("pretrain_on",)}
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
    """Data folders of other catalogues to pre-train on. Empty: no pre-training."""
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

    @model_validator(mode="after")
    def _sizes_fit(self) -> RecFormerConfig:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        if self.window % 2:
            raise ValueError(f"window {self.window} is odd; a token reads as many tokens before as behind itself")
        return self


class LLM4RecConfig(RivalConfig):
    """LLM4REC (Wang et al. 2024): tokens of users and items in the LLM, whose attention knows the edges between them;
    all weights are trained. The number of layers is `backbone.layers`."""

    max_history: int = Field(50, ge=2)
    """Number of most recent items in the prompt."""
    edges: bool = True
    """Add the graph's edges to the attention. False: tokens alone, as an ablation."""
    user_dropout: float = Field(0.5, ge=0, le=1)
    """Share of the training sequences whose user token is replaced by that of an unknown user, so that the model
    learns to do without."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(32, ge=1)
    """Users per training step."""
