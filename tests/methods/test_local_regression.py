"""The regression's local form against the exact one, and what it finds that was planted."""

import numpy as np
import pytest
import tiny
import torch
from scipy import sparse

from laserrec.config import NeighboursConfig
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods import local_regression as module
from laserrec.methods import nearest_text
from laserrec.methods.closed_form import ItemRegression
from laserrec.methods.local_regression import co_occurrence, largest
from laserrec.methods.neighbours import EXACT_ITEMS, Neighbours, _weighted, is_local, regress, sparse_regress

RNG = np.random.default_rng(0)
N = 40
SEQUENCES = tiny.histories(*(RNG.integers(0, N, length).tolist() for length in RNG.integers(1, 9, 120)))
TEXT = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))


def planted(n: int, users: int, seed: int = 0) -> list[list[int]]:
    """Users who mostly go from an item to one of its four partners (rows of the same block of five)."""
    rng, sequences = np.random.default_rng(seed), []
    popular = 1 / np.arange(1, n + 1) ** 0.7
    for _ in range(users):
        rows = [int(rng.choice(n, p=popular / popular.sum()))]
        for _ in range(rng.integers(4, 9)):
            block = rows[-1] // 5 * 5
            rows.append(int(block + rng.integers(5)) if rng.random() < 0.7 else int(rng.integers(n)))
        sequences.append(rows)
    return sequences


@pytest.fixture(params=[4096, 7, 0])
def head(request, monkeypatch):
    """Most frequent items whose co-occurrence is dense: all, some, none."""
    monkeypatch.setattr(module, "_HEAD", request.param)


@pytest.mark.parametrize("settings", [{}, {"row_power": 0.5, "length_power": 0.0}, {"order": 0.6},
                                      {"order": 1.0, "decay": 1.0}])
def test_with_all_items_as_candidates_it_is_the_exact_form(head, settings, monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 3)
    config = NeighboursConfig(**{"l2": 0.7, "text_weight": 2.0, "candidates": 3 * N, **settings})
    got = sparse_regress(SEQUENCES, N, config, TEXT).toarray()
    torch.testing.assert_close(torch.from_numpy(got), regress(SEQUENCES, N, config, TEXT), atol=2e-5, rtol=1e-4)


def test_each_item_s_weights_solve_the_ridge_over_its_candidates(head, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    config = NeighboursConfig(l2=0.7, text_weight=2.0, candidates=9)
    weights = sparse_regress(SEQUENCES, N, config, TEXT).toarray()
    x, unit = _weighted(SEQUENCES, N, config.length_power), torch.nn.functional.normalize(TEXT, dim=-1).numpy()
    gram = (x.T @ x).toarray() + 2.0 * unit @ unit.T
    for item in range(N):
        own = np.flatnonzero(weights[:, item])
        assert 6 <= len(own) <= 9 and item not in own
        want = np.linalg.solve(gram[np.ix_(own, own)] + 0.7 * np.eye(len(own)), gram[own, item])
        np.testing.assert_allclose(weights[own, item], want, atol=2e-5)


def test_candidates_are_the_best_alone_and_the_nearest_by_text():
    config = NeighboursConfig(l2=0.7, text_weight=2.0, candidates=6)
    x = _weighted(SEQUENCES, N, 0.5)
    problem, gram = module._Problem(x, config, TEXT, torch.device("cpu")), (x.T @ x).toarray()
    unit = torch.nn.functional.normalize(TEXT, dim=-1)
    for item in (0, 17, 39):
        alone = gram[item] ** 2 / (gram.diagonal() + 2.7)
        alone[item] = 0
        cosines = unit @ unit[item]
        cosines[item] = -1
        want = {*np.argsort(-alone)[:4].tolist(), *cosines.topk(2).indices.tolist()}
        assert set(problem.candidates(item).tolist()) == want


def test_co_occurrence_keeps_the_largest_of_each_row(monkeypatch):
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 50)  # in many blocks
    x = _weighted(SEQUENCES, N, 0.5)
    want = (x.T @ x).toarray()
    np.fill_diagonal(want, 0)
    np.testing.assert_allclose(co_occurrence(x).toarray(), want, rtol=1e-6)
    few = co_occurrence(x, 3)
    for row in range(N):
        kept = few[[row]].toarray().ravel()
        assert np.count_nonzero(kept) == min(3, np.count_nonzero(want[row]))
        assert sorted(kept[kept > 0]) == pytest.approx(sorted(want[row])[-np.count_nonzero(kept):])


def test_largest_of_sparse_rows():
    matrix = sparse.csr_array(np.array([[0, 3, -5, 1], [0, 0, 0, 0], [2, 0, 0, 0]], np.float32))
    columns, values = largest(matrix, 2)
    assert columns.tolist() == [[1, 3], [0, 0], [0, 0]] and values.tolist() == [[3, 1], [0, 0], [2, 0]]
    columns, values = largest(matrix, 2, magnitude=True)
    assert columns.tolist() == [[2, 1], [0, 0], [0, 0]] and values.tolist() == [[-5, 3], [0, 0], [2, 0]]


def test_the_result_does_not_depend_on_threads():
    config, threads, found = NeighboursConfig(l2=0.7, candidates=9), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(sparse_regress(SEQUENCES, N, config, TEXT).toarray())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*found)


def test_neighbours_of_both_forms_are_alike_where_there_are_candidates_enough():
    settings = {"l2": 0.7, "text_weight": 2.0, "count": 5, "candidates": 3 * N}
    exact, local = (Neighbours(NeighboursConfig(form=form, **settings), N) for form in ("exact", "local"))
    for neighbours in (exact, local):
        neighbours.fit(SEQUENCES, TEXT)
    torch.testing.assert_close(exact.weights, local.weights, atol=2e-5, rtol=1e-4)
    own, other = (torch.zeros(N, N).scatter_add_(1, n.items.long(), n.weights) for n in (exact, local))
    torch.testing.assert_close(own, other, atol=2e-5, rtol=1e-4)


def test_planted_partners_are_found_and_quality_is_that_of_the_exact_form():
    n = 300
    data = tiny.dataset(planted(n, 1500), n)
    ndcg = {}
    for form in ("exact", "local"):
        config = NeighboursConfig(l2=20.0, text_weight=0.0, form=form, candidates=60)
        model = ItemRegression(config, n).fit(data)
        ndcg[form] = evaluate(form, model, data, "test").exclude_seen.ndcg
    assert ndcg["local"] == pytest.approx(ndcg["exact"], rel=0.01) and ndcg["exact"] > 0.2
    neighbours = Neighbours(NeighboursConfig(l2=20.0, text_weight=0.0, form="local", candidates=60, count=4), n)
    neighbours.fit(data.train_sequences, torch.zeros(n, 1))
    frequent = torch.bincount(data.train_sequences.items, minlength=n) >= 20
    partners = neighbours.items // 5 == torch.arange(n)[:, None] // 5
    assert frequent.sum() > 100 and partners[frequent].float().mean() > 0.9


def test_a_model_of_the_local_form_scores_the_sum_of_its_weights():
    config = NeighboursConfig(l2=0.7, text_weight=2.0, form="local", candidates=3 * N)
    data = tiny.dataset(SEQUENCES.lists(), N)
    local = ItemRegression(config, N).fit(data, TEXT)
    exact = ItemRegression(config.model_copy(update={"form": "exact"}), N).fit(data, TEXT)
    asked = tiny.histories([1, 7, 3], [5], [2, 2, 9])
    torch.testing.assert_close(local.score(asked), exact.score(asked), atol=1e-4, rtol=1e-4)
    few = ItemRegression(config.model_copy(update={"candidates": 5}), N).fit(data)
    assert few.weights.shape == few.items.shape == (N, 5)


def test_auto_goes_by_the_number_of_items_alone():
    assert [is_local(NeighboursConfig(), n) for n in (EXACT_ITEMS, EXACT_ITEMS + 1)] == [False, True]
    assert is_local(NeighboursConfig(form="local"), 3) and not is_local(NeighboursConfig(form="exact"), 10**6)


def test_a_graph_finds_nearly_all_of_the_nearest(monkeypatch):
    pytest.importorskip("usearch")
    unit = torch.nn.functional.normalize(torch.randn(500, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    exact = nearest_text.nearest(unit, 10)
    want = (unit @ unit.T - 2 * torch.eye(500)).topk(10).indices.tolist()
    assert [set(row) for row in exact.tolist()] == [set(row) for row in want]
    monkeypatch.setattr(nearest_text, "_COMPARED", 100)
    found = nearest_text.nearest(unit, 10)
    hits = np.mean([len({*row} & {*want}) / 10 for row, want in zip(found.tolist(), exact.tolist(), strict=True)])
    assert found.shape == (500, 10) and hits > 0.95 and not (found == np.arange(500)[:, None]).any()
