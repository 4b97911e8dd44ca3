"""A ranking through an index is the one without it, whatever the index holds, whatever the terms change."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.retrieval.build import build_index, fill_index
from laserrec.retrieval.exact import ExactIndex
from laserrec.retrieval.folder import make_index
from laserrec.retrieval.index import IndexKind
from laserrec.retrieval.indexed import Indexed, attach, live_rows
from laserrec.retrieval.top import Ask
from laserrec.util.errors import UserError

N = 30
GONE = frozenset((6, 19))


def ask(history, k, exclude_seen=False, candidates=None, exclude=None) -> Ask:
    candidates, exclude = (None if rows is None else np.array(rows, np.int64) for rows in (candidates, exclude))
    return Ask(np.array(history, np.int64), k, exclude_seen, candidates, exclude)


@dataclass
class Shift:
    """A term: per user some rows, whose scores it moves by `by` times the score plus `by`."""

    of: list[torch.Tensor]
    by: float

    def rows(self, user):
        return self.of[user]

    def to_all(self, scores):
        return torch.stack([self.to_some(u, torch.arange(len(row)), row) for u, row in enumerate(scores)])

    def to_some(self, user, rows, scores):
        return torch.where(torch.isin(rows, self.of[user]), scores + self.by * (scores.abs() + 1), scores)


def by_hand(users, asks, vectors, removed, applied):
    """All scores of all items, sorted."""
    scores, out = users @ vectors.T, []
    for term in applied:
        scores = term.to_all(scores)
    for ask, own in zip(asks, scores, strict=True):
        barred = {*removed, *(ask.history if ask.exclude_seen else []), *([] if ask.exclude is None else ask.exclude)}
        allowed = range(len(own)) if ask.candidates is None else ask.candidates
        best = sorted((-float(own[r]), int(r)) for r in allowed if int(r) not in {int(b) for b in barred})
        out.append(([r for _, r in best[: ask.k]], [-s for s, _ in best[: ask.k]]))
    return out


def alike(got, want):
    for (rows, scores), (want_rows, want_scores) in zip(got, want, strict=True):
        assert rows.tolist() == want_rows and rows.dtype == torch.int64
        np.testing.assert_allclose(scores, want_scores, atol=1e-6)


@pytest.fixture(params=list(IndexKind))
def kind(request):
    return request.param


ASKS = [ask([2, 3, 2], 5), ask([8], 40), ask([0, 1, 4, 9, 11], 3, exclude_seen=True),
        ask([29, 0], 4, candidates=[3, 29, 8, 14, 6]), ask([5], 6, exclude=[1, 2, 3])]


@pytest.mark.parametrize("by", [-1.0, 0.05, 2.0])
def test_the_answers_are_those_without_an_index(vectors, live, kind, by):
    users, rng = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1), np.random.default_rng(0)
    terms = [Shift([torch.tensor(rng.choice(N, 6, replace=False)) for _ in ASKS], by),
             Shift([torch.tensor([], dtype=torch.long)] * 4 + [torch.tensor([1, 7])], -by)]
    indexed = attach(fill_index(vectors, live, kind), vectors, GONE)
    alike(indexed.rank(users, ASKS, vectors, GONE, terms), by_hand(users, ASKS, vectors, GONE, terms))
    alike(indexed.rank(users, ASKS, vectors, GONE), by_hand(users, ASKS, vectors, GONE, []))


def test_items_that_come_and_go_are_seen_to_beside_the_index(vectors, live, kind):
    index = fill_index(vectors, live, kind)
    indexed = attach(index, vectors, GONE)
    more = torch.cat([vectors, torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)])
    removed, users = GONE | {7, 31, 14}, torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    terms = [Shift([torch.tensor([7, 30, 31, 2])] * 5, 0.5)]
    alike(indexed.rank(users, ASKS, more, removed, terms), by_hand(users, ASKS, more, removed, terms))
    assert len(index) == 28


def test_no_more_than_there_are_is_asked_for(vectors, live, kind, monkeypatch):
    """Room is made for as many answers as are asked for: a billion of them would not fit."""
    index, asked = fill_index(vectors, live, kind), []
    indexed, search = attach(index, vectors, GONE), index.search
    monkeypatch.setattr(index, "search", lambda queries, k, **how: asked.append(k) or search(queries, min(k, N), **how))
    found, = indexed.rank(vectors[:1], [ask([8], 10**9)], vectors, GONE, depth=500)
    assert asked == [len(live)] and sorted(found[0].tolist()) == live.tolist()


def test_vectors_of_any_length_by_the_exact_kind(vectors, live):
    long = vectors * torch.linspace(0.1, 4, N)[:, None]
    indexed, users = attach(fill_index(long, live, IndexKind.EXACT), long, GONE), torch.randn(5, 8) * 3
    alike(indexed.rank(users, ASKS, long, GONE), by_hand(users, ASKS, long, GONE, []))


def test_rows_that_are_none_are_left_out(vectors, live):
    """A server may answer with what nobody put there."""
    index = fill_index(vectors, live, IndexKind.EXACT)
    indexed = attach(index, vectors, GONE)
    index.search = lambda queries, k, excluded: (np.array([[N + 70, -1, 3]]), np.zeros((1, 3), np.float32))
    rows, _ = indexed.rank(vectors[:1], [ask([0], 3)], vectors, GONE)[0]
    assert rows.tolist() == [3]


def test_a_folder_is_taken_and_not_changed(vectors, live, queries, kind, server, tmp_path):
    where = {"url": server} if kind == IndexKind.QDRANT else {}
    build_index(vectors, live, kind, tmp_path / "index", queries, **where)
    before = {f: f.read_bytes() for f in (tmp_path / "index").iterdir()}
    alike(attach(tmp_path / "index", vectors, GONE).rank(vectors[:5], ASKS, vectors, GONE | {24}),
          by_hand(vectors[:5], ASKS, vectors, GONE | {24}, []))
    assert {f: f.read_bytes() for f in (tmp_path / "index").iterdir()} == before
    for other, removed in ((vectors, GONE | {1}), (vectors, frozenset()), (vectors.flip(0), GONE),
                           (torch.cat([vectors, vectors[:1]]), GONE)):
        with pytest.raises(UserError, match="index of another model or catalogue; build the index again"):
            attach(tmp_path / "index", other, removed)
    with pytest.raises(UserError, match="none is not a finished index; make one with laserrec index build"):
        attach(tmp_path / "none", vectors, GONE)


def test_an_index_of_another_catalogue_is_refused(vectors, live, kind):
    mine = vectors[live].numpy()
    noise = torch.nn.functional.normalize(torch.randn(len(live), 8), dim=-1).numpy()
    for rows, kept, message in ((live, noise[:, :-1] / np.linalg.norm(noise[:, :-1], axis=1, keepdims=True),
                                 "vectors 7 wide and the model's are 8 wide"),
                                (live[1:], mine[1:], "holds 27 items and the model 28"),
                                (live, noise, "other items or vectors"), (live, mine[::-1], "other items or vectors"),
                                (live + 100, mine, "other items or vectors")):
        index = make_index(kind, kept.shape[1])
        index.add(rows.numpy(), np.ascontiguousarray(kept))
        with pytest.raises(UserError, match=message):
            attach(index, vectors, GONE)


def test_nothing_that_can_be_recommended(vectors):
    removed = frozenset(range(N))
    indexed = attach(make_index(IndexKind.EXACT, 8), vectors, removed)
    rows, scores = indexed.rank(vectors[:1], [ask([3], 5)], vectors, removed)[0]
    assert len(rows) == len(scores) == 0 and len(live_rows(N, removed)) == 0


@st.composite
def cases(draw):
    n = draw(st.integers(1, 25))
    items = st.integers(0, n - 1)
    some = st.none() | st.lists(items, unique=True, max_size=n)
    covered, removed = draw(st.integers(0, n)), draw(st.frozensets(items, max_size=n))
    asks = [ask(draw(st.lists(items, max_size=6)), draw(st.integers(1, 30)), draw(st.booleans()), draw(some),
                draw(some)) for _ in range(draw(st.integers(1, 3)))]
    terms = [Shift([torch.tensor(draw(st.lists(items, unique=True)), dtype=torch.long) for _ in asks],
                   draw(st.sampled_from([1.0, -1.0]))) for _ in range(draw(st.integers(0, 2)))]
    gone = frozenset(i for i in removed if i < covered and draw(st.booleans()))
    return n, covered, removed, gone, asks, terms, draw(st.integers(0, 10**6))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_exact_to_the_last_bit_and_tie(case):
    """Small whole numbers: no rounding, and ties everywhere."""
    n, covered, removed, gone, asks, terms, seed = case
    rng = np.random.default_rng(seed)
    table = torch.tensor(rng.integers(-1, 2, (n, 4)), dtype=torch.float32)
    users = torch.tensor(rng.integers(-1, 2, (len(asks), 4)), dtype=torch.float32)
    index, held = ExactIndex(4), np.array([i for i in range(covered) if i not in gone], dtype=np.int64)
    index.add(held, table.numpy()[held])
    found = Indexed(index, covered, gone).rank(users, asks, table, removed, terms)
    assert [(r.tolist(), s.tolist()) for r, s in found] == by_hand(users, asks, table, removed, terms)
