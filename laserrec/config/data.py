"""Settings of the data folder and of the evaluation."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from laserrec.config.section import Section


class Split(StrEnum):
    """How interactions are split into training, validation and test."""

    LEAVE_ONE_OUT = "leave_one_out"
    TEMPORAL = "temporal"


class DataConfig(Section):
    """How raw files become a data folder (`laserrec prepare`)."""

    min_user_interactions: int = Field(5, ge=1)
    """k-core filter: drop users with fewer interactions. Users and items are filtered in turn until nothing changes."""
    min_item_interactions: int = Field(5, ge=1)
    """k-core filter: drop items with fewer interactions. Users and items are filtered in turn until nothing changes."""
    item_columns: tuple[str, ...] = ()
    """Further columns of the items to keep as text, such as price or colour. prompt.attributes can name them."""
    drop_untitled: bool = True
    """Drop items without a title, and their interactions, before the k-core filter. The paper drops them after it
    (4.1.1). No effect where no item has a title."""
    drop_duplicates: bool = True
    """Keep one of several interactions with the same user, item and timestamp."""
    split: Split = Split.LEAVE_ONE_OUT
    """leave_one_out: each user's last item is test, the one before it validation (paper, 4.1.3). temporal: two cut-off
    times, the same for all users."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """temporal only: share of all interactions that falls between the two cut-off times."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """temporal only: share of all interactions that comes after the second cut-off time."""

    @model_validator(mode="after")
    def _columns_are_further_ones(self) -> DataConfig:
        own = {"item", "item_id", "title", "brand", "category", "vector"}
        if taken := own & set(self.item_columns):
            raise ValueError(f"item_columns are further columns; {', '.join(sorted(taken))} is read anyway, or has a "
                             "meaning of its own")
        if len(set(self.item_columns)) < len(self.item_columns) or "" in self.item_columns:
            raise ValueError("item_columns names a column twice, or an empty one")
        return self


class EvalConfig(Section):
    """Evaluation by full ranking, the same for every method."""

    k: int = Field(10, ge=1)
    """Cut-off of Recall@k and NDCG@k."""
    batch_size: int = Field(64, ge=1)
    """Users that are encoded and ranked together."""
    validates: bool = True
    """Choose the best epoch, and what blend chooses, on validation. false: train all epochs, keep the last and leave
    the parts' weights as they are given, for data too small to validate on."""
