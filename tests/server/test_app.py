"""Every route over HTTP: answers, bounds, overload, token, and changes that outlive the server."""

import threading

import numpy as np
import pytest
from serving import NEW, ids, served

from laserrec import LaserRecommender
from laserrec.server.settings import MAX_HISTORY
from laserrec.util.errors import UserError


@pytest.fixture
def client(model_folder, tmp_path):
    with served(model_folder, tmp_path / "state") as client:
        yield client


def test_recommendations_are_the_models(client, model_folder):
    model = LaserRecommender.from_pretrained(model_folder)
    for exclude in (False, True):
        answer = client.recommend(["i1", "i5"], k=5, exclude_seen=exclude)
        want = model.recommend([["i1", "i5"]], k=5, exclude_seen=exclude)
        assert answer.status_code == 200 and ids(answer) == want["item_id"].to_list()
        assert np.allclose([i["score"] for i in answer.json()["items"]], want["score"], atol=1e-5)
        assert [i["rank"] for i in answer.json()["items"]] == [1, 2, 3, 4, 5]
    assert answer.json()["expert"] in range(3) and answer.json()["unknown"] == []
    titles = dict(model.items.select("item_id", "title").iter_rows())
    assert all(titles[i["item_id"]] == i["title"] for i in answer.json()["items"])


def test_only_candidates(client):
    answer = client.recommend(["i1"], candidates=["i7", "i3", "i7"], k=9)
    assert sorted(ids(answer)) == ["i3", "i7"]
    assert "candidates: 1 unknown" in client.recommend(["i1"], candidates=["nope"]).json()["detail"]


def test_why(client, model_folder):
    embeddings = LaserRecommender.from_pretrained(model_folder).embeddings
    history = ["i2", "i9", "i4"]
    for item in client.recommend(history, explain=True).json()["items"]:
        cosines = [float(embeddings[int(item["item_id"][1:]) - 1] @ embeddings[int(h[1:]) - 1]) for h in history]
        near = item["nearest_history_item"]
        assert near["item_id"] == history[int(np.argmax(cosines))]
        assert near["similarity"] == pytest.approx(max(cosines), abs=1e-5)
    assert client.recommend(history).json()["items"][0]["nearest_history_item"] is None


def test_unknown_items_are_named_and_left_out(client):
    answer = client.recommend(["nope", "i1", "nada"])
    assert answer.json()["unknown"] == ["nope", "nada"] and ids(answer) == ids(client.recommend(["i1"]))
    answer = client.recommend(["nope"])
    assert answer.status_code == 422 and "none of its items" in answer.json()["detail"]


@pytest.mark.parametrize("body", [
    {}, {"history": []}, {"history": "i1"}, {"history": ["i1"], "k": 0}, {"history": ["i1"], "k": 10_000},
    {"history": ["i1"] * (MAX_HISTORY + 1)}, {"history": [""]}, {"history": ["i1"], "kk": 3},
    {"history": ["i1"], "candidates": []}, {"history": ["i1"], "exclude": ["i1"] * 1_001},
])
def test_bounds(client, body):
    answer = client("POST", "/v1/recommend", json=body)
    assert answer.status_code == 422 and answer.json()["detail"]


def test_bodies_are_bounded_whether_they_say_so_or_not(model_folder, tmp_path):
    with served(model_folder, tmp_path, max_body=200) as client:
        large = b'{"history": ["i1"], "candidates": [' + b'"i1",' * 60 + b'"i1"]}'
        told = client("POST", "/v1/recommend", content=large)
        assert told.status_code == 413 and "more than 200 bytes" in told.json()["detail"]

        async def pieces():
            for at in range(0, len(large), 50):
                yield large[at : at + 50]

        for headers in ({}, {"Content-Type": "application/json"}):
            told = client("POST", "/v1/recommend", headers, content=pieces())
            assert told.status_code == 413 and "more than 200 bytes" in told.json()["detail"]
        assert client.recommend(["i1"]).status_code == 200


def test_many_at_once_get_what_each_gets_alone(model_folder, tmp_path):
    with served(model_folder, tmp_path, cache=0, max_wait_seconds=0.03, queue_seconds=60) as client:
        histories = [[f"i{1 + (j * 5 + p) % 12}" for p in range(1 + j % 5)] for j in range(24)]
        alone = [client.recommend(h).json() for h in histories]
        sizes = []
        client.service.worker.batched = sizes.append
        calls = [("POST", "/v1/recommend", {"json": {"history": h}}) for h in histories]
        for answer, want in zip(client.together(*calls), alone, strict=True):
            got = answer.json()
            assert [i["item_id"] for i in got["items"]] == [i["item_id"] for i in want["items"]]
            assert np.allclose([i["score"] for i in got["items"]], [i["score"] for i in want["items"]], atol=1e-4)
            assert got["expert"] == want["expert"]
        assert len(sizes) < 24 and sum(sizes) == 24


def test_over_capacity_is_said_and_nothing_is_lost(model_folder, tmp_path, monkeypatch):
    with served(model_folder, tmp_path, max_queue=3, max_batch=1, cache=0) as client:
        gate, rank = threading.Event(), client.service.model.rank
        monkeypatch.setattr(client.service.model, "rank", lambda asks: gate.wait(10) and rank(asks))
        threading.Timer(0.5, gate.set).start()
        calls = [("POST", "/v1/recommend", {"json": {"history": [f"i{j}"]}}) for j in range(1, 10)]
        answers = client.together(*calls)
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429} and 3 <= codes.count(200) <= 4
        assert all(int(a.headers["Retry-After"]) >= 1 for a in answers if a.status_code == 429)
        assert f"laserrec_shed_total {codes.count(429)}.0" in client("GET", "/metrics").text


def test_late_answers_are_given_up(model_folder, tmp_path, monkeypatch):
    with served(model_folder, tmp_path, timeout_seconds=2, cache=0) as client:
        gate, rank = threading.Event(), client.service.model.rank
        monkeypatch.setattr(client.service.model, "rank", lambda asks: gate.wait(10) and rank(asks))
        answer = client.recommend(["i1"])
        gate.set()
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert client.recommend(["i2"]).status_code == 200


def test_repeated_histories_come_from_the_cache_until_the_catalogue_changes(client, monkeypatch):
    first = client.recommend(["i1", "i2"]).json()
    calls, rank = [], client.service.model.rank
    monkeypatch.setattr(client.service.model, "rank", lambda asks: calls.append(len(asks)) or rank(asks))
    assert client.recommend(["i1", "i2"]).json() == first and not calls
    assert client.recommend(["i2", "i1"]).status_code == 200 and calls == [1]
    client("DELETE", f"/v1/items/{first['items'][0]['item_id']}")
    assert first["items"][0]["item_id"] not in ids(client.recommend(["i1", "i2"])) and calls == [1, 1]


def test_a_new_item_is_there_at_once_and_after_a_restart(model_folder, tmp_path):
    with served(model_folder, tmp_path) as client:
        answer = client("POST", "/v1/items", json={"items": [NEW]})
        assert answer.status_code == 201 and answer.json() == {"changed": 1, "n_items": 13}
        before = client.recommend(["new 1/a", "i1"], k=13).json()
        assert "new 1/a" in [i["item_id"] for i in before["items"]] and before["unknown"] == []
        assert client("GET", "/v1/items", params={"query": "DRILL 99"}).json() == {"items": [NEW], "total": 1}
    with served(model_folder, tmp_path) as client:
        assert client("GET", "/v1/items/new 1/a").json() == NEW
        after = client.recommend(["new 1/a", "i1"], k=13).json()
        assert [i["item_id"] for i in after["items"]] == [i["item_id"] for i in before["items"]]
        assert client("GET", "/v1/items/new 1/a/similar", params={"k": 3}).json()["items"][2]["rank"] == 3
        again = client("POST", "/v1/items", json={"items": [NEW]})
        assert again.status_code == 201 and again.json() == {"changed": 0, "n_items": 13}
        assert client("DELETE", "/v1/items/new 1/a").json()["n_items"] == 12
    with served(model_folder, tmp_path) as client:
        assert client("GET", "/v1/items/new 1/a").status_code == 404


def test_a_removed_item_stays_removed(model_folder, tmp_path):
    with served(model_folder, tmp_path) as client:
        assert client("DELETE", "/v1/items/i3").status_code == 200
        assert client("DELETE", "/v1/items/i3").status_code == 404
    with served(model_folder, tmp_path) as client:
        assert "i3" not in ids(client.recommend(["i1"], k=20)) and client("GET", "/v1/items/i3").status_code == 404
        assert client.recommend(["i3", "i1"]).json()["unknown"] == ["i3"]
        assert "i3" not in ids(client("GET", "/v1/items/i4/similar?k=20"))
        again = {"item_id": "i3", "title": "blue paint"}
        assert client("POST", "/v1/items", json={"items": [again]}).json()["n_items"] == 12
    with served(model_folder, tmp_path) as client:
        assert client("GET", "/v1/items/i3").json()["title"] == "blue paint"
        assert client("GET", "/v1/model").json()["n_items"] == 12


def test_a_state_in_use_or_damaged_is_named(model_folder, tmp_path):
    with (served(model_folder, tmp_path), pytest.raises(UserError, match="in use by a server"),
          served(model_folder, tmp_path)):
        pass
    (tmp_path / "items.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="is damaged"), served(model_folder, tmp_path):
        pass
    with pytest.raises(UserError, match="not a model folder"), served(tmp_path / "none", tmp_path / "x"):
        pass


def test_search_and_pages(client):
    whole = client("GET", "/v1/items", params={"limit": 100}).json()
    assert whole["total"] == 12 and len(whole["items"]) == 12
    part = client("GET", "/v1/items", params={"limit": 5, "offset": 10}).json()
    assert part["items"] == whole["items"][10:] and part["total"] == 12
    word = whole["items"][0]["title"].split()[0]
    found = client("GET", "/v1/items", params={"query": word.upper()}).json()["items"]
    assert found == [i for i in whole["items"] if word in f"{i['title']} {i['brand']} {i['category']}"]
    assert client("GET", "/v1/items", params={"limit": 0}).status_code == 422


def test_similar_items_are_the_nearest(client):
    embeddings = client.service.model.embeddings
    order = (embeddings @ embeddings[3]).argsort(descending=True).tolist()
    want = [f"i{j + 1}" for j in order if j != 3][:4]
    assert ids(client("GET", "/v1/items/i4/similar?k=4")) == want


def test_the_token_guards_data_and_metrics(model_folder, tmp_path):
    with served(model_folder, tmp_path, token="secret") as client:
        for url in ("/v1/model", "/metrics", "/v1/items", "/v1/items/i1"):
            assert client("GET", url).status_code == 401
            assert client("GET", url, headers={"Authorization": "Bearer secre"}).status_code == 401
            assert client("GET", url, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.recommend(["i1"]).status_code == 401
        assert all(client("GET", url).status_code == 200 for url in ("/healthz", "/readyz", "/"))


def test_operations(client):
    client.recommend(["i1"])
    text = client("GET", "/metrics").text
    for line in ('laserrec_requests_total{method="POST",route="/v1/recommend",status="200"} 1.0', "laserrec_items 12.0",
                 'laserrec_cache_total{found="no"} 1.0', "laserrec_batch_size_count 1.0", "laserrec_queue 0.0"):
        assert line in text
    facts = client("GET", "/v1/model").json()
    assert facts["n_items"] == 12 and facts["experts"] == 3 and facts["added"] == facts["removed"] == 0
    assert client("GET", "/openapi.json").json()["paths"].keys() >= {"/v1/recommend", "/v1/items"}
    page = client("GET", "/")
    assert page.headers["content-type"].startswith("text/html") and "frame-ancestors" in page.headers[
        "content-security-policy"]
    client.service.worker.close()
    assert client("GET", "/readyz").status_code == 503 and client.recommend(["i2"]).status_code == 503
