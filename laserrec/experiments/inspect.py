"""What each part of a fitted model gives: the same users ranked without it, paired user by user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from laserrec.data.dataset import Cases, Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import rank_cases
from laserrec.evaluation.metrics import Metrics
from laserrec.evaluation.significance import bootstrap_interval, user_ndcg
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.task import scale_histories
from laserrec.methods.laser.variants import NO_RANKER, variants
from laserrec.methods.protocol import TwoTower
from laserrec.recommender.recommender import LaserRecommender
from laserrec.recommender.scorers import FirstItems
from laserrec.util.errors import UserError

AS_FITTED, SHUFFLED = "as fitted", "history shuffled"
_COSINE_USERS = 1_000
Part = dict[str, Any]
"""{part, recall@k, ndcg@k, difference, low, high, gain_percent}: NDCG with the change less NDCG as fitted, its 95%
bootstrap interval over users, and what the part adds in percent."""


def shuffled(histories: Histories) -> Histories:
    """Each history's items in a random order, the same at every call."""
    keys = np.random.default_rng(0).random(len(histories.items))
    order = np.lexsort((keys, histories.users.cpu().numpy()))
    return Histories(histories.items[torch.from_numpy(order).to(histories.device)], histories.ends)


def inspect(model: LaserRecommender, dataset: Dataset, split: str = "validation", users: int | None = None,
            k: int = 10, told: Callable[[str], AbstractContextManager[Callable[[int], None] | None]] | None = None
            ) -> tuple[list[Part], float | None]:
    """One row per part, the first of the model as fitted, and the mean cosine of users' vectors before and after
    shuffling their histories (None for a method without vectors). Nothing is trained again, so a row tells what the
    fitted model loses, not what one trained without the part would reach. Where a network ranks items anew by all
    parts, the second row is of the model without it, and the parts are compared with that.

    users: at most so many of the split, drawn at random. told: name of a row -> a context that yields what is called
    with the number of users done. Raises UserError for another catalogue and for a split without cases.
    """
    if not model.items["item_id"].head(dataset.n_items).equals(dataset.items["item_id"]):
        raise UserError("the model has another catalogue than the data folder; inspect it with its own data")
    cases = dataset.cases(split) if users is None else dataset.cases(split).sample(users)
    rows: list[Part] = []
    base: Float[np.ndarray, "cases"] | None = None
    parts: Float[np.ndarray, "cases"] | None = None
    mixed = replace(cases, histories=shuffled(cases.histories))
    scorer = FirstItems(model, dataset.n_items)
    for name, change in _changes(model, dataset):
        with change(), (told or _silent)(name) as advance:
            asked = mixed if name == SHUFFLED else cases
            ranks = rank_cases(scorer, asked, model.batch_size, dataset.n_items, advance).plain
        ndcg = user_ndcg(ranks, k)
        base = ndcg if base is None else base
        rows.append(_row(name, ranks, base if name == SHUFFLED else parts, cases.users, k))
        parts = ndcg if name in (AS_FITTED, NO_RANKER) else parts
    return rows, _shuffle_cosine(model, cases)


def _silent(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def _changes(model: LaserRecommender, dataset: Dataset
             ) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
    yield AS_FITTED, nullcontext
    if isinstance(model.model, Laser):
        yield from variants(model.model, scale_histories(dataset)).items()
    yield SHUFFLED, nullcontext


def _row(name: str, ranks: Float[np.ndarray, "cases"], base: Float[np.ndarray, "cases"] | None,
         users: Int[np.ndarray, "cases"], k: int) -> Part:
    metrics = Metrics.from_ranks(ranks, k)
    row: Part = {"part": name, f"recall@{k}": metrics.recall, f"ndcg@{k}": metrics.ndcg}
    if base is None:
        return row
    difference = user_ndcg(ranks, k) - base
    low, high = bootstrap_interval(difference, users)
    gain = 100 * (float(base.mean()) / metrics.ndcg - 1) if metrics.ndcg else None
    return {**row, "difference": float(difference.mean()), "low": low, "high": high, "gain_percent": gain}


@torch.no_grad()
def _shuffle_cosine(model: LaserRecommender, cases: Cases) -> float | None:
    """Of users whose history has at least two different items."""
    tower = model.model
    if not isinstance(tower, TwoTower):
        return None
    distinct = torch.bincount(cases.histories.distinct().users, minlength=len(cases))
    several = (distinct > 1).nonzero()[:_COSINE_USERS, 0]
    parts = []
    for rows in several.split(model.batch_size):
        histories = cases.histories.take(rows)
        one, other = tower.users(histories), tower.users(shuffled(histories))
        parts.append(F.cosine_similarity(one, other, dim=-1))
    return float(torch.cat(parts).mean()) if parts else None
