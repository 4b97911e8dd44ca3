"""One evaluator for all methods: the target's rank among all items.

Nothing is filtered by default. The variant `exclude_seen` leaves the history's items out of the ranking; a target that
is a repeat purchase then gets the last rank (the number of items).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.data.dataset import Cases, Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.metrics import Metrics, mean_ranks, ranks_without
from laserrec.util.io import write_parquet
from laserrec.util.memory import rows_at_once


@runtime_checkable
class Scorer(Protocol):
    """What the evaluator needs of a model."""

    def score(self, histories: Histories) -> Float[Tensor, "users items"]:
        """One column per item row; higher is better. Called without gradient."""
        ...


@dataclass(frozen=True)
class Ranks:
    """The target's rank in each test case, 1 = best."""

    plain: Float[np.ndarray, "cases"]
    """Among all items."""
    exclude_seen: Float[np.ndarray, "cases"]
    """Among the items that are not in the history."""


@torch.no_grad()
def rank_cases(model: Scorer, cases: Cases, batch_size: int, n_items: int,
               progress: Callable[[int], None] | None = None) -> Ranks:
    """Rank every case's target among all items. Batches are smaller where the scores would take too much memory.

    progress: called with the number of cases done after each batch. Raises ValueError for a wrong shape or NaN.
    """
    batch_size = rows_at_once(n_items, batch_size)
    plain, filtered = [torch.zeros(0, dtype=torch.double)], [torch.zeros(0, dtype=torch.double)]
    order = cases.histories.lengths.argsort(stable=True)  # histories of like length go through a model together
    for rows in order.split(batch_size):
        part = cases.take(rows.numpy())
        scores = model.score(part.histories)
        if scores.shape != (len(part), n_items):
            raise ValueError(f"scores have shape {tuple(scores.shape)}, not {(len(part), n_items)}")
        targets = part.targets.to(scores.device)
        ranks = mean_ranks(scores, targets)
        plain.append(ranks.cpu())
        filtered.append(ranks_without(ranks, scores, targets, part.histories.distinct().to(scores.device)).cpu())
        if progress:
            progress(len(part))
    back = order.argsort()
    return Ranks(torch.cat(plain)[back].numpy(), torch.cat(filtered)[back].numpy())


@dataclass(frozen=True)
class Result:
    """Metrics and ranks of one model on one split."""

    model: str
    split: str
    plain: Metrics
    exclude_seen: Metrics
    ranks: Ranks
    seconds: float

    def row(self) -> dict[str, object]:
        """As a flat dict for tables: model, split, recall@k, ndcg@k, mrr, users, seconds, exclude_seen."""
        hidden = self.exclude_seen.as_dict()
        hidden.pop("users")
        return {"model": self.model, "split": self.split, **self.plain.as_dict(),
                "seconds": round(self.seconds, 2), "exclude_seen": hidden}


def evaluate(name: str, model: Scorer, dataset: Dataset, split: str, k: int = 10, batch_size: int = 64,
             progress: Callable[[int], None] | None = None) -> Result:
    """Evaluate one model on one split, "validation" or "test", by full ranking.

    batch_size: users scored together (`eval.batch_size`). `seconds` in the result is the time of the whole evaluation.
    Raises UserError for a split without cases.
    """
    start = time.monotonic()
    ranks = rank_cases(model, dataset.cases(split), batch_size, dataset.n_items, progress)
    return Result(name, split, Metrics.from_ranks(ranks.plain, k), Metrics.from_ranks(ranks.exclude_seen, k), ranks,
                  time.monotonic() - start)


def save_ranks(path: Path, dataset: Dataset, split: str, ranks: Ranks) -> None:
    """Write each case's ranks with the user's own id as Parquet, for significance tests."""
    users = dataset.users["user_id"].gather(dataset.cases(split).users.tolist())
    frame = pl.DataFrame({"user_id": users, "rank": ranks.plain, "rank_exclude_seen": ranks.exclude_seen})
    write_parquet(path, frame)
