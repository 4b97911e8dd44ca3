"""Weighing the parts of a score: what a trial computes, and what is chosen in planted cases."""

from dataclasses import replace

import pytest
import torch

from laserrec.methods.laser.blend import (
    Blend,
    Candidates,
    Cosines,
    choose,
    full_grid,
    gather_candidates,
    search,
    search_guarded,
    shrunken,
    towards_closed_form,
)

USERS, ITEMS = 300, 60
START = Blend(id_share=0.3, share=1.0, temperature=0.1, seen_offset=-0.5)
GRID = full_grid(ids=True, neighbours=True, seen=True)


def planted(seed: int, text: float, ids: float, boosts: float, users: int = USERS) -> Candidates:
    """Cosines of noise, in which the target of each part stands out by as much as is given."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(ITEMS, (users,), generator=g)
    at, noise = (torch.arange(users), targets), [torch.randn(users, ITEMS, generator=g) * 0.1 for _ in range(2)]
    for part, size in zip(noise, (text, ids), strict=True):
        part[at] += size
    weights = torch.rand(users, ITEMS, generator=g).masked_fill_(torch.rand(users, ITEMS, generator=g) < 0.8, 0)
    weights[at] += boosts
    seen = torch.rand(users, ITEMS, generator=g) < 0.05
    seen[at] = False
    text, ids, *parts = gather_candidates(targets, *noise, weights, seen)
    lengths, yes = torch.randint(1, 9, (users,), generator=g), torch.ones(users, dtype=torch.bool)
    some = Cosines(noise[0][:50], noise[1][:50], yes[:50], yes[:50], yes.new_ones(1, ITEMS), yes.new_zeros(1, ITEMS))
    return Candidates(text, ids, yes, yes, yes.new_ones(text.shape), yes.new_zeros(text.shape), *parts, lengths,
                      torch.arange(users), some)


def test_a_users_candidates_are_each_counted_once():
    found = planted(0, 0.1, 0.1, 0.1)
    assert found.real[:, 0].all() and (found.real.sum(dim=1) == ITEMS).all()


@pytest.mark.parametrize("blend", [START, replace(START, share=None), replace(START, id_share=0.0, seen_offset=0.2)])
def test_a_trial_is_the_scores_formula(blend):
    found = planted(1, 0.1, 0.1, 0.5, users=20)
    log_scale = None
    if blend.share is not None:
        sums = [((1 - blend.id_share) * t + blend.id_share * i).div(blend.temperature).exp().sum().log()
                for t, i in zip(found.background.text, found.background.ids, strict=True)]
        log_scale = sum(sums) / len(sums) - torch.tensor(blend.share).log()
    for user in range(20):
        scores = []
        for column in range(found.text.shape[1]):
            score = (1 - blend.id_share) * found.text[user, column] + blend.id_share * found.ids[user, column]
            if log_scale is not None:
                tau = blend.temperature
                score = tau * ((score / tau).exp() + log_scale.exp() * found.boosts[user, column]).log()
            if found.seen[user, column]:
                score = score + blend.seen_offset
            if found.real[user, column]:
                scores.append(float(score))
        rank = 1 + sum(s > scores[0] for s in scores[1:])
        want = 1 / torch.log2(torch.tensor(rank + 1.0)) if rank <= 10 else 0.0
        assert float(found.ndcg(blend)[user]) == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize(("sizes", "expected"), [
    ((0.3, 0.0, 0.0), lambda b: b.id_share < 0.3 and (b.share is None or b.share >= 1)),
    ((0.0, 0.3, 0.0), lambda b: b.id_share > 0.6),
    ((0.0, 0.0, 1.0), lambda b: b.share is not None and b.share < 1),
])
def test_the_part_that_knows_is_trusted(sizes, expected):
    found = planted(2, *sizes)
    best, ndcg = search_guarded(found, START, GRID, 300)
    assert expected(best), best
    fresh = planted(3, *sizes)
    assert fresh.ndcg(best).mean() > fresh.ndcg(START).mean() + 0.01
    torch.testing.assert_close(ndcg, found.ndcg(best))


def test_what_chance_would_choose_is_not_taken():
    """Of few users whose parts are noise alike, a search finds a blend that looks better; on other users it is not."""
    kept = searched = 0
    for seed in range(12):
        found = planted(100 + seed, 0.05, 0.05, 0.05, users=24)
        assert search(found, START, GRID, 300)[1].mean() >= found.ndcg(START).mean()
        searched += search(found, START, GRID, 300)[0] != START
        kept += search_guarded(found, START, GRID, 300)[0] == START
    assert searched >= 10 and kept >= 4, (searched, kept)


def test_the_budget_bounds_the_trials(monkeypatch):
    found, calls, ndcg = planted(4, 0.3, 0.0, 0.0), [], Candidates.ndcg
    monkeypatch.setattr(Candidates, "ndcg", lambda self, blend, k=10: calls.append(1) or ndcg(self, blend, k))
    search(found, START, GRID, 7)
    assert len(calls) == 8
    assert search(found, START, GRID, 0)[0] == START


def test_a_blend_that_is_better_by_chance_alone_is_not_followed():
    found = planted(5, 0.15, 0.15, 0.3)
    best, _ = search(found, START, GRID, 300)
    near = replace(best, id_share=best.id_share + 0.02)
    assert shrunken(found, near, best)[0] == near  # nothing tells the two apart
    far = Blend(id_share=0.9, share=0.001, temperature=0.03, seen_offset=3.0)
    blend, ndcg = shrunken(found, far, best)
    lost = found.ndcg(best) - ndcg
    assert blend != far and lost.mean() <= lost.std() / USERS**0.5
    dropped = replace(best, id_share=0.0, share=None)
    assert (shrunken(found, START, dropped)[0].id_share, shrunken(found, START, dropped)[0].share) == (0.0, None)
    ndcg = shrunken(found, far, best, 0.001)[1]
    assert found.ndcg(best).mean() - ndcg.mean() <= 0.001 * found.ndcg(best).mean()


def test_neighbours_count_more_where_that_costs_next_to_nothing():
    flat, steep = planted(3, 0.1, 0.1, 3.0), planted(4, 0.2, 0.2, 0.0)
    best = Blend(id_share=0.5, share=32.0, temperature=0.1, seen_offset=-0.5)
    for found, moves in ((flat, True), (steep, False)):
        blend, ndcg = towards_closed_form(found, best)
        whole = found.ndcg(best)
        assert (blend.share < best.share) == moves and replace(blend, share=32.0) == best
        assert whole.mean() - ndcg.mean() <= 0.01 * whole.mean()
    for stays in (replace(best, share=None), replace(best, share=1.0)):
        assert towards_closed_form(flat, stays)[0] == stays


@pytest.mark.parametrize("sizes", [(0.1, 0.1, 3.0), (0.2, 0.05, 0.5), (0.05, 0.3, 0.2)])
def test_the_choice_gives_up_no_more_than_the_rules_allow(sizes):
    found = planted(6, *sizes)
    blend, ndcg = choose(found, START, GRID, 300)
    best = search(found, START, GRID, 300)[1]
    assert torch.equal(found.ndcg(blend), ndcg)
    assert best.mean() - ndcg.mean() <= 0.01 * best.mean() + (best - ndcg).std() / USERS**0.5


def test_a_score_without_neighbours_or_ids_stays_without():
    found = planted(7, 0.3, 0.0, 0.0)
    alone = replace(START, share=None, id_share=0.0)
    assert choose(found, alone, full_grid(ids=False, neighbours=False, seen=True), 50)[0].share is None
    no_ids = choose(found, replace(START, id_share=0.0), full_grid(ids=False, neighbours=True, seen=True), 100)[0]
    assert no_ids.id_share == 0.0


def test_other_starts_find_what_the_first_one_misses():
    """Weights that are tried one after another end at a local optimum: here only the further starts know of IDs."""
    found = planted(8, 0.0, 0.4, 0.0)
    grid = {names: values for names, values in GRID.items() if names != ("id_share",)}
    first = replace(START, id_share=0.01)
    assert choose(found, first, grid, 300)[0].id_share > 0.2
    assert choose(found, first, grid, 300)[1].mean() > search(found, first, grid, 300)[1].mean() + 0.1
