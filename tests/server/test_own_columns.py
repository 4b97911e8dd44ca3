"""Items that are added over HTTP with further columns and vectors of the caller's own."""

import shutil

import numpy as np
import polars as pl
import pytest
import tiny
from serving import NEW, served

from laserrec.recommender.recommender import LaserRecommender
from laserrec.server.listing import NewItem
from laserrec.server.state import Kept, State, _sha256
from laserrec.util.errors import UserError

N, DIMS = 12, 6
OWN = {**NEW, "columns": {"colour": "dark red"}, "vector": [0.5, -1.0, 2.0, 0.25, 1.5, -0.75]}


def embeddings(client, *names):
    return client.service.model.encode_items(list(names))


@pytest.fixture(scope="module")
def folder(llm_folder, tmp_path_factory):
    """Of items with a column `colour`, which the LLM reads, and vectors beside the LLM's."""
    acts, items = tiny.planted_tables(N, 40)
    tree = tiny.config(llm_folder(), id_model={"kind": "none"}, mformer={"prefix": "none"},
                       prompt={"layout": "none", "item_side": "mean", "attributes": ("brand", "colour")},
                       backbone={"name": str(llm_folder()), "precision": "fp32", "item_vectors": "beside"},
                       head={"whiten_dims": 8}, train={"stage_one_epochs": 0, "stage_two_epochs": 0},
                       data={"min_user_interactions": 2, "min_item_interactions": 1, "item_columns": ("colour",)})
    items = items.with_columns(pl.Series("colour", [("red", "blue")[row % 2] for row in range(N)]))
    values = np.random.default_rng(0).normal(size=(N, DIMS)).astype(np.float32)
    vectors = pl.DataFrame({"item_id": items["item_id"], "vector": values.tolist()})
    kept = tmp_path_factory.mktemp("own") / "kept"
    LaserRecommender.fit(acts, items, tree, kept, progress=False, vectors=vectors)
    return kept / "model"


@pytest.fixture
def client(folder, tmp_path):
    with served(folder, tmp_path / "state") as client:
        yield client


def test_columns_and_vector_make_the_embedding_that_python_makes(client, folder):
    assert client("POST", "/v1/items", json={"items": [OWN, {**NEW, "item_id": "plain"}]}).status_code == 201
    model = LaserRecommender.from_pretrained(folder)
    model.add_items({"item_id": [NEW["item_id"]], "title": [NEW["title"]], "brand": [NEW["brand"]],
                     "colour": ["dark red"], "vector": [OWN["vector"]]})
    own, plain = embeddings(client, NEW["item_id"], "plain")
    assert np.allclose(own, model.encode_items([NEW["item_id"]])[0], atol=1e-6)
    assert not np.allclose(own, plain, atol=1e-3)  # that one has texts alone
    assert client("GET", f"/v1/items/{NEW['item_id']}").json() == NEW


def test_they_are_there_after_a_restart_and_for_a_newer_model(client, folder, tmp_path, monkeypatch):
    assert client("POST", "/v1/items", json={"items": [OWN]}).status_code == 201
    before, ask = embeddings(client, NEW["item_id"]), ["i1", NEW["item_id"]]
    want = client.recommend(ask).json()
    kept = State(tmp_path / "state", "another model").read()
    assert kept.added[NEW["item_id"]] == OWN and not kept.embeddings  # it is encoded anew by that one
    monkeypatch.setattr("laserrec.llm.text_features.load_backbone", lambda *a, **k: pytest.fail("the LLM was loaded"))
    with served(folder, shutil.copytree(tmp_path / "state", tmp_path / "copy")) as again:
        assert np.array_equal(embeddings(again, NEW["item_id"]), before) and again.recommend(ask).json() == want
        assert again("DELETE", f"/v1/items/{NEW['item_id']}").status_code == 200 and not again.service.kept.means
    monkeypatch.undo()
    without = pl.read_parquet(tmp_path / "state" / "items.parquet").drop("means")  # as an earlier version wrote it
    (tmp_path / "earlier").mkdir()
    without.write_parquet(tmp_path / "earlier" / "items.parquet", metadata={"laserrec.sha256": _sha256(without)})
    with served(folder, tmp_path / "earlier") as again:
        assert np.allclose(embeddings(again, NEW["item_id"]), before, atol=1e-6) and again.service.kept.means
    frame = client.service.served.frame([OWN])
    assert frame["vector"].to_list() == [OWN["vector"]] and frame["colour"].to_list() == ["dark red"]


def test_another_column_or_vector_for_a_known_id_is_a_conflict(client, folder):
    assert client("POST", "/v1/items", json={"items": [OWN]}).json()["changed"] == 1
    assert client("POST", "/v1/items", json={"items": [OWN, OWN]}).json()["changed"] == 0
    vector = [0.5, -1.0, 2.0, 0.25, 1.5, 0.75]
    fitted = client("GET", "/v1/items/i1").json()
    for other in ({**OWN, "columns": {"colour": "red"}}, {**OWN, "columns": {}}, {**OWN, "vector": vector},
                  {**OWN, "vector": None}, {**fitted, "columns": {"colour": "no such"}}):
        answer = client("POST", "/v1/items", json={"items": [other]})
        assert answer.status_code == 409 and "has other texts or another vector in" in answer.json()["detail"]
    row = LaserRecommender.from_pretrained(folder).items.row(0, named=True)
    same = {**fitted, "columns": {"colour": row["colour"]}, "vector": row["vector"]}
    assert client("POST", "/v1/items", json={"items": [same]}).json()["changed"] == 0
    new = [{**OWN, "item_id": "n"}, {**OWN, "item_id": "n", "vector": vector}]
    assert "elsewhere in this request" in client("POST", "/v1/items", json={"items": new}).json()["detail"]


@pytest.mark.parametrize("length", [3, 12])
def test_a_vector_that_does_not_fit_the_model_is_left_out(client, folder, tmp_path, length, caplog):
    """As a state has it whose item was added to a model with other vectors."""
    state = State(tmp_path / "other", "another model")
    state.write(Kept((), {NEW["item_id"]: NewItem(**{**OWN, "vector": [1.0] * length})}))
    with served(folder, tmp_path / "other") as other:
        assert client("POST", "/v1/items", json={"items": [{**OWN, "vector": None}]}).status_code == 201
        assert np.allclose(embeddings(other, NEW["item_id"]), embeddings(client, NEW["item_id"]), atol=1e-6)
    assert f"a vector of {length} numbers, those of this catalogue have {DIMS}" in caplog.text


@pytest.mark.parametrize(("wrong", "why"), [
    ({"columns": {"size": "XL"}}, "no column 'size'; its further columns are: colour"),
    ({"vector": [1.0, 2.0]}, "its vector has 2 numbers, those of the catalogue 6"),
    ({"vector": [1e300] * DIMS}, "too large for 32 bits"),
    ({"vector": []}, "vector"), ({"vector": ["x"] * DIMS}, "vector"), ({"columns": [1]}, "columns")])
def test_what_the_catalogue_does_not_have_is_refused_before_anything_is_added(client, wrong, why):
    answer = client("POST", "/v1/items", json={"items": [NEW, {**OWN, "item_id": "other", **wrong}]})
    assert answer.status_code == 422 and why in answer.json()["detail"]
    assert len(client.service.listing) == N


def test_numbers_that_are_none_are_refused(client):
    body = b'{"items": [{"item_id": "n", "title": "saw", "vector": [1, 2, 3, 4, 5, NaN]}]}'
    answer = client("POST", "/v1/items", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and len(client.service.listing) == N


def test_a_catalogue_without_vectors_takes_none(model_folder, tmp_path):
    with served(model_folder, tmp_path / "state") as client:
        answer = client("POST", "/v1/items", json={"items": [{**NEW, "vector": [1.0]}]})
        assert answer.status_code == 422 and "no vectors of their own" in answer.json()["detail"]


def test_a_state_with_other_things_in_it_is_damaged(client, tmp_path):
    assert client("POST", "/v1/items", json={"items": [OWN]}).status_code == 201
    file = tmp_path / "state" / "items.parquet"
    pl.read_parquet(file).with_columns(more=pl.lit('{"vector": "long"}')).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(UserError, match="column more"):
        State(tmp_path, "model").read()
