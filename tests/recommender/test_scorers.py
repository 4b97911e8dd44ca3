"""From a model's name to what the evaluator calls."""

import warnings
from dataclasses import replace

import polars as pl
import pytest
import tiny
import torch

from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.closed_form import ItemRegression, Popularity
from laserrec.recommender.recommender import LaserRecommender
from laserrec.recommender.scorers import FirstItems, flattered, load_scorer
from laserrec.util.device import CPU
from laserrec.util.errors import UserError

N = 12
HISTORIES = [[0, 3], [2], [5, 5, 1]]


@pytest.fixture
def folder(llm_folder, tmp_path):
    """A SASRec that was fitted on `tiny.planted`."""
    config = tiny.config(llm_folder(), eval={"batch_size": 5})
    LaserRecommender.fit_dataset(tiny.planted(N), config, tmp_path / "sasrec", "sasrec", progress=False)
    return tmp_path / "sasrec"


def test_a_folder_scores_as_the_model_in_it(folder):
    scorer, batch_size = load_scorer(str(folder), tiny.planted(N), CPU)
    asked = tiny.histories(*HISTORIES)
    assert scorer.score(asked).equal(LaserRecommender.from_pretrained(folder).score(asked)) and batch_size == 5


def test_popularity_and_ease_are_fitted_at_once(tmp_path, monkeypatch):
    data, asked = tiny.planted(N), tiny.histories(*HISTORIES)
    scorer, _ = load_scorer("popularity", data, CPU)
    assert isinstance(scorer, Popularity) and scorer.counts.sum() == len(data.train_sequences.items)
    scorer, _ = load_scorer("ease", data, CPU)
    assert isinstance(scorer, ItemRegression) and scorer.config.l2 == 400  # its own best settings, not Laser's
    assert evaluate("ease", scorer, data, "test").plain.ndcg > 0.3 and scorer.score(asked).shape == (3, N)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ease").mkdir()
    (tmp_path / "ease" / "model.json").write_text("{}")
    with pytest.raises(UserError, match="its format is None"):  # a model folder of that name goes first
        load_scorer("ease", data, CPU)


def test_items_that_were_added_are_not_scored(llm, tmp_path):
    backbone, data = llm("llama"), tiny.planted(N)
    config = tiny.config(backbone.name)
    model = LaserRecommender.fit_dataset(data, config, tmp_path / "model", progress=False)
    model.add_items(pl.DataFrame({"item_id": ["new"], "title": ["steel drill"]}))
    model.save_pretrained(tmp_path / "model")
    scorer, _ = load_scorer(str(tmp_path / "model"), data, CPU)
    assert scorer.score(tiny.histories(*HISTORIES)).shape == (3, N)


def test_other_names_and_other_items_are_refused(folder):
    with pytest.raises(UserError, match=r"there is no model folder 'popularty'; give .* popularity, ease"):
        load_scorer("popularty", tiny.planted(N), CPU)
    with pytest.raises(UserError, match="sasrec has another catalogue than the data folder, and its method"):
        load_scorer(str(folder), tiny.planted(N + 1), CPU)
    with pytest.raises(UserError, match="is not a model folder"):
        load_scorer(str(folder.parent), tiny.planted(N), CPU)


def test_other_data_with_the_same_items_are_told(folder):
    with pytest.warns(UserWarning, match="sasrec was fitted on other data, which have the same items"):
        load_scorer(str(folder), tiny.planted(N, users=30), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_scorer(str(folder), tiny.planted(N), CPU)


def test_a_model_of_texts_alone_scores_another_catalogue(llm, llm_folder, tmp_path):
    """Zero-shot; the data folder's own items are ranked."""
    config = tiny.config(llm_folder(), **tiny.RIVALS)
    model = LaserRecommender.fit_dataset(tiny.planted(N), config, tmp_path / "zesrec", "zesrec", progress=False)
    other = tiny.planted(N + 5)
    renamed = replace(other, items=other.items.with_columns(item_id="new " + pl.col("item_id")))
    with pytest.warns(UserWarning, match=r"zesrec was fitted on another catalogue; .* nothing learnt from these data"):
        load_scorer(str(tmp_path / "zesrec"), renamed, CPU)
    with pytest.warns(UserWarning, match=r"another catalogue; it knows 12 of these 17 .* may have been in its"):
        scorer, _ = load_scorer(str(tmp_path / "zesrec"), other, CPU)
    asked = tiny.histories([0, 14], [2])
    assert scorer.score(asked).shape == (2, N + 5)
    assert evaluate("zero-shot", scorer, other, "test").plain.ndcg >= 0
    added = other.items.tail(5).drop("item")
    model.add_items(added)  # the same items one by one have the same vectors
    assert scorer.items().allclose(model.embeddings, atol=1e-4)


def test_laser_scores_another_catalogue_by_texts_and_keeps_what_it_knows_of_shared_items(llm, tmp_path):
    backbone, data = llm("llama"), tiny.planted(N)
    model = LaserRecommender.fit_dataset(data, tiny.config(backbone.name), tmp_path / "laser", progress=False)
    other = tiny.planted(N + 5)
    items = other.items.reverse().with_columns(item=pl.Series(range(N + 5), dtype=pl.Int32))
    backwards = Dataset(items, other.users, other.interactions, {"sha256": "backwards"})
    with pytest.warns(UserWarning, match="laser was fitted on another catalogue"):
        scorer, _ = load_scorer(str(tmp_path / "laser"), backwards, CPU)
    scores = scorer.score(tiny.histories([N + 4, N + 1]))
    assert scores.shape == (1, N + 5)
    torch.testing.assert_close(scores[0, 5:].flip(0), model.score(tiny.histories([0, 3]))[0], atol=1e-4, rtol=1e-4)
    known = Dataset(data.items.reverse(), data.users, data.interactions, {"sha256": "renumbered"})
    with pytest.warns(UserWarning, match="another catalogue"):
        scorer, _ = load_scorer(str(tmp_path / "laser"), known, CPU)
    assert scorer.score(tiny.histories([0])).shape == (1, N)


def test_a_model_with_a_network_is_flattered_on_validation(folder):
    model = LaserRecommender.from_pretrained(folder)
    scorer = FirstItems(model, N)
    assert not flattered(scorer, "validation")
    model.facts["training"]["parts"] = {"network": {"kept": True}}
    assert flattered(scorer, "validation") and not flattered(scorer, "test")
    model.facts["training"]["parts"] = {"network": {"kept": False}}
    assert not flattered(scorer, "validation")
