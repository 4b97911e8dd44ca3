"""Settings of the ID-based sequence models."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from laserrec.config.section import Section, check_heads


class IdModelKind(StrEnum):
    """Architecture of the ID model."""

    SASREC = "sasrec"
    BERT4REC = "bert4rec"
    GRU4REC = "gru4rec"
    NONE = "none"


class IdLoss(StrEnum):
    """Training loss of the ID model."""

    CROSS_ENTROPY = "cross_entropy"
    BCE = "bce"


class Softmax(StrEnum):
    """Items that the cross-entropy goes over."""

    AUTO = "auto"
    FULL = "full"
    SAMPLED = "sampled"


class ItemTable(StrEnum):
    """Where the ID model's item embeddings come from."""

    IDS = "ids"
    LLM_START = "llm_start"
    TEXT = "text"


class IdModelConfig(Section):
    """The ID model: a sequential recommender that is trained first and then frozen. The M-Former reads its states
    (`bi-tuning`, `paper`), and its own cosine is a part of the score (`head.id_share`)."""

    kind: IdModelKind = IdModelKind.SASREC
    """sasrec: causal attention, predicts the next item. bert4rec: bidirectional attention, predicts masked items (used
    by the paper). gru4rec: a recurrent network, predicts the next item. none: Laser without an ID model."""
    d_id: int = Field(128, ge=2)
    """Width of the hidden states [C_u, d_i]. The paper's BERT4Rec has 64."""
    blocks: int = Field(2, ge=1)
    """Transformer blocks."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout on embeddings, attention output and feed-forward output."""
    max_history: int = Field(50, ge=2)
    """Number of most recent items that the model reads."""
    loss: IdLoss = IdLoss.CROSS_ENTROPY
    """cross_entropy: softmax over the items (see `softmax`). bce: one sampled negative per positive (sasrec only)."""
    softmax: Softmax = Softmax.AUTO
    """loss cross_entropy only. full: over all items (paper). sampled: over the batch's own targets and items drawn at
    each step, corrected for how likely each is to be among them; a step then costs the same however large the catalogue
    is. auto: sampled above 10,000 items, of kind sasrec above 3,000; else full."""
    negatives: int = Field(1024, ge=1)
    """softmax sampled only: items drawn at each step."""
    items: ItemTable = ItemTable.IDS
    """ids: one trained vector per item, random at first (paper). llm_start: one trained vector per item that starts as
    the item's embedding from the frozen LLM, whitened to d_id dimensions. text: no trained vectors, only a trained
    linear map of the LLM's item embeddings (UniSRec's design, without its pretraining on other data)."""
    seen_offset: bool = False
    """Learn one number that is added to the logits of all items in the user's history."""
    shuffle: float = Field(0.0, ge=0, le=1)
    """Share of the training sequences whose order is shuffled in each epoch: data augmentation for data where the order
    carries little information."""
    mask_probability: float = Field(0.2, gt=0, lt=1)
    """bert4rec only: share of the items that are masked."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    batch_size: int = Field(128, ge=1)
    """Users per training step."""
    max_epochs: int = Field(200, ge=1)
    """Upper bound on the epochs. Early stopping on validation NDCG@10 usually ends training before."""
    patience: int = Field(10, ge=1)
    """Stop after this many evaluations without a better validation NDCG@10."""
    eval_every: int = Field(1, ge=1)
    """Epochs between two evaluations on validation."""
    seed: int = 0
    """Random seed for initialisation, batch order, dropout and masking."""

    @model_validator(mode="after")
    def _heads_divide(self) -> IdModelConfig:
        check_heads("d_id", self.d_id, self.heads)
        if self.loss == IdLoss.BCE and self.kind != IdModelKind.SASREC:
            raise ValueError("loss 'bce' is for kind 'sasrec'; bert4rec's cloze task uses 'cross_entropy'")
        if self.loss == IdLoss.BCE and self.softmax == Softmax.SAMPLED:
            raise ValueError("softmax 'sampled' needs loss 'cross_entropy': 'bce' has no softmax")
        if self.loss == IdLoss.BCE and self.seen_offset:
            raise ValueError("seen_offset needs loss 'cross_entropy': 'bce' compares two items at a time")
        return self
