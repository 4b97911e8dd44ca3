"""Another model without a restart: requests under way, items that callers added, and folders that can't be loaded."""

import gc
import os
import shutil
import signal
import threading
import time
import weakref

import polars as pl
import pytest
import tiny
from serving import NEW, ids, served

from laserrec import LaserRecommender
from laserrec.server.service import Service

HEADERS = {"Authorization": "Bearer secret"}
HISTORY = ["i1", "i2"]


@pytest.fixture(scope="module")
def newer(model_folder, tmp_path_factory):
    """A folder of a model whose rows are others: refitted on a catalogue with an item in front of all others."""
    more = tiny.planted(14, users=30)
    order = pl.Series([13, *range(13)])
    items = more.items[order].with_columns(item=pl.Series(range(14), dtype=pl.Int32))
    acts = more.interactions.with_columns(item=((pl.col("item") + 1) % 14).cast(pl.Int32))
    data = type(more)(items, more.users, acts, {"sha256": "newer"})
    folder = tmp_path_factory.mktemp("newer") / "model-2"
    LaserRecommender.from_pretrained(model_folder).refit(data, folder, {"id_model": {"max_epochs": 1}}, progress=False)
    return folder


@pytest.fixture
def client(model_folder, tmp_path):
    with served(model_folder, tmp_path / "state", token="secret", queue_seconds=60) as found:
        plain = found.inside
        found.inside = lambda calls, headers=None: plain(calls, headers or HEADERS)
        yield found


def wanted(folder, **how):
    frame = LaserRecommender.from_pretrained(folder).recommend([HISTORY], k=5, **how)
    return frame["item_id"].to_list()


def load(client, folder, **more):
    return client("POST", "/v1/model", json={"folder": str(folder), **more})


def test_another_model_serves_from_then_on(client, model_folder, newer):
    assert ids(client.recommend(HISTORY, k=5)) == wanted(model_folder)
    answer = load(client, newer)
    assert answer.status_code == 200 and answer.json()["name"] == "model-2" and answer.json()["n_items"] == 14
    assert client("GET", "/v1/model").json() == answer.json()
    assert ids(client.recommend(HISTORY, k=5)) == wanted(newer)  # no answer of the other's is kept
    assert client("GET", "/v1/items/i14").status_code == 200
    similar = client("GET", "/v1/items/i1/similar?k=3")
    assert similar.status_code == 200 and "i1" not in ids(similar)
    assert load(client, model_folder).json()["n_items"] == 12
    assert ids(client.recommend(HISTORY, k=5)) == wanted(model_folder)


def test_requests_under_way_are_answered_by_the_model_that_they_were_asked_of(client, model_folder, newer, monkeypatch):
    service, gate = client.service, threading.Event()
    old, rank = service.served, service.model.rank
    monkeypatch.setattr(service.model, "rank", lambda asks: gate.wait(30) and rank(asks))
    ask, _ = old.ask(HISTORY, 5, False)
    running = service.submit(old, ask)  # in the model
    change = service.swap(newer)
    waiting = service.submit(old, old.ask(["i3"], 5, False)[0])  # in the queue
    time.sleep(0.1)
    assert not change.future.done()
    gate.set()
    assert change.future.result(60) == 1 and service.served is not old
    late = service.submit(old, ask)  # asked of the one before: its rows would be other items
    both = [service.submit(s, s.ask(HISTORY, 5, False)[0]) for s in (old, service.served)]
    expected = wanted(model_folder)
    for future in (running, late, both[0]):
        assert old.model.item_ids(future.result(60).ranked.items) == expected
    assert len(waiting.result(60).ranked.items) == 5
    assert service.model.item_ids(both[1].result(60).ranked.items) == wanted(newer)


def test_while_it_loads_the_one_before_serves(client, newer, monkeypatch):
    gate, loading = threading.Event(), LaserRecommender.from_pretrained
    monkeypatch.setattr(LaserRecommender, "from_pretrained", lambda *a, **k: gate.wait(30) and loading(*a, **k))
    change = client.service.swap(newer)
    assert client.recommend(HISTORY).status_code == 200 and change.state == "running"
    assert client.service.swap(newer) is change  # the same request
    adding = client.service.add([NEW])  # waits its turn, and is not lost
    gate.set()
    assert change.future.result(60) == 1 and adding.future.result(60) == 1
    assert client("GET", "/v1/items/new 1/a").status_code == 200 and len(client.service.listing) == 15


def test_a_reload_is_of_the_folder_that_serves_when_it_begins(client, newer):
    gate = threading.Event()

    def busy():
        while not gate.is_set():
            yield

    client.service.worker.change(busy())
    changes = [client.service.swap(newer), client.service.swap()]
    gate.set()
    assert [change.future.result(60) for change in changes] == [1, 1]
    assert client.service.served.folder == newer and client.service.served.name == "model-2"


def test_a_reload_that_has_begun_to_read_is_not_the_one_asked_for_later(client, monkeypatch):
    """It may have read what was replaced since; one that waits reads what is there by then."""
    gate, began, loading = threading.Event(), threading.Event(), LaserRecommender.from_pretrained

    def slowly(*asked, **how):
        began.set()
        gate.wait(30)
        return loading(*asked, **how)

    monkeypatch.setattr(LaserRecommender, "from_pretrained", slowly)
    first = client.service.swap()
    assert began.wait(30)
    second = client.service.swap()
    assert second is not first and client.service.swap() is second
    gate.set()
    assert first.future.result(60) == second.future.result(60) == 1


def test_of_a_model_that_no_longer_serves_nothing_stays_in_memory(client, newer):
    """Whether the garbage collector comes or not: the command line has it leave out what was there at the start."""
    old = client.service.served
    gone = [weakref.ref(part) for part in (old, old.model, old.model.model, old.model.fitted.features)]
    assert client.recommend(HISTORY).status_code == 200
    gc.disable()
    try:
        assert client.service.swap(newer).future.result(60) == 1
        assert len(client.service.submit(old, old.ask(HISTORY, 5, False)[0]).result(60).ranked.items) == 5
        del old
        until = time.monotonic() + 10
        while any(part() is not None for part in gone) and time.monotonic() < until:
            time.sleep(0.05)
        assert [part() for part in gone] == [None] * 4
    finally:
        gc.enable()


def test_longer_than_a_request_may_take_it_goes_on(model_folder, newer, tmp_path, monkeypatch):
    gate, loading = threading.Event(), LaserRecommender.from_pretrained
    with served(model_folder, tmp_path, token="secret", timeout_seconds=0.2) as client:
        monkeypatch.setattr(LaserRecommender, "from_pretrained", lambda *a, **k: gate.wait(30) and loading(*a, **k))
        answer = client("POST", "/v1/model", HEADERS, json={"folder": str(newer)})
        assert answer.status_code == 202
        gate.set()
        for _ in range(200):
            if (status := client("GET", answer.json()["status_url"], HEADERS).json())["state"] != "running":
                break
            time.sleep(0.05)
        assert status["state"] == "done" and len(client.service.listing) == 14


def test_items_that_were_added_and_removed_stay_so(client, model_folder, newer, tmp_path):
    item = {"item_id": "i14", "title": "blue saw", "brand": None, "category": None}  # which the newer model knows
    assert client("POST", "/v1/items", json={"items": [NEW, item]}).status_code == 201
    assert client("DELETE", "/v1/items/i5").status_code == 200
    assert load(client, newer).json()["n_items"] == 14  # 14 + new - i5
    assert client("GET", "/v1/items/new 1/a").status_code == 200 and client("GET", "/v1/items/i5").status_code == 404
    assert client("GET", "/v1/items/i14").json()["title"] != "blue saw"
    assert ids(client.recommend(["new 1/a"], k=3)) and client.recommend(["i5"]).status_code == 422
    assert load(client, model_folder).json()["n_items"] == 13  # back again: its own items are all there
    assert client("GET", "/v1/items/i14").json()["title"] == "blue saw"
    load(client, newer)
    assert client("POST", "/v1/items", json={"items": [{**NEW, "item_id": "more"}]}).status_code == 201
    client.service.worker.close()
    for folder, count in ((newer, 15),):
        shutil.copytree(tmp_path / "state", tmp_path / "copy")
        with served(folder, tmp_path / "copy") as again:
            assert len(again.service.listing) == count


def test_a_model_that_takes_no_new_items_has_none(client, model_folder, tmp_path):
    """They are kept for a later model that does."""
    data, small = tiny.planted(12, users=16), tiny.planted(4, users=16)
    for name, of in (("ease", data), ("small", small)):
        LaserRecommender.fit_dataset(of, tiny.config("none"), tmp_path / name, "ease", device="cpu", progress=False)
    assert client("POST", "/v1/items", json={"items": [NEW]}).status_code == 201
    assert client("DELETE", "/v1/items/i5").status_code == 200

    def facts(answer):
        return [answer.json()[name] for name in ("n_items", "added", "removed")]

    assert facts(client("GET", "/v1/model")) == [12, 1, 1]
    assert facts(load(client, tmp_path / "ease")) == facts(client("GET", "/v1/model")) == [11, 0, 1]
    assert facts(load(client, tmp_path / "small")) == [4, 0, 0]
    assert facts(load(client, model_folder)) == [12, 1, 1]


def test_an_added_item_that_such_a_model_was_fitted_with_can_be_removed(client, tmp_path):
    data = tiny.planted(14, users=30)
    LaserRecommender.fit_dataset(data, tiny.config("none"), tmp_path / "ease", "ease", device="cpu", progress=False)
    item = {"item_id": "i13", "title": "blue saw", "brand": None, "category": None}
    assert client("POST", "/v1/items", json={"items": [NEW, item]}).status_code == 201
    assert load(client, tmp_path / "ease").json()["n_items"] == 14
    assert client("DELETE", "/v1/items/i13").status_code == 200
    client.service.worker.close()
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    with served(tmp_path / "ease", tmp_path / "copy") as again:
        assert again("GET", "/v1/items/i13").status_code == 404 and list(again.service.kept.added) == [NEW["item_id"]]


@pytest.mark.parametrize("what", ["nothing", "damaged", "index", "name"])
def test_what_can_t_be_loaded_changes_nothing(client, model_folder, newer, tmp_path, what):
    place, more = tmp_path / "nothing", {}
    if what == "damaged":
        place = shutil.copytree(newer, tmp_path / "damaged")
        file = place / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    if what == "index":
        place, more = newer, {"index": str(tmp_path)}
    if what == "name":
        place = "x" * 4000
    before = client.service.served
    answer = load(client, place, **more)
    assert answer.status_code == 422 and answer.json()["detail"]
    assert client.service.served is before and ids(client.recommend(HISTORY, k=5)) == wanted(model_folder)
    assert load(client, newer).status_code == 200  # it is not stuck


def test_without_a_token_nobody_chooses_the_model(model_folder, newer, tmp_path):
    with served(model_folder, tmp_path) as client:
        answer = client("POST", "/v1/model", json={"folder": str(newer)})
        assert answer.status_code == 403 and "SIGHUP" in answer.json()["detail"]
        assert len(client.service.listing) == 12
    with served(model_folder, tmp_path, token="secret") as client:
        assert client("POST", "/v1/model", json={"folder": str(newer)}).status_code == 401


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_a_hangup_loads_the_folder_anew(model_folder, newer, tmp_path, monkeypatch):
    from rich.console import Console

    from laserrec.cli.serve import _reload_on_hangup
    from laserrec.server.settings import Limits

    current, before = tmp_path / "current", signal.getsignal(signal.SIGHUP)
    current.symlink_to(model_folder)
    with Service.opened(current, tmp_path / "state", Limits()) as service, open(tmp_path / "told", "w") as told:
        try:
            _reload_on_hangup(service, Console(file=told, soft_wrap=True))
            current.unlink()
            current.symlink_to(newer)
            for count, sign in ((14, "14 items; serving"), (14, "goes on, since")):
                os.kill(os.getpid(), signal.SIGHUP)
                until = time.monotonic() + 60
                while sign not in (tmp_path / "told").read_text() and time.monotonic() < until:
                    told.flush()
                    time.sleep(0.05)
                assert sign in (tmp_path / "told").read_text() and len(service.listing) == count
                current.unlink()
                current.symlink_to(tmp_path / "nowhere")
        finally:
            signal.signal(signal.SIGHUP, before)
