"""Settings of the rivals that Laser is compared with, one section each. Defaults are the published values; the presets
for two CPU cores change what must be smaller."""

from __future__ import annotations

from pydantic import Field

from laserrec.config.section import Section


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
