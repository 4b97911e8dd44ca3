"""A model's index holds what can be recommended and finds what the model finds."""

import numpy as np
import pytest
import tiny

from laserrec import LaserRecommender
from laserrec.retrieval import build as index_build
from laserrec.retrieval.build import build_index, user_queries
from laserrec.retrieval.index import IndexKind, load_index, make_index
from laserrec.util.errors import UserError

N = 30


@pytest.fixture(scope="module")
def model(llm, llm_folder, tmp_path_factory):
    config = tiny.config(llm_folder(), prompt={"layout": "text_first", "max_items": 4, "max_item_tokens": 8},
                         train={"stage_one_epochs": 0, "stage_two_epochs": 0})
    folder = tmp_path_factory.mktemp("indexed") / "model"
    model = LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.id_model(N), config, folder, False, llm())
    model.remove_items(["i7"])
    return model


@pytest.mark.parametrize("kind", list(IndexKind))
def test_it_finds_the_models_recommendations(model, kind, tmp_path):
    facts = build_index(model, kind, tmp_path / "index", queries=20)
    assert facts["items"] == N - 1 and facts["recall@10"] > 0.9 and facts["bytes"] > 0
    index = load_index(tmp_path / "index")
    history = ["i3", "i4"]
    user = model.encode_users([history])
    found = index.search(user / np.linalg.norm(user), 5)
    want = model.recommend([history], k=5)
    assert model.item_ids(found[0][0]) == want["item_id"].to_list()
    assert np.allclose(found[1][0], want["score"], atol=1e-4)
    with pytest.raises(UserError, match="is not empty"):
        build_index(model, kind, tmp_path / "index")


def test_a_collection_that_holds_something_is_refused(model, monkeypatch):
    other = make_index(IndexKind.QDRANT, model.embeddings.shape[1])
    other.add(np.array([99]), model.embeddings.numpy()[:1])
    monkeypatch.setattr(index_build, "make_index", lambda kind, d, **place: other)
    with pytest.raises(UserError, match="http://here holds 1 items already; name another collection"):
        index_build.fill_index(model, IndexKind.QDRANT, url="http://here", collection="items")


def test_a_url_is_for_qdrant(model, tmp_path):
    with pytest.raises(UserError, match="for kind qdrant"):
        build_index(model, IndexKind.EXACT, tmp_path / "x", url="http://localhost:6333")


def test_queries_are_unit_vectors_fixed_by_their_seed(model):
    one = user_queries(model, 6)
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    assert np.allclose(one, user_queries(model, 6), atol=1e-5)
    assert not np.allclose(one, user_queries(model, 6, seed=1), atol=1e-2)
