"""Recommendations through an index are those without one, whatever the index holds and whatever it doesn't."""

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec import LaserRecommender
from laserrec.recommender.ranking import Ask, best
from laserrec.retrieval.build import build_index, fill_index
from laserrec.retrieval.index import ExactIndex, IndexKind, make_index
from laserrec.retrieval.indexed import Indexed
from laserrec.util.errors import UserError

N = 30
HISTORIES = {"a": ["i3", "i4", "i3"], "b": ["i9"], "c": [f"i{i}" for i in range(1, 13) if i != 7], "d": ["i30", "i1"]}
NEW = pl.DataFrame({"item_id": ["new1", "new2", "new3"], "title": ["steel drill 99", "blue wood", "red saw"]})


@pytest.fixture(scope="module")
def folder(llm, llm_folder, tmp_path_factory):
    config = tiny.config(llm_folder(), prompt={"layout": "text_first", "max_items": 4, "max_item_tokens": 8},
                         head={"id_share": 0.3, "whiten_dims": 8, "projection": True, "seen_offset": True},
                         train={"stage_one_epochs": 0, "stage_two_epochs": 0})
    folder = tmp_path_factory.mktemp("indexed") / "model"
    LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.id_model(N), config, folder, False, llm())
    return folder


@pytest.fixture
def pair(folder, llm):
    """The same model twice, with some items removed: one for an index, one without."""
    pair = [LaserRecommender.from_pretrained(folder, llm()) for _ in range(2)]
    for model in pair:
        model.remove_items(["i7", "i20"])
    return pair


@pytest.fixture(params=list(IndexKind))
def kind(request):
    return request.param


def alike(mine, plain, **how):
    for k in (1, 5, 40):
        got, want = mine.recommend(HISTORIES, k=k, **how), plain.recommend(HISTORIES, k=k, **how)
        assert got.drop("score").equals(want.drop("score")) and got.schema == want.schema
        np.testing.assert_allclose(got["score"], want["score"], atol=1e-6)


@pytest.mark.parametrize("offset", [None, -1.0, 0.05, 1.0])
def test_the_recommendations_are_those_without_an_index(pair, kind, offset):
    mine, plain = pair
    for model in pair:
        model.encoder.laser.seen_offset = None if offset is None else torch.nn.Parameter(torch.tensor(offset))
    mine.use_index(fill_index(mine, kind))
    assert mine.index.kind == kind and plain.index is None
    for exclude_seen in (False, True):
        alike(mine, plain, exclude_seen=exclude_seen)
        alike(mine, plain, exclude_seen=exclude_seen, candidates=["i4", "i30", "i9", "i15", "i2"])


def test_items_that_come_and_go_are_seen_to_beside_the_index(pair, kind):
    mine = pair[0]
    mine.use_index(fill_index(mine, kind))
    size = len(mine.index)
    for model in pair:
        model.add_items(NEW)
        model.remove_items(["i8", "new2", "i15"])
        model.add_items(NEW[1:2])  # the same id, as another item
    histories = {**HISTORIES, "c": ["i5", "new1", "new2"]}
    for exclude_seen in (False, True):
        got, want = (m.recommend(histories, k=40, exclude_seen=exclude_seen) for m in pair)
        assert got.drop("score").equals(want.drop("score"))
        assert not set(got["item_id"]) & {"i7", "i8", "i15", "i20"} and {"new1", "new2", "new3"} <= set(got["item_id"])
    got, want = (m.recommend(histories, k=9, candidates=["new3", "i4", "new1", "i5"]) for m in pair)
    assert got.drop("score").equals(want.drop("score")) and got["item_id"].n_unique() == 4
    assert len(mine.index) == size


def test_the_nearest_of_one_item(pair, kind):
    mine, plain = pair
    mine.use_index(fill_index(mine, kind))
    for model in pair:
        model.add_items(NEW)
        model.remove_items(["i11"])
    for item in (1, 30, N + 2):
        got, want = mine.nearest(item, 6), plain.nearest(item, 6)
        assert got.items.tolist() == want.items.tolist() and item not in got.items and len(got.items) == 6
        np.testing.assert_allclose(got.scores, want.scores, atol=1e-6)


def test_a_folder_is_read_by_many_and_changed_by_none(pair, kind, tmp_path):
    mine, other = pair
    build_index(mine, kind, tmp_path / "index", queries=5)
    before = {f: f.read_bytes() for f in (tmp_path / "index").rglob("*") if f.is_file() and f.name != ".lock"}
    want = mine.recommend(HISTORIES, k=6)
    for model in pair:
        model.use_index(tmp_path / "index")
    mine.add_items(NEW)
    mine.remove_items(["i25"])
    assert other.recommend(HISTORIES, k=6).drop("score").equals(want.drop("score"))
    assert "i25" not in mine.recommend(HISTORIES, k=40)["item_id"].to_list()
    assert {f: f.read_bytes() for f in before} == before
    other.use_index(None)
    assert other.index is None


def test_an_index_of_another_catalogue_is_refused(pair, kind, tmp_path):
    mine, _ = pair
    build_index(mine, kind, tmp_path / "index", queries=5)
    rng, width = np.random.default_rng(0), mine.embeddings.shape[1]
    live = [i for i in range(1, N + 1) if i not in (7, 20)]
    vectors = mine.embeddings.numpy()[np.array(live) - 1]
    noise = rng.normal(size=vectors.shape).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    for ids, kept, message in ((live, vectors[:, :-1], f"vectors {width - 1} wide and the model's are {width} wide"),
                               (live[1:], vectors[1:], "holds 27 items and the model 28"),
                               (live, noise, "other items or vectors"),
                               (live, vectors[::-1], "other items or vectors"),
                               (list(range(101, 129)), vectors, "other items or vectors")):
        index = make_index(kind, kept.shape[1])
        index.add(np.array(ids), kept)
        with pytest.raises(UserError, match=message):
            mine.use_index(index)
    mine.add_items(NEW)
    with pytest.raises(UserError, match="index of another model or catalogue; build it again"):
        mine.use_index(tmp_path / "index")
    (tmp_path / "index" / "catalogue.json").unlink()
    with pytest.raises(UserError, match="not a finished index; make one with"):
        mine.use_index(tmp_path / "index")
    assert mine.index is None


def test_the_removed_count_for_whether_it_fits(pair, folder, llm, tmp_path):
    mine, _ = pair
    build_index(mine, IndexKind.EXACT, tmp_path / "index", queries=5)
    whole = LaserRecommender.from_pretrained(folder, llm())
    with pytest.raises(UserError, match="another model or catalogue"):
        whole.use_index(tmp_path / "index")
    mine.save_pretrained(tmp_path / "saved")
    LaserRecommender.from_pretrained(tmp_path / "saved", llm()).use_index(tmp_path / "index")


def test_nothing_that_can_be_recommended(pair):
    mine = pair[0]
    for model in pair:
        model.remove_items([i for i in model.items["item_id"] if i not in ("i7", "i20", "i3")])
    mine.use_index(fill_index(mine, IndexKind.EXACT))
    assert mine.recommend([["i3"]], k=5)["item_id"].to_list() == ["i3"]
    assert [m.recommend([["i3"]], exclude_seen=True).height for m in pair] == [0, 0]


def test_no_more_users_at_once_than_before_and_no_fewer(pair, monkeypatch):
    from laserrec.recommender import recommender

    seen = []
    monkeypatch.setattr(recommender, "rows_at_once", lambda n_items, wanted: seen.append(n_items) or wanted)
    pair[0].use_index(fill_index(pair[0], IndexKind.EXACT))
    for model in pair:
        model.add_items(NEW)
        model.recommend(HISTORIES)
    assert seen == [3, N + 3]


@st.composite
def cases(draw):
    n = draw(st.integers(1, 25))
    items = st.integers(1, n)
    covered = draw(st.integers(0, n))
    removed = draw(st.frozensets(items, max_size=n))
    asks = []
    for _ in range(draw(st.integers(1, 3))):
        candidates = draw(st.none() | st.lists(items, unique=True, max_size=n))
        history = np.array(draw(st.lists(items, min_size=1, max_size=6)), dtype=np.int32)
        asks.append(Ask(history, draw(st.integers(1, 30)), draw(st.booleans()),
                        None if candidates is None else np.array(candidates, dtype=np.int32)))
    gone = frozenset(i for i in removed if i <= covered and draw(st.booleans()))
    return n, covered, removed, gone, asks, draw(st.sampled_from([0.0, 1.0, -1.0, 0.5])), draw(st.integers(0, 10**6))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_exact_to_the_last_bit_and_tie(case):
    """Small whole numbers: no rounding, and ties everywhere."""
    n, covered, removed, gone, asks, offset, seed = case
    rng = np.random.default_rng(seed)
    table = torch.tensor(rng.integers(-1, 2, (n, 4)), dtype=torch.float32)
    users = torch.tensor(rng.integers(-1, 2, (len(asks), 4)), dtype=torch.float32)
    index = ExactIndex(4)
    held = np.array([i for i in range(1, covered + 1) if i not in gone], dtype=np.int64)
    index.add(held, table.numpy()[held - 1])
    pulls = {i: torch.tensor([j for j in range(1, n + 1) if (i + j) % 3 == 0 and j != i], dtype=torch.long)
             for i in range(1, n + 1)}

    def pull(history):
        """A history's newest item pulls some, by one; those in the history none."""
        items = pulls[int(history[-1])]
        items = items[~torch.isin(items, torch.as_tensor(history).long())]
        return items, torch.ones(len(items))

    def finish(scores, items, history, pulled):
        scores[torch.isin(items, torch.as_tensor(history).long())] += offset
        scores[torch.isin(items, pulled[0])] += 1.0

    found = Indexed(index, covered, gone).rank(users, asks, table, removed, pull, finish)
    for user, ask, (items, scores) in zip(users, asks, found, strict=True):
        row = table @ user
        row[torch.as_tensor(np.unique(ask.history)).long() - 1] += offset
        row[pull(ask.history)[0] - 1] += 1.0
        if removed:
            row[torch.tensor(sorted(removed)) - 1] = -torch.inf
        want = best(row, ask, None)
        assert items.tolist() == want.items.tolist() and scores.tolist() == want.scores.tolist()
