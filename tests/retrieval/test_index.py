"""One contract for every index, and what only the exact one promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laserrec.retrieval import exact as module
from laserrec.retrieval.exact import ExactIndex
from laserrec.retrieval.folder import make_index
from laserrec.retrieval.index import IndexKind, recall
from laserrec.util.errors import UserError

D = 12


def unit(n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def naive(ids, vectors, query, k, allowed=None, excluded=()):
    rows = [(-float(v @ query), int(i)) for i, v in zip(ids, vectors, strict=True)
            if (allowed is None or i in allowed) and i not in excluded]
    return [i for _, i in sorted(rows)[:k]]


@pytest.fixture(params=list(IndexKind))
def filled(request):
    ids, vectors = np.arange(80) * 3, unit(80)
    index = make_index(request.param, D)
    index.add(ids, vectors)
    return index, ids, vectors


def rows(found):
    return [[int(i) for i in row if i >= 0] for row in found[0]]


def test_the_nearest_best_first(filled):
    index, ids, vectors = filled
    queries = unit(7, seed=1)
    found = index.search(queries, 5)
    assert found[0].shape == found[1].shape == (7, 5) and found[0].dtype == np.int64
    assert rows(found) == [naive(ids, vectors, q, 5) for q in queries]
    want = np.sort(queries @ vectors.T, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(found[1], want, atol=1e-5)


def test_filters(filled):
    index, ids, vectors = filled
    queries, allowed = unit(3, seed=2), set(ids[::4].tolist()) | {999}
    excluded = [{3, 6}, set(), set(ids[:40].tolist())]
    got = index.search(queries, 6, allowed=allowed)
    assert rows(got) == [naive(ids, vectors, q, 6, allowed) for q in queries]
    got = index.search(queries, 6, excluded=excluded)
    assert rows(got) == [naive(ids, vectors, q, 6, None, gone) for q, gone in zip(queries, excluded, strict=True)]
    got = index.search(queries, 6, allowed=allowed, excluded=excluded)
    assert rows(got) == [naive(ids, vectors, q, 6, allowed, gone) for q, gone in zip(queries, excluded, strict=True)]


def test_nearly_all_excluded(filled):
    index, ids, vectors = filled
    queries, left = unit(3, seed=6), [set(ids[:2].tolist()), set(ids[40:45].tolist()), set()]
    excluded = [set(ids.tolist()) - own for own in left]
    got = index.search(queries, 4, excluded=excluded)
    assert rows(got) == [naive(ids, vectors, q, 4, None, gone) for q, gone in zip(queries, excluded, strict=True)]
    assert [len(row) for row in rows(got)] == [2, 4, 0]


def test_fewer_than_k_and_nothing_at_all(filled):
    index, ids, _ = filled
    found = index.search(unit(2), 100)
    assert sorted(rows(found)[0]) == ids.tolist()
    assert (found[0][:, 80:] == -1).all() and np.isneginf(found[1][:, 80:]).all()
    empty = make_index(index.kind, D)
    assert len(empty) == 0 and (empty.search(unit(2), 3)[0] == -1).all()
    assert (index.search(unit(2), 3, allowed=[])[0] == -1).all()
    assert index.search(np.zeros((0, D), np.float32), 3)[0].shape == (0, 3)


def test_wrong_vectors_and_k(filled):
    index, _, _ = filled
    with pytest.raises(ValueError, match="not \\(n, 12\\)"):
        index.search(np.zeros((2, 5), np.float32), 3)
    with pytest.raises(ValueError, match="k is 0"):
        index.search(unit(1), 0)


def test_only_the_exact_kind_takes_vectors_of_any_length():
    long = unit(4) * np.array([[1], [1.001], [2.5], [0]], dtype=np.float32)
    for kind in (IndexKind.USEARCH, IndexKind.QDRANT):
        index = make_index(kind, D)
        index.add(np.arange(2), long[:2])
        for row, length in ((2, "2.5"), (3, "0")):
            with pytest.raises(UserError, match=f"{kind} needs vectors of length 1 and that of row {row} has length "
                                                f"{length}; .*use kind exact, which takes any"):
                index.add(np.array([row]), long[row : row + 1])
    exact = ExactIndex(D)
    exact.add(np.arange(4), long)
    found, products = exact.search(unit(1), 4)
    order = np.argsort(-(long @ unit(1)[0]), kind="stable")
    assert found[0].tolist() == order.tolist()
    np.testing.assert_allclose(products[0], (long @ unit(1)[0])[order], atol=1e-6)


def test_recall_is_one_when_the_same_is_found_and_less_when_not(filled):
    index, ids, vectors = filled
    exact = ExactIndex(D)
    exact.add(ids, vectors)
    assert recall(*(each.search(unit(20, seed=4), 10)[0] for each in (index, exact))) == pytest.approx(1.0)
    half = make_index(index.kind, D)
    half.add(ids[40:], vectors[40:])
    assert recall(*(each.search(unit(20, seed=4), 10)[0] for each in (half, exact))) < 0.9


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_exact_is_a_stable_sort_whatever_the_ties(n, k, seed):
    """Few distinct values, so that ties are everywhere, at the k-th place too."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (n, D)).astype(np.float32)
    ids = rng.permutation(100)[:n]
    exact = ExactIndex(D)
    exact.add(ids, vectors)
    query = rng.integers(-1, 2, (1, D)).astype(np.float32)
    assert rows(exact.search(query, k))[0] == naive(ids, vectors, query[0], k)


def test_memory_is_bounded_and_chunks_change_nothing(monkeypatch):
    exact = ExactIndex(D)
    exact.add(np.arange(300), unit(300))
    whole = exact.search(unit(50, seed=5), 7)
    sizes = []
    top = module.top
    monkeypatch.setattr(module, "rows_at_once", lambda n_items, wanted: 8)
    monkeypatch.setattr(module, "top", lambda scores, rows, k: sizes.append(len(scores)) or top(scores, rows, k))
    parts = exact.search(unit(50, seed=5), 7)
    assert sizes == [300] * 50
    np.testing.assert_array_equal(parts[0], whole[0])


def test_the_rest_of_a_short_answer_is_nothing(monkeypatch):
    """A graph may reach fewer items than it holds; usearch leaves rubbish behind those that it found."""
    from types import SimpleNamespace

    index = make_index(IndexKind.USEARCH, D)
    index.add(np.arange(1, 9), unit(8))
    few = SimpleNamespace(keys=np.array([[3, 0, 7], [1, 2, 5]], dtype=np.uint64), counts=np.array([1, 3]),
                          distances=np.zeros((2, 3), np.float32))
    monkeypatch.setattr(index, "_index", SimpleNamespace(search=lambda queries, count: few))
    ids, scores = index._nearest(unit(2), 4)
    assert ids.tolist() == [[3, -1, -1, -1], [1, 2, 5, -1]] and np.isneginf(scores[0, 1:]).all()


def test_a_missing_library_names_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(UserError, match=r"laserrec\[usearch\]"):
        make_index(IndexKind.USEARCH, D)
