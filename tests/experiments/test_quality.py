"""The table of qualities: found again, not trained again; fusion and the paired interval against naive ones."""

import numpy as np
import pytest
import tiny
import torch

from laserrec.cli.reproduce import over
from laserrec.config import Config
from laserrec.experiments import quality
from laserrec.recommender.recommender import LaserRecommender


@pytest.fixture
def quick(monkeypatch, llm_folder):
    monkeypatch.setattr(quality, "ID_MODELS", {k: {"d_id": 16, "blocks": 1, "max_history": 6, "max_epochs": 1}
                                               for k in ("sasrec", "bert4rec")})
    return tiny.config(llm_folder(), train={"stage_one_epochs": 1, "stage_two_epochs": 0},
                       id_model={**tiny.ID_MODEL.model_dump(), "max_epochs": 1})


def test_all_models_of_all_seeds_once(quick, tmp_path, monkeypatch):
    dataset = tiny.planted(15, 30)
    result = quality.reproduce(dataset, quick, tmp_path, range(2), progress=False)
    names = {row["model"] for row in result["rows"]}
    assert names == {*quality.RIVALS, quality.LASER, quality.COSINES, quality.DISTILLED, quality.FUSION, "popularity",
                     quality.EASE, quality.TEXT_EASE, quality.NEAREST}
    assert all({"model", "kind", "seed", "recall@10", "ndcg@10", "mrr", "train_seconds", "trials"} <= row.keys()
               for row in result["rows"])
    assert len(result["rows"]) == 2 * 8 + 4
    monkeypatch.setattr(quality, "evaluate", None)  # nothing is evaluated twice
    assert quality.reproduce(dataset, quick, tmp_path, range(2), progress=False)["rows"] == result["rows"]
    monkeypatch.setitem(quality.TRIALS, quality.LASER, 12_345)  # what was tried since is told all the same
    rows = quality.reproduce(dataset, quick, tmp_path, range(2), progress=False)["rows"]
    assert {r["trials"] for r in rows if r["model"] == quality.LASER} == {12_345}
    laser = next(s for s in result["summary"] if s["model"] == quality.LASER)
    own = [r["ndcg@10"] for r in result["rows"] if r["model"] == quality.LASER]
    assert laser["ndcg@10"] == pytest.approx(np.mean(own)) and laser["ndcg@10_sd"] == pytest.approx(np.std(own, ddof=1))
    best = max((s for s in result["summary"] if s["kind"] == "id"), key=lambda s: s["ndcg@10"])
    assert laser["against"] == best["model"]
    assert laser["ndcg@10_difference"] == pytest.approx(laser["ndcg@10"] - best["ndcg@10"])
    assert laser["low"] <= laser["ndcg@10_difference"] <= laser["high"]
    for line in result["laser_over"]:
        rival = max((s for s in result["summary"] if s["kind"] == line["kind"]), key=lambda s: s["ndcg@10"])
        assert line["best"] == rival["model"]
        for metric in ("recall@10", "ndcg@10"):
            assert line[f"{metric}_ratio"] == pytest.approx(laser[metric] / rival[metric])
        assert line["ndcg@10_difference"] == pytest.approx(laser["ndcg@10"] - rival["ndcg@10"])
        assert f"{line['best']}: Recall@10 x {line['recall@10_ratio']:.3f}" in over(line, 10)
    assert [line["kind"] for line in result["laser_over"]] == ["id", "text"]


def test_fused_ranks_are_reciprocal_ranks():
    a, b = torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([[0.0, 5.0, 4.0, 1.0]])
    score = quality.fuse_ranks(lambda _: a, lambda _: b)([np.array([1])])
    ranks = [(1, 4), (3, 1), (2, 2), (4, 3)]
    assert score[0].tolist() == pytest.approx([1 / (60 + x) + 1 / (60 + y) for x, y in ranks])


def test_cosines_alone_are_a_user_and_all_items(llm_folder, llm, tmp_path):
    config = tiny.config(llm_folder(), neighbours={"count": 5, "l2": 1.0})
    model = LaserRecommender.fit_dataset(tiny.planted(20, 30), tiny.id_model(20), config, tmp_path, False, llm())
    histories = tiny.histories([3, 4], [9])
    before = model.score(histories)
    users = torch.nn.functional.normalize(model.encoder.encode(histories, 2), dim=-1)
    alone = quality.cosines_alone(model)(histories)
    torch.testing.assert_close(alone, users @ model.embeddings.T, atol=1e-5, rtol=1e-4)
    assert (before > alone + 1e-4).any() and torch.equal(model.score(histories), before)


def test_the_interval_holds_the_mean_and_shrinks_with_users():
    rng = np.random.default_rng(1)
    small, large = rng.normal(0.1, 1, 100), rng.normal(0.1, 1, 10_000)
    (a, b), (c, d) = quality._interval(small), quality._interval(large)
    assert a < small.mean() < b and c < large.mean() < d
    assert (d - c) == pytest.approx(2 * 1.96 * large.std() / 100, rel=0.1) and d - c < b - a


def test_rivals_settings_are_valid():
    for _, settings in quality.RIVALS.values():
        Config.model_validate({"id_model": settings})
    assert set(quality.RIVALS) <= set(quality.TRIALS)
