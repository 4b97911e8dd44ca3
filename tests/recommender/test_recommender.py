"""The public class: the caller's ids in and out, items that come later, threads and forks, every mistake named."""

import os
import signal
import threading
import time

import jaxtyping
import numpy as np
import pandas as pd
import polars as pl
import pytest
import tiny
import torch

from laserrec import LaserRecommender
from laserrec.data.losses import LossWarning
from laserrec.methods.closed_form import ItemRegression
from laserrec.recommender.fitting import Fitted
from laserrec.recommender.ranking import Ask
from laserrec.util.errors import UserError

N = 12
NEW = pl.DataFrame({"item_id": ["new1", "new2"], "title": ["steel drill 99", "blue wood"], "brand": ["redco", None]})


@pytest.fixture(scope="module", params=["prefix_first", "text_first"])
def model(request, fit, tmp_path_factory):
    """A fitted model; tests that change it load their own."""
    return fit(tiny.planted(N, users=16), tmp_path_factory.mktemp("model") / "model", prompt={"layout": request.param},
               head={"id_share": 0.3, "whiten_dims": 8, "projection": True})


@pytest.fixture
def copy(model, llm, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    return LaserRecommender.from_pretrained(tmp_path / "copy", llm())


# -- fit --------------------------------------------------------------------------------------------------------


def test_fit_on_polars_and_pandas_frames_is_the_same(settings, tmp_path):
    acts, goods = tiny.planted_tables(N, 16)
    config = settings(data={"min_user_interactions": 1, "min_item_interactions": 1})
    one = LaserRecommender.fit(acts, goods, config, tmp_path / "run", progress=False, device="cpu")
    assert {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")} == {"data", "model"}
    assert (tmp_path / "run" / "model" / "id_model" / "weights.safetensors").is_file()
    renamed = acts.rename({"user_id": "customer"}).to_pandas()
    two = LaserRecommender.fit(renamed, goods.to_pandas(), config, columns={"user_id": "customer"}, progress=False)
    assert np.array_equal(one.encode_items(), two.encode_items())
    top = one.recommend([["i1", "i2"]], k=3)
    assert top.equals(two.recommend([["i1", "i2"]], k=3))
    assert set(top["item_id"]) <= set(goods["item_id"]) and top["rank"].to_list() == [1, 2, 3]
    again = LaserRecommender.fit(acts, goods, config, tmp_path / "run", progress=False)
    assert np.array_equal(one.encode_items(), again.encode_items())
    assert list((tmp_path / "run" / "data" / "text_features").glob("*.safetensors")) == []  # nothing asked for them


@pytest.mark.parametrize("table", ["llm_start", "text"])
def test_an_id_model_made_from_text_goes_the_whole_way(fit, llm, tmp_path, table):
    ids = {**tiny.ID_MODEL.model_dump(), "items": table, "seen_offset": True, "max_epochs": 2}
    model = fit(tiny.planted(N, 16), tmp_path / "m", id_model=ids)
    again = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    torch.testing.assert_close(again.score(tiny.histories([0, 1])), model.score(tiny.histories([0, 1])))


def test_a_learnt_offset_moves_the_historys_own_items(fit, llm, tmp_path):
    """It is learnt, it is saved, and the scores of seen items alone are changed by it."""
    model = fit(tiny.planted(N, 16), tmp_path / "m", head={"seen_offset": True, "id_share": 0.2})
    assert float(model.model.seen.offset) != -1.0
    again = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    assert torch.equal(again.model.seen.offset, model.model.seen.offset)
    rows = tiny.histories([0, 1, 1], [4])
    with_offset = model.score(rows)
    model.model.seen.offset.fill_(0.0)
    moved = (with_offset - model.score(rows)).abs() > 1e-6
    assert moved.nonzero().tolist() == [[0, 0], [0, 1], [1, 4]]


# -- recommend --------------------------------------------------------------------------------------------------


def test_recommendations_are_the_best_cosines(model):
    histories = {"anna": ["i1", "i2"], "never seen": ["i9"]}
    got = model.recommend(histories, k=4)
    assert got.columns == ["user_id", "item_id", "score", "rank"]
    users, items = model.encode_users(histories), model.encode_items()
    for row, user in enumerate(histories):
        cosines = items @ users[row] / np.linalg.norm(items, axis=1) / np.linalg.norm(users[row])
        best = np.argsort(-cosines)[:4]
        mine = got.filter(pl.col("user_id") == user)
        assert mine["item_id"].to_list() == [f"i{b + 1}" for b in best]
        assert mine["score"].to_list() == pytest.approx(cosines[best].tolist(), abs=1e-5)
        assert mine["rank"].to_list() == [1, 2, 3, 4]


def test_every_form_of_histories_gives_the_same(model):
    rows = [["i1", "i2"], ["i9"]]
    frame = pl.DataFrame({"user_id": ["0", "0", "1"], "item_id": ["i1", "i2", "i9"]})
    want = model.recommend(rows, k=3)
    assert want["user_id"].to_list() == [0, 0, 0, 1, 1, 1]
    for other in ({0: rows[0], 1: rows[1]}, frame, frame.lazy().collect(), [tuple(r) for r in rows]):
        got = model.recommend(other, k=3)
        assert got["item_id"].to_list() == want["item_id"].to_list()
        assert got["score"].to_list() == pytest.approx(want["score"].to_list(), abs=1e-6)
    pandas = model.recommend(frame.to_pandas(), k=3)
    assert isinstance(pandas, pd.DataFrame) and pandas["item_id"].tolist() == want["item_id"].to_list()


def test_a_user_does_not_depend_on_the_others(model):
    rows = [[f"i{1 + (u + p) % N}" for p in range(1 + u % 5)] for u in range(40)]  # more than one batch
    together = model.recommend(rows, k=2)
    for u in (0, 17, 39):
        alone = model.recommend([rows[u]], k=2)
        mine = together.filter(pl.col("user_id") == u)
        assert mine["score"].to_list() == pytest.approx(alone["score"].to_list(), abs=1e-5)
        assert mine["item_id"].to_list() == alone["item_id"].to_list()


def test_seen_items_and_candidates(model):
    history = [["i1", "i2", "i3"]]
    everything = model.recommend(history, k=99)
    assert sorted(everything["item_id"]) == sorted(f"i{j}" for j in range(1, N + 1))
    new = model.recommend(history, k=99, exclude_seen=True)["item_id"].to_list()
    assert new == [i for i in everything["item_id"] if i not in ("i1", "i2", "i3")]
    few = model.recommend(history, k=99, candidates=["i9", "i2", "i5"])
    assert few["item_id"].to_list() == [i for i in everything["item_id"] if i in ("i9", "i2", "i5")]
    assert few["rank"].to_list() == [1, 2, 3]
    both = model.recommend(history, k=99, candidates=["i2", "i5"], exclude_seen=True)
    assert both["item_id"].to_list() == ["i5"]
    hidden = model.recommend(history, k=99, exclude=["i9", "i2", "nope"])
    assert hidden["item_id"].to_list() == [i for i in everything["item_id"] if i not in ("i9", "i2")]


def test_an_empty_history_is_answered_with_nothing(model):
    none, some = model.rank([Ask(np.zeros(0, np.int64), 3), Ask(np.array([1]), 3)])
    assert len(none.items) == 0 and len(some.items) == 3


def test_long_histories_count_by_their_end(model):
    long = [[f"i{1 + p % N}" for p in range(300)]]
    assert model.recommend(long, k=3)["score"].to_list() == pytest.approx(
        model.recommend([long[0][-50:]], k=3)["score"].to_list(), abs=1e-5)


def test_evaluator_scores_are_the_recommendations(model):
    scores = model.score(tiny.histories([0, 1], [8]))
    got = model.recommend([["i1", "i2"], ["i9"]], k=N)
    for row in (0, 1):
        mine = got.filter(pl.col("user_id") == row)
        assert mine["score"].to_list() == pytest.approx(scores[row].sort(descending=True).values.tolist(), abs=1e-5)


def test_encode_items_by_id(model):
    assert np.array_equal(model.encode_items(["i3", "i1"]), model.encode_items()[[2, 0]])


@pytest.mark.parametrize(("ask", "message"), [
    (lambda m: m.recommend([["i1", "nope", "nada"]]), "history of user 0: 2 unknown item ids, first .'nope', 'nada'"),
    (lambda m: m.recommend({"anna": []}), "history of user 'anna': it is empty"),
    (lambda m: m.recommend({"anna": ["nope"]}, unknown="drop"), "no item of the histories is in the catalogue"),
    (lambda m: m.recommend(["i1", "i2"]), "one list of item ids; give a list of histories"),
    (lambda m: m.recommend([1, 2]), "one list of item ids; give a list of histories"),
    (lambda m: m.recommend({"anna": "i1"}), "history of user 'anna' is 'i1', not a list"),
    (lambda m: m.recommend("i1"), "expected a dict, a list of lists.* or a frame, not str"),
    (lambda m: m.recommend([]), "no histories"),
    (lambda m: m.recommend([["i1"]], k=0), "k is 0; it must be a whole number of at least 1"),
    (lambda m: m.recommend([["i1"]], k=-3), "at least 1"),
    (lambda m: m.recommend([["i1"]], candidates="i1"), "expected a list of item ids, not 'i1'"),
    (lambda m: m.remove_items("i1"), "expected a list of item ids, not 'i1'"),
    (lambda m: m.add_items(NEW, torch.zeros(1, 3)), "embeddings of shape .1, 3. are not those of 2 items"),
    (lambda m: m.recommend([["i1"]], candidates=["i1", "nope"]), "candidates: 1 unknown item ids, first .'nope'"),
    (lambda m: m.recommend([["i1"]], unknown="ignore"), 'unknown is "error" or "drop"'),
    (lambda m: m.recommend(pl.DataFrame({"user": ["a"], "item_id": ["i1"]})),
     "no column for user_id; there are: user"),
    (lambda m: m.encode_items(["nope"]), "item_ids: 1 unknown"),
    (lambda m: m.recommend([["i1"]], exclude="i1"), "exclude is a list of item ids, or a dict of such lists by user"),
    (lambda m: m.remove_items(["i1", "nope"]), "remove_items: 1 unknown item ids, first .'nope'.; the catalogue's are "
     "like 'i1' and 'i2'. Nothing was removed; leave them out$"),
    (lambda m: m.add_items(NEW, m.encode_items(["i1", "i2"]) * [[1], [np.nan]]),
     "embeddings: row 2, of item 'new2', holds numbers that are not finite"),
    (lambda m: m.nearest(99, 3), "row is 99; give an item's row in items, from 0 to 11"),
    (lambda m: m.nearest(-1, 3), "row is -1; give"),
    (lambda m: m.nearest(0, 0), "k is 0; it must be a whole number of at least 1"),
    (lambda m: LaserRecommender.from_pretrained(""), "folder is ''; give a model folder"),
    (lambda m: m.refit("no/data", "out"), "no/data is not a data folder"),
    (lambda m: LaserRecommender.fit_dataset("no/data", m.config, "out"), "no/data is not a data folder"),
    (lambda m: m.add_items(NEW, exists="maybe"), "exists is .error. or .skip., not 'maybe'"),
    (lambda m: m.add_items(pl.DataFrame({"item_id": ["x"]})), "no column for title; there are: item_id"),
    (lambda m: m.add_items(pl.DataFrame({"item_id": ["i1"], "title": ["saw"]})), "in the catalogue already"),
    (lambda m: m.add_items(pl.DataFrame({"item_id": ["x", "x"], "title": ["saw", "saw"]})),
     "row 1: item .x. stands in more than one row"),
    (lambda m: m.add_items(pl.DataFrame({"item_id": ["x", "y"], "title": ["saw", " "]})),
     "row 2: item .y. has no title"),
])
def test_mistakes_are_named(model, ask, message):
    before = len(model.items)
    with pytest.raises(UserError, match=message):
        ask(model)
    assert len(model.items) == before and "i1" in model.recommend([["i1"]], k=99)["item_id"]


@pytest.fixture
def untyped():
    """As users call it: the tests' own check of types is off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("ask", "message"), [
    (lambda m: m.add_items(NEW, [[1.0], [1.0, 2.0]]), "embeddings are ..1.0., .1.0, 2.0..; give numbers, a row for"),
    (lambda m: m.add_items(NEW, [["x"], ["y"]]), "give numbers, a row for each item, as encode_items does"),
    (lambda m: m.add_items(NEW, m.encode_items(["i1"])[0].tolist()), "embeddings of shape .* are not those of 2 items"),
    (lambda m: m.nearest("i1", 3), "row is 'i1'; give an item's row in items, .*dense_items tells those of ids"),
    (lambda m: m.nearest(0, "3"), "k is '3'; it must be a whole number"),
    (lambda m: LaserRecommender.from_pretrained(None), "folder is None; give a model folder, or ORG/NAME on the hub"),
    (lambda m: m.refit(None, "out"), "dataset is None; give a data folder, or what Dataset.load makes of one"),
    (lambda m: m.refit(tiny.planted(N, 16), "out", "lr"), "changes are settings by section, .*, not 'lr'"),
    (lambda m: LaserRecommender.fit_dataset(tiny.planted(N, 16), {}, "out"), "config is a dict; make a Config"),
])
def test_mistakes_of_type_are_named(model, untyped, ask, message):
    before = len(model.items)
    with pytest.raises(UserError, match=message):
        ask(model)
    assert len(model.items) == before


def test_embeddings_of_encode_items_are_taken_as_they_are(copy):
    own = copy.encode_items(["i1", "i2"])
    assert copy.add_items(NEW, own) == 2
    assert np.array_equal(copy.encode_items(["new1", "new2"]), own)
    assert copy.recommend([["i1", "new1"]], k=3).height == 3


def test_unknown_items_can_be_dropped(model):
    got = model.recommend([["nope", "i1", "i2"]], k=3, unknown="drop")
    assert got.equals(model.recommend([["i1", "i2"]], k=3))


def test_users_without_an_answer_are_told(model):
    everything = [f"i{n}" for n in range(1, N + 1)]
    with pytest.warns(LossWarning, match="^1 of 2 users get no recommendation: nothing is left for them"):
        got = model.recommend({"a": ["i1"], "b": everything}, exclude_seen=True)
    assert set(got["user_id"]) == {"a"}
    histories = {**{f"u{n}": ["i1"] for n in range(20)}, "b": ["zz"]}  # less than a tenth is lost
    with pytest.warns(LossWarning, match="1 of 21 users have no known item.*'zz'") as told:
        assert model.recommend(histories, unknown="drop")["user_id"].n_unique() == 20
    assert len(told) == 1


# -- items that come later --------------------------------------------------------------------------------------


def test_added_items_are_recommended_and_read(copy):
    before = copy.recommend([["i1"]], k=N)
    assert copy.add_items(NEW) == 2
    inherited = copy.embeddings[:, -tiny.ID_MODEL.d_id :].norm(dim=1)
    assert (inherited[N:] > 0.4).all() and torch.allclose(copy.embeddings.norm(dim=1), torch.ones(N + 2))
    after = copy.recommend([["i1"]], k=99)
    assert sorted(after["item_id"]) == sorted([*before["item_id"], "new1", "new2"])
    old = after.filter(pl.col("item_id").str.starts_with("i"))
    assert old["item_id"].to_list() == before["item_id"].to_list()
    alone, mixed = copy.recommend([["new1"]], k=3), copy.recommend([["i1", "new2"]], k=3)
    assert alone.height == mixed.height == 3
    # In its text an item is nearest to itself when the user's side reads it the same way.
    assert not np.allclose(copy.encode_users([["new1"]]), copy.encode_users([["new2"]]), atol=1e-3)


@pytest.mark.parametrize("new", [
    {"item_id": "x", "title": "saw", "category": ["a", "b"]}, [{"item_id": "x", "title": "saw", "category": "a b"}],
    {"item_id": ["x"], "title": ["saw"], "category": [["a", "b"]]}])
def test_items_may_be_dicts(copy, new):
    assert copy.add_items(new) == 1 and copy.items.row(-1)[1:] == ("x", "saw", None, "a b")


def test_added_items_are_saved(copy, llm, tmp_path):
    copy.add_items(NEW.to_pandas())
    copy.save_pretrained(tmp_path / "more")
    again = LaserRecommender.from_pretrained(tmp_path / "more", llm())
    ask = [["i1", "new2"], ["new1"]]
    got, want = again.recommend(ask, k=99), copy.recommend(ask, k=99)
    assert got.drop("score").equals(want.drop("score"))
    assert np.allclose(got["score"], want["score"], atol=1e-5)  # the new texts were read in other batches
    assert again.items["item"].to_list() == list(range(N + 2)) and again.n_known == N
    again.add_items(pl.DataFrame({"item_id": ["third"], "title": ["glue"]}))
    assert again.recommend(ask, k=99)["item_id"].n_unique() == N + 3


def test_an_addition_of_nothing_or_of_known_items(copy):
    before = copy.recommend([["i1"]], k=99)
    assert copy.add_items(NEW.clear()) == 0
    assert copy.add_items(pl.concat([NEW, NEW.with_columns(item_id=pl.Series(["i1", "i2"]))]), exists="skip") == 2
    assert copy.add_items(NEW, exists="skip") == 0 and len(copy.items) == N + 2
    assert [i for i in copy.recommend([["i1"]], k=99)["item_id"] if i not in ("new1", "new2")] == (
        before["item_id"].to_list())


def test_embeddings_of_an_earlier_addition_save_the_reading(copy, model, llm, tmp_path, monkeypatch):
    copy.add_items(NEW)
    vectors, want = copy.embeddings[N:], copy.recommend([["i1"]], k=99)
    model.save_pretrained(tmp_path / "other")
    other = LaserRecommender.from_pretrained(tmp_path / "other", llm())
    monkeypatch.setattr(type(other.model.item_side), "outputs", lambda *_: pytest.fail("the texts are read again"))
    other.add_items(NEW, vectors)
    assert other.recommend([["i1"]], k=99).equals(want)


def test_a_failed_addition_changes_nothing(copy, monkeypatch):
    before = copy.recommend([["i1"]], k=99)
    monkeypatch.setattr(copy.model, "embed_items", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        copy.add_items(NEW)
    assert len(copy.items) == N and copy.unknown_items(["new1"]) == ["new1"]
    assert copy.recommend([["i1"]], k=99).equals(before)


def test_removed_items_stay_away_and_their_ids_are_free(copy, llm, tmp_path):
    want = [i for i in copy.recommend([["i1"]], k=99)["item_id"] if i != "i3"]
    assert copy.remove_items(["i3", "i3"]) == 1 and copy.removed == {2}
    copy.save_pretrained(tmp_path / "less")
    for one in (copy, LaserRecommender.from_pretrained(tmp_path / "less", llm())):
        assert one.recommend([["i1"]], k=99)["item_id"].to_list() == want and one.items.height == N
        assert 2 not in one.nearest(0, 99).items and len(one.nearest(0, 99).items) == N - 2
        for ask in (lambda m: m.recommend([["i3"]]), lambda m: m.recommend([["i1"]], candidates=["i3"])):
            with pytest.raises(UserError, match=r"1 unknown item ids, first \['i3'\]"):
                ask(one)
    copy.add_items(pl.DataFrame({"item_id": ["i3"], "title": ["another saw"]}))
    assert copy.dense_items(["i3"], "test").tolist() == [N] and copy.removed == {2}


def test_nearest_items_are_those_of_the_largest_cosine(model):
    vectors = torch.nn.functional.normalize(model.embeddings, dim=-1)
    want = [i for i in (vectors @ vectors[4]).argsort(descending=True).tolist() if i != 4]
    found = model.nearest(4, 5)
    assert found.items.tolist() == want[:5]
    np.testing.assert_allclose(found.scores, (vectors @ vectors[4])[want[:5]], atol=1e-5)


# -- threads and forks ------------------------------------------------------------------------------------------


def test_eight_threads_ask_while_items_come_and_go(copy):
    """Each answer is one that the catalogue of some moment gives."""
    histories, old = [[f"i{1 + u}", f"i{1 + (u + 3) % N}"] for u in range(4)], [f"i{j + 1}" for j in range(N)]
    want = copy.recommend(histories, k=N)
    wrong, done = [], threading.Event()

    def asks():
        while not done.is_set():
            got = copy.recommend(histories, k=N, candidates=old)
            if got["item_id"].to_list() != want["item_id"].to_list():
                wrong.append(got)
            everything = copy.recommend(histories, k=999)
            rows = set(everything.group_by("user_id").len()["len"])
            if len(rows) != 1 or not set(old) <= set(everything["item_id"]):
                wrong.append(everything)

    def adds(worker: int):
        for i in range(3):
            name = f"x{worker}-{i}"
            copy.add_items(pl.DataFrame({"item_id": [name, f"{name}b"], "title": [f"red saw {name}", "glue"]}))
            copy.remove_items([f"{name}b"])

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:
            wrong.append(error)

    readers = [threading.Thread(target=guarded, args=(asks,)) for _ in range(4)]
    writers = [threading.Thread(target=guarded, args=(adds, n)) for n in range(4)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join(120)
    done.set()
    for thread in readers:
        thread.join(120)
    assert wrong == [] and not any(t.is_alive() for t in (*readers, *writers))
    names = copy.recommend(histories[:1], k=999)["item_id"].to_list()
    assert sorted(names) == sorted(old + [f"x{w}-{i}" for w in range(4) for i in range(3)])
    assert copy.items["item"].to_list() == list(range(N + 24))
    assert copy.recommend(histories, k=N, candidates=old)["item_id"].to_list() == want["item_id"].to_list()


@pytest.fixture(scope="module")
def large(settings, llm):
    """A closed form whose product is large enough for torch to share it out among threads."""
    config, n = settings(), 1500
    torch.manual_seed(0)
    model = ItemRegression(config.neighbours, n)
    model.weights.normal_()
    return LaserRecommender(Fitted(model, "ease", config, tiny.items(n), n, tiny.features(llm(), config), {}))


SECONDS = 90


def in_a_fork(work) -> bytes:
    """What `work` gives in a forked process; b"it hangs" if that takes longer than SECONDS."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        said = b"it failed"
        try:
            said = work()
        except UserError as error:
            said = f"UserError: {error}".encode()
        finally:
            os.write(writes, said)
            os._exit(0)
    end = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.write(writes, b"it hangs")
        time.sleep(0.02)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        return pipe.read()


def top_items(model) -> bytes:
    histories = [[f"i{u + p}" for p in range(1, 6)] for u in range(200)]
    return " ".join(model.recommend(histories, k=7)["item_id"].to_list()).encode()


def test_a_forked_process_answers(large):
    """Two threads computed before the fork; the child has one, and must not wait for the other."""
    torch.set_num_threads(2)
    want = top_items(large)
    assert in_a_fork(lambda: top_items(large)) == want
    assert torch.get_num_threads() == 2 and top_items(large) == want  # the parent goes on as before


@pytest.mark.parametrize("ask", [
    lambda m: m.recommend(pl.DataFrame({"user_id": ["a", "a"], "item_id": ["i1", "i2"]})),
    lambda m: m.add_items(NEW), lambda m: m.save_pretrained("somewhere")])
def test_what_needs_tables_is_refused_in_a_forked_process(large, ask):
    """polars' threads are not there either, and it would wait for them."""
    pl.DataFrame({"a": [1, 2]}).group_by("a").len()
    assert b"UserError: in a forked process frames can't be read" in in_a_fork(lambda: ask(large))


def test_a_fork_in_the_midst_of_another_threads_call_is_refused(large):
    held, done = threading.Event(), threading.Event()

    def holds():
        with large._held():
            held.set()
            done.wait(120)

    thread = threading.Thread(target=holds)
    thread.start()
    held.wait(60)
    try:
        assert b"UserError: the process was forked while another thread used the model" in in_a_fork(
            lambda: top_items(large))
    finally:
        done.set()
        thread.join(60)
    assert len(top_items(large).split()) == 200 * 7


def test_a_fork_of_a_model_on_a_gpu_is_refused(large, monkeypatch):
    monkeypatch.setattr(large.fitted.features, "device", torch.device("cuda", 0))
    assert b"UserError: a model on a GPU can't be used in a forked process" in in_a_fork(lambda: top_items(large))
