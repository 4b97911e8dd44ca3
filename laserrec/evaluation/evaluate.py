"""One evaluator for every model and baseline: the target's rank among all items.

Nothing is filtered by default. Beside it stands `exclude_seen`, where the history's items are not ranked and a target
that is a repeat purchase counts as lost (rank = number of items).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from laserrec.data.dataset import Cases, Dataset
from laserrec.evaluation.metrics import Metrics, mean_ranks, ranks_without
from laserrec.util.io import write_parquet
from laserrec.util.memory import rows_at_once

Scorer = Callable[[Sequence[np.ndarray]], Tensor]
"""Histories (dense items, oldest first) -> Float[batch n_items]; column j is item j + 1."""


@dataclass(frozen=True)
class Ranks:
    """Float64[cases] each: nothing filtered, and history excluded."""

    plain: np.ndarray
    exclude_seen: np.ndarray


def rank_cases(score: Scorer, cases: Cases, batch_size: int, n_items: int,
               progress: Callable[[int], None] | None = None) -> Ranks:
    """Rank every case's target; at most batch_size x n_items scores are held at once."""
    plain, filtered = [], []
    for at in range(0, len(cases), batch_size):
        histories = cases.histories[at : at + batch_size]
        with torch.no_grad():
            scores = score(histories)
        if scores.shape != (len(histories), n_items):
            raise ValueError(f"scores have shape {tuple(scores.shape)}, not {(len(histories), n_items)}")
        targets = torch.as_tensor(cases.targets[at : at + batch_size].astype(np.int64)) - 1
        ranks = mean_ranks(scores, targets)
        seen = [torch.as_tensor(h.astype(np.int64)) - 1 for h in histories]
        plain.append(ranks.numpy())
        filtered.append(ranks_without(ranks, scores, targets, seen).numpy())
        if progress:
            progress(len(histories))
    return Ranks(np.concatenate(plain), np.concatenate(filtered)) if plain else Ranks(np.zeros(0), np.zeros(0))


@dataclass(frozen=True)
class Result:
    """One model on one split."""

    model: str
    split: str
    plain: Metrics
    exclude_seen: Metrics
    ranks: Ranks
    seconds: float

    def row(self) -> dict[str, object]:
        """{model, split, recall@k, ndcg@k, mrr, users, seconds, exclude_seen: {...}}."""
        hidden = self.exclude_seen.as_dict()
        hidden.pop("users")
        return {"model": self.model, "split": self.split, **self.plain.as_dict(),
                "seconds": round(self.seconds, 2), "exclude_seen": hidden}


def evaluate(model: str, score: Scorer, dataset: Dataset, split: str, k: int = 10, batch_size: int = 256,
             progress: Callable[[int], None] | None = None) -> Result:
    """Full ranking of one split; fewer than batch_size users at once where there are very many items. `seconds` is the
    time this took."""
    start = time.monotonic()
    batch_size = rows_at_once(dataset.n_items, batch_size)
    ranks = rank_cases(score, dataset.cases(split), batch_size, dataset.n_items, progress)
    return Result(model, split, Metrics.from_ranks(ranks.plain, k), Metrics.from_ranks(ranks.exclude_seen, k), ranks,
                  time.monotonic() - start)


def save_ranks(path: Path, dataset: Dataset, split: str, ranks: Ranks) -> None:
    """Per-case ranks with the caller's user ids, for significance tests."""
    cases = dataset.cases(split)
    names = dict(zip(dataset.users["user"].to_list(), dataset.users["user_id"].to_list(), strict=True))
    frame = pl.DataFrame({"user_id": [names[u] for u in cases.users.tolist()], "rank": ranks.plain,
                          "rank_exclude_seen": ranks.exclude_seen})
    write_parquet(path, frame)
