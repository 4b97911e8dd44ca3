"""What each part of a fitted model gives."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import tiny
import torch

from laserrec.evaluation.evaluate import evaluate, rank_cases
from laserrec.evaluation.significance import bootstrap_interval, user_ndcg
from laserrec.experiments.inspect import AS_FITTED, SHUFFLED, inspect, shuffled
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util.errors import UserError

DATA = tiny.planted(20, users=40)


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory):
    """Knows that row i + 1 comes after row i: order is all."""
    config = tiny.config("none", id_model={"max_epochs": 40, "lr": 1e-2, "batch_size": 16})
    return LaserRecommender.fit_dataset(DATA, config, tmp_path_factory.mktemp("m") / "sasrec", "sasrec",
                                        progress=False)


def test_a_shuffled_history_has_the_same_items():
    histories = tiny.histories([0, 1, 2, 3, 4, 5, 6], [], [7], [8, 9, 8])
    other = shuffled(histories)
    assert [sorted(row) for row in other.lists()] == [sorted(row) for row in histories.lists()]
    assert other.lists() != histories.lists() and other.lists() == shuffled(histories).lists()


def test_order_is_found_to_count_where_it_does(sasrec):
    rows, cosine = inspect(sasrec, DATA)
    assert [row["part"] for row in rows] == [AS_FITTED, SHUFFLED]
    plain, mixed = rows
    assert plain["ndcg@10"] == pytest.approx(evaluate("m", sasrec, DATA, "validation").plain.ndcg)
    cases = DATA.cases("validation")
    ranks = rank_cases(sasrec, replace(cases, histories=shuffled(cases.histories)), 64, DATA.n_items).plain
    assert mixed["ndcg@10"] == pytest.approx(user_ndcg(ranks).mean()) and mixed["recall@10"] == (ranks <= 10).mean()
    assert mixed["difference"] == pytest.approx(mixed["ndcg@10"] - plain["ndcg@10"])
    assert mixed["low"] <= mixed["difference"] <= mixed["high"] < 0 < mixed["gain_percent"]
    assert mixed["gain_percent"] == pytest.approx(100 * (plain["ndcg@10"] / mixed["ndcg@10"] - 1))
    assert -1 <= cosine < 0.99


def test_a_method_without_order_is_found_to_have_none(tmp_path):
    config = tiny.config("none", neighbours={"decay": 1.0})
    model = LaserRecommender.fit_dataset(DATA, config, tmp_path / "ease", "ease", progress=False)
    rows, cosine = inspect(model, DATA)
    assert rows[1]["difference"] == 0 and cosine is None


def test_some_users(sasrec):
    told = []

    class Count:
        def __init__(self, name):
            told.append(name)

        def __enter__(self):
            return lambda count: told.append(count)

        def __exit__(self, *_):
            pass

    rows, _ = inspect(sasrec, DATA, "test", users=7, told=Count)
    assert sum(part for part in told if isinstance(part, int)) == 2 * 7
    assert [part for part in told if isinstance(part, str)] == [AS_FITTED, SHUFFLED]
    ranks = evaluate("m", sasrec, DATA, "test").ranks.plain
    chosen = np.sort(np.random.default_rng(0).choice(len(ranks), 7, replace=False))
    assert rows[0]["ndcg@10"] == pytest.approx(user_ndcg(ranks[chosen]).mean())


def test_intervals_are_over_users_and_not_over_their_cases(sasrec):
    """Each user's last three interactions as cases: as after a temporal split."""
    position, count = pl.col("position"), pl.len().over("user")
    split = pl.when(position >= count - 3).then(pl.lit("validation")).otherwise(pl.lit("train"))
    data = replace(DATA, interactions=DATA.interactions.with_columns(split=split))
    mixed = inspect(sasrec, data)[0][1]
    cases = data.cases("validation")
    ranks = [user_ndcg(rank_cases(sasrec, replace(cases, histories=histories), 64, data.n_items).plain)
             for histories in (shuffled(cases.histories), cases.histories)]
    assert len(cases) > len(set(cases.users.tolist()))
    assert (mixed["low"], mixed["high"]) == bootstrap_interval(ranks[0] - ranks[1], cases.users)


def test_other_data(sasrec):
    with pytest.raises(UserError, match="another catalogue"):
        inspect(sasrec, tiny.planted(21, users=40))


def test_laser_gets_a_row_for_each_part(llm_folder, tmp_path):
    config = tiny.config(llm_folder(), prompt={"layout": "text_first", "item_side": "mean", "max_items": 2,
                                               "max_item_tokens": 4, "template": "no_instruction"},
                         head={"projection": True, "whiten_dims": 8, "seen_offset": True, "id_share": 0.3},
                         neighbours={"count": 6, "l2": 1.0}, train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    model = LaserRecommender.fit_dataset(DATA, config, tmp_path / "m", progress=False)
    before = model.score(DATA.cases("test").histories)
    rows, cosine = inspect(model, DATA, k=5)
    assert len(rows) == 10 and cosine is not None and all("ndcg@5" in row for row in rows)
    assert torch.equal(model.score(DATA.cases("test").histories), before)
