"""Changes of the catalogue: in slices between requests, honestly answered, repeatable, never in the way of a start."""

import contextlib
import gc
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny
from serving import NEW, ids, served

from laserrec import LaserRecommender
from laserrec.server.changes import Changes
from laserrec.server.listing import Item
from laserrec.server.settings import Limits
from laserrec.server.state import Kept, State
from laserrec.server.worker import OverloadedError, Worker
from laserrec.util.errors import UserError


def many(count, first=0):
    return [{**NEW, "item_id": f"n{j}", "title": f"red saw {j}"} for j in range(first, first + count)]


@pytest.fixture
def client(model_folder, tmp_path):
    with served(model_folder, tmp_path / "state") as client:
        yield client


@pytest.fixture
def slow(client, monkeypatch):
    """Encoding takes 20 ms an item, as a real LLM's does."""
    add, sizes = client.service.model.add_cleaned, []

    def slowly(frame, *more):
        sizes.append(frame.height)
        time.sleep(0.02 * frame.height)
        return add(frame, *more)

    monkeypatch.setattr(client.service.model, "add_cleaned", slowly)
    client.sizes = sizes
    return client


@contextlib.contextmanager
def timeout(client, seconds):
    limits = client.service.limits
    object.__setattr__(limits, "timeout_seconds", seconds)
    yield
    object.__setattr__(limits, "timeout_seconds", 10.0)


def finished(client, status):
    for _ in range(400):
        if status["state"] != "running":
            return status
        time.sleep(0.05)
        status = client("GET", status["status_url"]).json()
    raise AssertionError("not finished")


def test_recommendations_go_on_while_a_thousand_items_are_added(slow):
    with timeout(slow, 0.1):
        answer = slow("POST", "/v1/items", json={"items": many(100)})
    assert answer.status_code == 202 and answer.json()["state"] == "running"
    assert answer.headers["Location"] == answer.json()["status_url"]
    waits, status = [], answer.json()
    while status["state"] == "running":
        start = time.monotonic()
        assert slow.recommend(["i1", f"i{1 + len(waits) % 12}"], k=1 + len(waits) % 7).status_code == 200
        waits.append(time.monotonic() - start)
        before, status = status["done"], slow("GET", status["status_url"]).json()
        assert before <= status["done"] <= status["total"] == 100
    assert status["state"] == "done" and len(slow.service.listing) == 112
    assert len(waits) >= 5 and max(slow.sizes) < 10  # so a slice is far from a second


def test_a_repeated_request_is_the_same_change_and_then_changes_nothing(slow):
    with timeout(slow, 0.05):
        first, second = (slow("POST", "/v1/items", json={"items": many(50)}) for _ in range(2))
    assert first.status_code == second.status_code == 202 and first.json()["id"] == second.json()["id"]
    assert finished(slow, first.json())["done"] == 50
    again = slow("POST", "/v1/items", json={"items": many(51)})
    assert again.status_code == 201 and again.json() == {"changed": 1, "n_items": 63}


def test_changes_that_time_out_do_not_lock_the_catalogue(client, monkeypatch):
    gate, rank = threading.Event(), client.service.model.rank
    monkeypatch.setattr(client.service.model, "rank", lambda asks: gate.wait(30) and rank(asks))
    with timeout(client, 0.1):
        assert client.recommend(["i1"]).status_code == 503  # and the model is busy from here on
        answers = [client("POST", "/v1/items", json={"items": many(1, j)}) for j in range(9)]
    assert [a.status_code for a in answers] == [202] * 8 + [429] and answers[8].headers["Retry-After"]
    gate.set()
    for answer in answers[:8]:
        assert finished(client, answer.json())["state"] == "done"
    assert client("POST", "/v1/items", json={"items": many(1, 8)}).status_code == 201
    assert len(client.service.listing) == 21


def test_other_texts_for_a_known_id_are_a_conflict_and_nothing_is_added(client):
    other = {**NEW, "item_id": "i3"}
    answer = client("POST", "/v1/items", json={"items": [NEW, other]})
    assert answer.status_code == 409 and "'i3' has other texts" in answer.json()["detail"]
    twice = client("POST", "/v1/items", json={"items": [NEW, {**NEW, "title": "other"}]})
    assert twice.status_code == 409 and "elsewhere in this request" in twice.json()["detail"]
    assert client("GET", "/v1/items/new 1/a").status_code == 404 and len(client.service.listing) == 12


def test_of_a_failed_change_nothing_remains(slow, monkeypatch):
    add = slow.service.model.add_cleaned

    def failing(frame, *more):
        if "n7" in frame["item_id"]:
            raise RuntimeError("no")
        return add(frame, *more)

    monkeypatch.setattr(slow.service.model, "add_cleaned", failing)
    assert slow("POST", "/v1/items", json={"items": many(9)}).status_code == 500
    assert len(slow.service.listing) == 12 and slow.service.model.unknown_items(["n0"]) == ["n0"]
    monkeypatch.setattr(slow.service.model, "add_cleaned", add)
    assert slow("POST", "/v1/items", json={"items": many(9)}).json() == {"changed": 9, "n_items": 21}


def test_a_change_that_can_not_be_kept_is_not_made(client, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    answer = client("POST", "/v1/items", json={"items": [NEW]})
    assert answer.status_code == 500
    assert answer.json()["detail"] == "the change could not be written (No space left on device); nothing was changed"
    assert client.recommend(["new 1/a", "i1"]).json()["unknown"] == ["new 1/a"]
    assert client("DELETE", "/v1/items/i2").status_code == 500 and client("GET", "/v1/items/i2").status_code == 200


def test_a_change_under_way_when_the_server_ends_is_finished_or_undone(model_folder, tmp_path, monkeypatch):
    with served(model_folder, tmp_path, timeout_seconds=0.3) as client:
        add = client.service.model.add_cleaned
        monkeypatch.setattr(client.service.model, "add_cleaned", lambda frame: time.sleep(0.05) or add(frame))
        change = client.service.add(many(1_000))
        with pytest.raises(TimeoutError):
            change.future.result(0.2)
    assert "shutting down" in str(change.future.exception(0))
    with served(model_folder, tmp_path) as client:
        assert len(client.service.listing) == 12


def test_a_just_added_item_is_never_an_error(client, monkeypatch):
    gate, add = threading.Event(), client.service.listing.add
    monkeypatch.setattr(client.service.listing, "add", lambda items: gate.wait(5) and add(items))
    change = client.service.add([NEW])  # the model has it before it is listed
    while client.service.model.unknown_items(["new 1/a"]):
        time.sleep(0.01)
    answers = [client("GET", "/v1/items/new 1/a"), client("GET", "/v1/items/new 1/a/similar"),
               client("DELETE", "/v1/items/new 1/a")]
    assert [a.status_code for a in answers] == [404, 404, 404]
    gate.set()
    assert change.future.result(10) == 1 and client("GET", "/v1/items/new 1/a").json() == NEW


def test_items_that_another_model_encoded_are_encoded_anew(model_folder, tmp_path):
    with served(model_folder, tmp_path) as client:
        client("POST", "/v1/items", json={"items": [NEW]})
        want = client.service.model.encode_items(["new 1/a"])
    file = tmp_path / "items.parquet"
    frame = pl.read_parquet(file).with_columns(pl.lit("another").alias("model"), pl.lit([9.0]).alias("embedding"))
    frame.write_parquet(file)
    with served(model_folder, tmp_path) as client:
        assert np.allclose(client.service.model.encode_items(["new 1/a"]), want, atol=1e-4)


@pytest.fixture(scope="module")
def newer_model(llm, llm_folder, tmp_path_factory):
    """Fitted on 14 items, where the other knows 12."""
    config = tiny.config(llm_folder(), train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    folder = tmp_path_factory.mktemp("newer") / "model"
    LaserRecommender.fit_dataset(tiny.planted(14, users=16), config, folder, progress=False)
    return folder


def test_added_items_that_a_newer_model_knows_are_its_own(model_folder, newer_model, tmp_path):
    with served(model_folder, tmp_path) as client:
        for item in ({"item_id": "i13", "title": "added"}, NEW):
            assert client("POST", "/v1/items", json={"items": [item]}).status_code == 201
        assert client("DELETE", "/v1/items/i2").status_code == 200
        assert client("POST", "/v1/items", json={"items": [{"item_id": "i2", "title": "again"}]}).status_code == 201
    for _ in range(2):
        with served(newer_model, tmp_path) as client:
            assert client("GET", "/v1/items/i13").json()["title"] != "added"
            assert client("GET", "/v1/items/new 1/a").json() == NEW
            assert client("GET", "/v1/items/i2").json()["title"] == "again"
            facts = client("GET", "/v1/model").json()
            assert facts["n_items"] == 15 and facts["added"] == 2
            assert len(ids(client.recommend(["i13"], k=20))) == 15


def test_an_item_that_the_model_folder_lacks_stays_added(model_folder, tmp_path):
    model = LaserRecommender.from_pretrained(model_folder)
    model.remove_items(["i2"])
    model.save_pretrained(tmp_path / "without")
    with served(tmp_path / "without", tmp_path / "state") as client:
        assert client("GET", "/v1/items/i2").status_code == 404
        assert client("POST", "/v1/items", json={"items": [{"item_id": "i2", "title": "again"}]}).status_code == 201
    with served(tmp_path / "without", tmp_path / "state") as client:
        assert client("GET", "/v1/items/i2").json()["title"] == "again"
        assert client("DELETE", "/v1/items/i2").status_code == 200
    with served(tmp_path / "without", tmp_path / "state") as client:
        assert client("GET", "/v1/items/i2").status_code == 404


@pytest.mark.parametrize("embedding", [[9.0], [float("nan")] * 24, []])
def test_embeddings_of_a_state_that_do_not_fit_are_made_anew(model_folder, tmp_path, embedding):
    with served(model_folder, tmp_path) as client:
        client("POST", "/v1/items", json={"items": [NEW]})
        want = client.service.model.encode_items(["new 1/a"])
    file, other = tmp_path / "items.parquet", pl.Series("embedding", [embedding], pl.List(pl.Float32))
    pl.read_parquet(file).with_columns(other).write_parquet(file)
    with served(model_folder, tmp_path) as client:
        assert np.allclose(client.service.model.encode_items(["new 1/a"]), want, atol=1e-4)


@pytest.mark.parametrize("change", [{"item_id": pl.lit(None, pl.String)}, {"title": pl.lit(None, pl.String)},
                                    {"removed": pl.lit("x")}, {"embedding": pl.lit("x")},
                                    {"model": pl.lit(1).repeat_by(2)}])
def test_a_damaged_state_is_named(model_folder, tmp_path, change):
    with served(model_folder, tmp_path) as client:
        client("POST", "/v1/items", json={"items": [NEW]})
    file = tmp_path / "items.parquet"
    pl.read_parquet(file).with_columns(**change).write_parquet(file)
    with pytest.raises(UserError, match="is damaged"), served(model_folder, tmp_path):
        pass


def test_texts_are_cleaned_as_those_of_a_fit(client):
    raw = {"item_id": " x ", "title": " Saw &amp; <b>drill</b>\n ", "brand": " <br> "}
    assert client("POST", "/v1/items", json={"items": [raw]}).status_code == 201
    want = {"item_id": "x", "title": "Saw & drill", "brand": None, "category": None}
    assert client("GET", "/v1/items/x").json() == want
    number = {"item_id": 7.0, "title": ["Red", ["saw"]], "category": [["Tools", "Saws"]]}
    assert client("POST", "/v1/items", json={"items": [number]}).status_code == 201
    want = {"item_id": "7", "title": "Red saw", "brand": None, "category": "Tools Saws"}
    assert client("GET", "/v1/items/7").json() == client("GET", "/v1/items/7.0").json() == want
    assert client.recommend([7, " i1 ", "7.0"]).json()["unknown"] == []
    deep = ["x"]
    for _ in range(400):
        deep = [deep]
    for bad, why in (({"item_id": "y", "title": "<br>"}, "blank"), ({"item_id": "  ", "title": "z"}, "empty id"),
                     ({"item_id": True, "title": "z"}, "not an id"), ({"item_id": "y", "title": deep}, "too deep")):
        answer = client("POST", "/v1/items", json={"items": [bad]})
        assert answer.status_code == 422 and why in answer.json()["detail"]


def test_texts_are_cleaned_once(model_folder, tmp_path):
    """So that a text that was escaped twice is the same in the answer, the catalogue, the state and after a restart."""
    raw = {"item_id": "x", "title": "AT&amp;amp;amp;T saw", "brand": "<<b>b>R", "category": None}
    want = {"item_id": "x", "title": "AT&amp;amp;T saw", "brand": "< b>R", "category": None}
    for changed in (1, 0):
        with served(model_folder, tmp_path) as client:
            for count in (changed, 0):
                answer = client("POST", "/v1/items", json={"items": [raw]})
                assert answer.status_code == 201 and answer.json()["changed"] == count
            assert client("GET", "/v1/items/x").json() == want
            assert client.service.model.items.row(-1)[1:5] == tuple(want.values())


def test_finished_changes_are_forgotten_in_turn(monkeypatch):
    monkeypatch.setattr("laserrec.server.changes._KEPT", 3)
    changes = Changes(most=2)

    def done(change):
        change.future.set_result(1)
        return change.future

    made = [changes.begin(j, 1, done) for j in range(6)]
    assert changes.get(made[0].id) is None and changes.get(made[5].id).state == "done"
    waiting = changes.begin("w", 1, lambda change: change.future)
    assert changes.begin("w", 1, done) is waiting
    changes.begin("v", 1, lambda change: change.future)
    with pytest.raises(OverloadedError):
        changes.begin("u", 1, done)
    assert changes.get(waiting.id).state == "running"


def test_of_a_finished_change_no_frame_is_remembered():
    """A frame holds the model, and the request's body."""
    class Held:
        pass

    def failing(held):
        yield
        raise ValueError("no room")

    worker, changes, held = Worker(lambda asks: asks, Limits()), Changes(most=2), Held()
    gone, steps = weakref.ref(held), failing(held)
    worker.start()
    change = changes.begin("x", 3, lambda change: worker.change(steps))
    with pytest.raises(ValueError, match="no room"):
        change.future.result(10)
    worker.close()
    name = change.id
    del held, steps, change
    gc.collect()
    assert gone() is None
    assert (found := changes.get(name)).state == "failed" and (found.detail, found.total) == ("no room", 3)


def test_a_state_whose_rows_are_not_those_written_is_damaged(tmp_path):
    state = State(tmp_path, "model")
    state.write(Kept(("i1",), {"n": Item(item_id="n", title="saw", brand=None, category=None)},
                     {"n": np.ones(4, np.float32)}))
    assert state.read().embeddings["n"].tolist() == [1.0] * 4
    metadata = pl.read_parquet_metadata(state.file)
    frame = pl.read_parquet(state.file)
    frame.write_parquet(state.file, metadata={"laserrec.sha256": metadata["laserrec.sha256"]})
    assert state.read().removed == ("i1",)  # laid out differently, the same rows
    frame.with_columns(title=pl.lit("paw")).write_parquet(
        state.file, metadata={"laserrec.sha256": metadata["laserrec.sha256"]})
    with pytest.raises(UserError, match="not those that were written"):
        state.read()


def test_a_state_that_is_no_file_is_not_taken_for_none(tmp_path):
    (tmp_path / "items.parquet").mkdir()
    with pytest.raises(UserError, match="is damaged"):
        State(tmp_path, "model").read()
