"""The evaluator on a small data set whose every rank is known."""

import numpy as np
import polars as pl
import pytest
import torch

from laserrec.data.dataset import Cases, Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import evaluate, rank_cases, save_ranks

N = 12


@pytest.fixture
def dataset() -> Dataset:
    rng = np.random.default_rng(3)
    rows = []
    for user in range(23):
        length = int(rng.integers(3, 8))
        for position, item in enumerate(rng.integers(0, N, length).tolist()):
            split = {length - 1: "test", length - 2: "validation"}.get(position, "train")
            rows.append((user, item, position, split))
    frame = pl.DataFrame(rows, schema=["user", "item", "position", "split"], orient="row")
    items = pl.DataFrame({"item": range(N), "item_id": [f"i{j}" for j in range(1, N + 1)]})
    users = pl.DataFrame({"user": range(23), "user_id": [f"u{j}" for j in range(1, 24)]})
    return Dataset(items, users, frame, {"sha256": "x"})


class Table:
    """Scores that depend on the whole history, with ties."""

    def score(self, histories: Histories) -> torch.Tensor:
        return torch.stack([torch.tensor([(sum(h) * (j + 1) + len(h)) % 5 for j in range(N)]).float()
                            for h in histories.lists()])


class Model:
    """Any function as a scorer."""

    def __init__(self, score):
        self.score = score


def naive(cases: Cases, exclude_seen: bool) -> list[float]:
    out = []
    for history, target in zip(cases.histories.lists(), cases.targets.tolist(), strict=True):
        scores = dict(enumerate(Table().score(Histories.of([history]))[0].tolist()))
        if exclude_seen and target in history:
            out.append(float(N))
            continue
        ranked = [j for j in scores if not (exclude_seen and j in history)]
        better = sum(scores[j] > scores[target] for j in ranked)
        equal = sum(scores[j] == scores[target] for j in ranked)
        out.append(1 + better + (equal - 1) / 2)
    return out


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_ranks_equal_the_naive_loop_whatever_the_batch(dataset, split, batch_size):
    cases = dataset.cases(split)
    pairs = zip(cases.targets.tolist(), cases.histories.lists(), strict=True)
    assert any(t in h for t, h in pairs), "wanted: a repeat purchase"
    ranks = rank_cases(Table(), cases, batch_size, N)
    assert ranks.plain.tolist() == naive(cases, False)
    assert ranks.exclude_seen.tolist() == naive(cases, True)
    assert ranks.plain.dtype == np.float64


def test_column_j_is_row_j():
    cases = Cases(np.array([0]), Histories.of([[2]]), torch.tensor([4]))
    best_last = rank_cases(Model(lambda h: torch.arange(5.0).repeat(len(h), 1)), cases, 8, 5)
    assert best_last.plain.tolist() == [1.0]


def test_scores_are_asked_for_in_bounded_batches_and_progress_sums_up(dataset):
    sizes, steps = [], []

    def score(histories):
        sizes.append(len(histories))
        assert not torch.is_grad_enabled()
        return Table().score(histories)

    rank_cases(Model(score), dataset.cases("test"), 5, N, progress=steps.append)
    assert max(sizes) == 5 and sum(sizes) == sum(steps) == len(dataset.cases("test"))


def test_wrong_shape_and_nan_are_errors(dataset):
    cases = dataset.cases("test")
    with pytest.raises(ValueError, match="shape"):
        rank_cases(Model(lambda h: torch.zeros(len(h), N + 1)), cases, 8, N)
    with pytest.raises(ValueError, match="NaN"):
        rank_cases(Model(lambda h: torch.full((len(h), N), torch.nan)), cases, 8, N)


def test_row_has_the_agreed_keys(dataset):
    result = evaluate("table", Table(), dataset, "test", k=3)
    row = result.row()
    assert list(row) == ["model", "split", "recall@3", "ndcg@3", "mrr", "users", "seconds", "exclude_seen"]
    assert row["users"] == len(dataset.cases("test")) and row["split"] == "test"
    assert row["recall@3"] == np.mean(np.array(naive(dataset.cases("test"), False)) <= 3)
    assert row["exclude_seen"]["mrr"] == pytest.approx(np.mean(1 / np.array(naive(dataset.cases("test"), True))))


def test_saved_ranks_carry_the_callers_user_ids(dataset, tmp_path):
    result = evaluate("table", Table(), dataset, "test")
    save_ranks(tmp_path / "ranks.parquet", dataset, "test", result.ranks)
    frame = pl.read_parquet(tmp_path / "ranks.parquet")
    assert frame["user_id"].to_list() == [f"u{u + 1}" for u in dataset.cases("test").users.tolist()]
    assert frame["rank"].to_list() == naive(dataset.cases("test"), False)
    assert frame["rank_exclude_seen"].to_list() == naive(dataset.cases("test"), True)
    assert [f.name for f in tmp_path.iterdir()] == ["ranks.parquet"]
