"""What no well-meaning caller sends, and catalogues that no shop would make: clear answers, small ones, and in time."""

import asyncio
import json
import threading
import time
import tracemalloc
from copy import deepcopy
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import tiny
from serving import ids, served

from laserrec import LaserRecommender
from laserrec.recommender.ranking import Ask, Ranked
from laserrec.server.listing import Item
from laserrec.server.served import _key
from laserrec.util.errors import UserError

ODD = ["plain", "x" * 257, "a/b", "100%", "é?#&", "y" * 3_000]
"""Ids of a catalogue; the titles are odder."""


@pytest.fixture
def client(model_folder, tmp_path):
    with served(model_folder, tmp_path / "state") as client:
        yield client


@pytest.fixture(scope="module")
def shared(model_folder, tmp_path_factory):
    """For tests after which the catalogue may be another."""
    with served(model_folder, tmp_path_factory.mktemp("state")) as client:
        yield client


def post(client, body, path="/v1/recommend", kind="application/json"):
    return client("POST", path, content=body, headers={"Content-Type": kind})


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "-1e999", '"\\ud800"', "1" * 4_000, "1" * 5_000, "1e5",
                                   "[[]]", '"\\u0000"', "true", "null", "{}"])
@pytest.mark.parametrize("body", ['{"history": ["i1"], "k": %s}', '{"history": [%s]}', '{"history": %s}', "%s",
                                  '{"history": ["i1"], "exclude_seen": %s}', '{"history": ["i1"], %s: 1}',
                                  '{"history": ["i1", %s], "candidates": [%s]}'])
def test_values_that_are_no_json_or_of_another_kind(shared, body, value):
    answer = post(shared, body.replace("%s", value).encode())
    if answer.status_code == 200:
        assert value in ("true", '"\\u0000"')
    else:
        assert answer.status_code in (400, 422) and len(answer.content) < 1_000
        assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "1e999", "[]", '"\\u0000"', '"  "'])
@pytest.mark.parametrize("field", ["item_id", "title", "brand"])
def test_new_items_of_odd_values(shared, field, value):
    item = {"item_id": '"new"', "title": '"saw"', "brand": '"b"'} | {field: value}
    fields = ", ".join(f'"{name}": {text}' for name, text in item.items())
    body = '{"items": [{' + fields + "}]}"
    answer = post(shared, body.encode(), "/v1/items")
    assert answer.status_code in (201, 400, 409, 422)  # 409: there already with other texts
    assert shared("GET", "/v1/items?limit=100").status_code == 200


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[" * 500_000, b'{"a":' * 100_000, b'"' + b"x" * 900_000, 
                                  b"{}" * 9, b'{"history": ["i1"]}\x00', "{\"history\": [\"i1\"]}".encode("utf-16")])
def test_bodies_that_can_not_be_read(shared, body):
    answer = post(shared, body)
    assert answer.status_code in (200, 400, 422) and len(answer.content) < 5_000


def huge():
    unknown = b"{" + b",".join(b'"%06d":0' % j for j in range(93_000)) + b"}"
    return {"unknown fields": unknown, "numbers": b'{"history": [' + b"1," * 460_000 + b"1]}",
            "unknown items": json.dumps({"history": ["i1"], "candidates": ["z" * 80] * 10_000}).encode(),
            "too many": b'{"history": ["i1"], "candidates": [' + b'"",' * 300_000 + b'""]}',
            "one id": json.dumps({"history": ["i1"], "candidates": ["z" * 900_000]}).encode(),
            "items": b'{"items": [' + b'{"a":1,"b":2},' * 60_000 + b"{}]}"}


@pytest.mark.parametrize("what", list(huge()))
def test_large_bodies_neither_hold_the_loop_nor_come_back(shared, what):
    path = "/v1/items" if what == "items" else "/v1/recommend"
    start = time.process_time()
    answer = post(shared, huge()[what], path)
    assert answer.status_code == 422 and len(answer.content) < 1_000
    assert time.process_time() - start < 1.5  # 6.7 s when each unknown field was an error of its own


@pytest.mark.parametrize("text", ["x" * 2_001, ["x" * 1_000] * 3, '<img alt="' + 'alt="" ' * 100_000, "<b></b>" * 300])
@pytest.mark.parametrize("field", ["title", "brand"])
def test_long_texts_are_refused_before_they_are_cleaned(shared, monkeypatch, field, text):
    monkeypatch.setattr("laserrec.data.clean.html", None)
    answer = shared("POST", "/v1/items", json={"items": [{"item_id": "long", "title": "saw"} | {field: text}]})
    assert answer.status_code == 422 and "send at most 2,000" in answer.json()["detail"]


def test_a_form_from_another_site_changes_nothing(shared):
    body = b'{"items": [{"item_id": "evil", "title": "x"}]}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = post(shared, body, "/v1/items", kind)
        assert answer.status_code == 422
        assert answer.json()["detail"] == ("give the header Content-Type: application/json; the body came "
                                           + (f"as {kind}" if kind else "without one"))
    assert shared("GET", "/v1/items/evil").status_code == 404


def test_hosts_of_other_names_are_turned_away(model_folder, tmp_path):
    with served(model_folder, tmp_path, hosts=["localhost", "[::1]", "*.example.org"]) as client:
        def status(host, path="/v1/model"):
            return client("GET", path, headers={"Host": host}).status_code

        assert [status(h) for h in ("localhost:8000", "[::1]:1", "a.example.org", "LOCALHOST")] == [200] * 4
        assert [status(h) for h in ("evil.test", "localhost.evil.test", "evil.test:8000", "127.0.0.1", "")] == [400] * 5
        assert status("evil.test", "/healthz") == status("10.1.2.3", "/readyz") == 200
        told = client("GET", "/v1/model", headers={"Host": "evil.test"}).json()["detail"]
        assert told.startswith("the Host header is another server's name")
        assert client("PUT", "/v1/model").json() == {"detail": "Method Not Allowed"}


def test_unknown_methods_and_paths_make_no_labels(model_folder, tmp_path):
    with served(model_folder, tmp_path, token="secret") as client:
        for j in range(30):
            client(f"METHOD{j}", f"/v1/{j}")
            client("GET", f"/{j}")
        text = client("GET", "/metrics", headers={"Authorization": "Bearer secret"}).text
        assert 'method="other",route="other"' in text and "METHOD" not in text
        assert text.count("laserrec_requests_total{") == 2


@pytest.fixture(scope="module")
def odd_folder(llm, llm_folder, tmp_path_factory):
    """A catalogue as `fit` takes it, with all that a bound on new items would refuse."""
    data = tiny.planted(len(ODD), users=16)
    texts = [None, "t" * 5_000, "", "<script>", "\u202e\u0001", "ok"]
    data = replace(data, items=data.items.with_columns(
        pl.Series("item_id", ODD), pl.Series("title", texts), pl.Series("brand", ["b" * 3_000] * len(ODD))))
    config = tiny.config(llm_folder(), train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    folder = tmp_path_factory.mktemp("odd") / "model"
    LaserRecommender.fit_dataset(data, config, folder, progress=False)
    return folder


def test_any_catalogue_is_served_whole(odd_folder, tmp_path):
    from urllib.parse import quote

    with served(odd_folder, tmp_path) as client:
        answer = client.recommend(ODD, k=20, explain=True, candidates=ODD)
        assert answer.status_code == 200 and sorted(ids(answer)) == sorted(ODD) and not answer.json()["unknown"]
        assert sorted(ids(client("GET", "/v1/items"))) == sorted(ODD)
        for name in ODD:
            assert client("GET", f"/v1/items/{quote(name, safe='')}").json()["item_id"] == name
            assert client("GET", f"/v1/items/{quote(name, safe='')}/similar").status_code == 200
        assert client("GET", "/v1/items/plain").json()["title"] is None
        for name in ODD[1:]:
            assert client("DELETE", f"/v1/items/{quote(name, safe='')}").status_code == 200
        assert ids(client.recommend(["plain"], k=20)) == ["plain"]


@pytest.mark.parametrize("method", ["popularity", "ease"])
def test_a_method_without_texts_or_vectors_says_what_it_can_not_do(method, llm_folder, tmp_path):
    LaserRecommender.fit_dataset(tiny.planted(12, users=16), tiny.config(llm_folder()), tmp_path / "model", method,
                                 progress=False)
    with served(tmp_path / "model", tmp_path / "state") as client:
        answer = client.recommend(["i1"], k=3, explain=True)
        assert answer.status_code == 200 and len(ids(answer)) == 3
        assert answer.json()["items"][0]["nearest_history_item"] is None
        assert client("GET", "/v1/items/i1/similar").status_code == 422
        refused = client("POST", "/v1/items", json={"items": [{"item_id": "n", "title": "saw"}]})
        assert refused.status_code == 422 and "can't take items" in refused.json()["detail"]
        facts = client("GET", "/v1/model").json()
        assert facts["method"] == method and facts["backbone"] is None and facts["experts"] is None


def test_excluded_items_are_never_recommended(client, model_folder):
    whole = ids(client.recommend(["i1", "i2"], k=12))
    for k in (1, 5, 12):
        answer = client.recommend(["i1", "i2"], k=k, exclude=[whole[0], whole[2], "unknown", whole[0]], explain=True)
        left = [name for name in whole if name not in (whole[0], whole[2])]
        assert ids(answer) == left[:k] and [i["rank"] for i in answer.json()["items"]] == list(range(1, min(k, 10) + 1))
    assert ids(client.recommend(["i1"], candidates=["i5", "i6"], exclude=["i5"])) == ["i6"]
    assert ids(client.recommend(["i1"], exclude=[f"i{j}" for j in range(1, 13)])) == []


def test_similar_items_wait_in_the_same_bounded_queue(model_folder, tmp_path, monkeypatch):
    with served(model_folder, tmp_path, max_queue=3) as client:
        gate, nearest = threading.Event(), client.service.model.nearest
        monkeypatch.setattr(client.service.model, "nearest", lambda *ask: gate.wait(10) and nearest(*ask))
        threading.Timer(0.5, gate.set).start()
        answers = client.together(*[("GET", f"/v1/items/i{j}/similar", {}) for j in range(1, 13)])
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429} and 3 <= codes.count(200) <= 6


def test_search_does_not_hold_the_event_loop(client, monkeypatch):
    gate, search = threading.Event(), client.service.listing.search

    def slowly(*asked):
        assert gate.wait(10)
        return search(*asked)

    monkeypatch.setattr(client.service.listing, "search", slowly)

    async def both(call):
        found = asyncio.create_task(call("GET", "/v1/items"))
        alive = await call("GET", "/healthz")
        gate.set()
        return alive, await found

    alive, found = client.inside(both)
    assert alive.status_code == 200 and found.json()["total"] == 12


def test_what_batches_leave_behind_is_bounded(client):
    for j in range(50):
        client.recommend(["i1", f"i{1 + j % 12}"], k=1 + j)
    assert "laserrec_batch_size_count 50.0" in client("GET", "/metrics").text
    assert not hasattr(client.service, "batch_sizes")


def test_kept_answers_are_of_just_this_request_and_small(client):
    rows = [np.array(some, dtype=np.int64) for some in ([], [1], [2], [1, 2], [2, 1], [1, 1], [1, 2, 1])]
    asks = [Ask(history, 10, False, candidates, exclude) for history in rows[1:] for candidates in (None, *rows)
            for exclude in (None, *rows)]
    asks += [replace(asks[0], k=9), replace(asks[0], exclude_seen=True)]
    assert len({_key(ask) for ask in asks}) == len(asks) and _key(asks[5]) == _key(deepcopy(asks[5]))
    tracemalloc.start()
    try:
        for k in range(1, 101):
            ask = Ask(rows[1], k, False, np.arange(12).repeat(1_000))
            client.service.served._explained(ask, Ranked(rows[1], np.ones(1, np.float32)))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(client.service.served.cache) == 100 and taken < 100 * 5_000


def test_a_full_catalogue_is_searched_case_and_field_aware(client):
    client.service.listing.add([(99, Item(item_id="q", title="Straße [x.*", brand=None, category="A\nB"))])

    def total(query):
        return client("GET", "/v1/items", params={"query": query}).json()["total"]

    assert total("STRASSE [x.*") == 1 and total("a b strasse") == 1 and total("x.*b") == 0
    client.service.listing.remove(["q"])
    assert total("strasse") == 0 and client.service.listing[99]["item_id"] == "q"


def test_settings_with_which_no_server_could_work():
    from laserrec.server.settings import Limits, check_hosts

    for name, value in (("max_batch", 0), ("max_queue", 0), ("timeout_seconds", 0), ("timeout_seconds", np.nan),
                        ("queue_seconds", -1), ("cache", -1), ("max_body", 0), ("read_seconds", 0)):
        with pytest.raises(UserError, match=f"{name.replace('_', '-')} is {value}; it must be between"):
            Limits(**{name: value})
    check_hosts(["*", "*.example.org", "a-b.example", "10.0.0.1", "[::1]"])
    for name in ("http://x", "x:80", "*x.org", "a.*", "", "::1"):
        with pytest.raises(UserError, match="allowed host"):
            check_hosts([name])
