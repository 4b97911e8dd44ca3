"""A Laser that ranks items anew by a network, through folder, index, new items, distilling and refit."""

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from test_distil import MEAN, QUICK, N

from laserrec.methods.laser import finish, ranker_fit
from laserrec.recommender.distil import distil
from laserrec.recommender.indexing import build_index
from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval.index import IndexKind

DATA = tiny.planted(N, users=60)
HISTORIES = {"a": ["i3", "i4"], "b": ["i9"], "c": [f"i{i}" for i in range(1, 9)]}
NEW = pl.DataFrame({"item_id": ["new1"], "title": ["steel drill 99"]})


@pytest.fixture(scope="module")
def folder(fit, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranked") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranker_fit, "_FEWEST_USERS", 10)
        patch.setattr(finish, "_FEWEST_USERS", 10)
        # Whatever it is worth on a few users, it is kept.
        patch.setattr(ranker_fit, "_worse", lambda gain: False)
        fit(DATA, out, **{**MEAN, "blend": {"trials": 40, "regressions": 0, "network": 5}})
    return out


@pytest.fixture
def opened(folder, llm):
    return lambda: LaserRecommender.from_pretrained(folder, llm())


def test_it_is_kept_in_the_folder(opened, fit, folder):
    model = opened()
    assert model.model.ranker is not None and len(model.model.ranker.hidden.bias) == 5
    assert model.facts["training"]["parts"]["network"]["kept"]
    again = fit(DATA, folder, **{**MEAN, "blend": {"trials": 40, "regressions": 0, "network": 5}})
    assert again.recommend(HISTORIES).equals(model.recommend(HISTORIES))
    model.model.ranker.out.weight.data.mul_(-1)
    assert not again.recommend(HISTORIES)["score"].equals(model.recommend(HISTORIES)["score"])


def test_an_index_and_candidates_give_the_same_scores(opened, tmp_path):
    mine, plain = opened(), opened()
    build_index(mine, IndexKind.EXACT, tmp_path / "index", queries=5)
    mine.use_index(tmp_path / "index")
    for model in (mine, plain):
        model.add_items(NEW)
        model.remove_items(["i12"])
    for how in ({}, {"exclude_seen": True}, {"candidates": ["i4", "new1", "i9"]}, {"exclude": ["i3"]}):
        got, want = (model.recommend(HISTORIES, **how) for model in (mine, plain))
        assert got.drop("score").equals(want.drop("score"))
        np.testing.assert_allclose(got["score"], want["score"], atol=1e-6)
    every = plain.recommend(HISTORIES, k=N).select("user_id", "item_id", "score")
    some = plain.recommend(HISTORIES, k=3, candidates=["i4", "new1", "i9"])
    both = some.join(every, on=["user_id", "item_id"])
    np.testing.assert_allclose(both["score"], both["score_right"], atol=1e-6)


def test_a_new_item_is_scored_whatever_is_saved(opened, tmp_path, llm):
    model = opened()
    model.add_items(NEW)
    want = model.recommend(HISTORIES, k=N + 1)
    model.save_pretrained(tmp_path / "saved")
    again = LaserRecommender.from_pretrained(tmp_path / "saved", llm())
    got = again.recommend(HISTORIES, k=N + 1)
    assert got.drop("score").equals(want.drop("score")) and "new1" in want["item_id"].to_list()
    np.testing.assert_allclose(got["score"], want["score"], atol=1e-5)


def test_a_distilled_model_has_its_teachers(opened, tmp_path):
    teacher = opened()
    student = distil(teacher, DATA, tmp_path / "student", QUICK, progress=False)
    tiny.assert_same(dict(student.model.ranker.state_dict()), dict(teacher.model.ranker.state_dict()))


def test_a_refit_trains_its_own(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(ranker_fit, "_FEWEST_USERS", 10)
    monkeypatch.setattr(finish, "_FEWEST_USERS", 10)
    monkeypatch.setattr(ranker_fit, "_worse", lambda gain: False)
    model, more = opened(), tiny.planted(N, users=70)
    newer = model.refit(more, tmp_path / "newer", progress=False)
    own, old = newer.model.ranker, model.model.ranker
    counts = torch.bincount(more.train_sequences.items, minlength=N).float()
    assert torch.equal(own.popularity, counts) and not torch.equal(own.out.weight, old.out.weight)
