"""The network that ranks items anew: its scores against a naive form, what it learns in planted cases, its guard."""

from dataclasses import replace

import polars as pl
import pytest
import tiny
import torch
from test_blend import ITEMS, START, planted
from test_finish import DATA, MISSING, SMALL, N, started, started_without

from laserrec.methods.laser import finish, ranker_fit
from laserrec.methods.laser.blend import Blend
from laserrec.methods.laser.finish import choose_blend
from laserrec.methods.laser.ranker import FEATURES, Parts, Ranker, recency
from laserrec.methods.laser.ranker_fit import Inputs, fit_ranker

USERS = 600
HISTORIES = tiny.histories([0, 1, 1, 5], [7], [3, 4, 9, 2, 8, 11], [])
NEW = pl.DataFrame({"title": ["red saw", "blue glue"], "brand": ["redco", None], "category": [None, "tools"]})


def with_ranker(llm, **sections):
    """A Laser with any ranker, whose weights all matter."""
    laser = started(llm, **{**SMALL, **sections}).module
    torch.manual_seed(5)
    laser.ranker = Ranker(N, 9)
    for parameter in laser.ranker.parameters():
        parameter.data.normal_(std=0.5)
    laser.ranker.popularity.copy_(torch.arange(N).float())
    laser.ranker.recency.copy_(torch.rand(N))
    laser.ranker.standardise(torch.randn(50, FEATURES) * 2 + 1)
    return laser.eval().requires_grad_(False)


def naive(laser, histories):
    """All features of all items, through `Ranker.forward`."""
    users, d = laser.users(histories), laser.d_text
    text, ids = users[:, :d] @ laser.vectors[:, :d].T, users[:, d:] @ laser.vectors[:, d:].T
    scores, boosts, seen = text + ids, torch.zeros_like(text), torch.zeros_like(text, dtype=torch.bool)
    if laser.neighbours is not None:
        term = laser.neighbours.on(histories)
        boosts[term.pairs.users, term.pairs.items] = term.values
        scores = term.to_all(scores)
    if laser.seen is not None:
        scores = laser.seen.on(histories).to_all(scores)
    for user, row in enumerate(histories.lists()):
        seen[user, row] = True
    last, last_boosts = torch.zeros_like(users), torch.zeros_like(text)
    for user, row in enumerate(histories.lists()):
        last[user] = laser.vectors[row[-1]] if row else 0.0
        if laser.neighbours is not None and row:
            term = laser.neighbours.on(tiny.histories([row[-1]]))
            last_boosts[user, term.pairs.items] = term.values
    parts = Parts(text, ids, last[:, :d] @ laser.vectors[:, :d].T, last[:, d:] @ laser.vectors[:, d:].T, boosts,
                  last_boosts, seen, laser.ranker.popularities().expand_as(text),
                  laser.ranker.recencies().expand_as(text), histories.lengths[:, None])
    added = laser.ranker(laser.ranker.standardised(parts.features()))
    return scores + laser.ranker.log_temperature.exp() * added


@pytest.mark.parametrize("sections", [
    {}, {"neighbours": {"count": 0}}, {"head": {"whiten_dims": 8, "projection": True}}
], ids=["all", "no neighbours", "text alone"])
def test_scores_are_the_networks(llm, sections):
    laser = with_ranker(llm, **sections)
    laser.add_items(NEW)
    want = naive(laser, HISTORIES)
    assert want.shape == (4, N + 2)
    torch.testing.assert_close(laser.score(HISTORIES), want)
    term, = laser.terms
    users = laser.users(HISTORIES)
    applied, rows = term.on(HISTORIES, users), torch.tensor([N + 1, 3, 0, 9])
    for user in range(4):
        some = applied.to_some(user, rows, users[user] @ laser.vectors[rows].T)
        torch.testing.assert_close(some, want[user, rows])
    laser.drop_items(N)
    torch.testing.assert_close(laser.score(HISTORIES), want[:, :N])


def test_new_items_are_as_popular_as_their_parents(llm):
    laser = with_ranker(llm)
    laser.add_items(NEW.head(1))
    laser.add_items(NEW.tail(1))
    rows, weights = laser.neighbours._parents
    assert len(rows) == 2
    torch.testing.assert_close(laser.ranker.popularities()[N:], (rows * weights).sum(dim=1))
    own = laser.ranker.recency
    torch.testing.assert_close(laser.ranker.recencies(), torch.cat([own, (own[rows] * weights).sum(dim=1)]))


def test_recency_is_the_mean_place_in_the_sequences():
    histories = [[0, 1, 1, 5], [7], [5, 0], [], [3, 4, 0]]
    places = [[] for _ in range(N)]
    for row in histories:
        for place, item in enumerate(row):
            places[item].append((place + 1) / len(row))
    want = [(sum(own) + 0.5) / (len(own) + 1) for own in places]
    torch.testing.assert_close(recency(tiny.histories(*histories), N), torch.tensor(want))


def inputs(found, popularity):
    """With nothing of the newest items in them."""
    none = torch.zeros_like(found.text)
    return Inputs(popularity, torch.zeros(ITEMS), none, none, none)


def crowded(seed: int):
    """The ID part finds the target, but among popular items (the first half) it is loud for no reason: a weighted sum
    of the parts can't tell."""
    found = planted(seed, 0.0, 0.35, 0.0, users=USERS)
    loud = (found.items < ITEMS // 2) & (found.items != found.items[:, :1])
    popularity = torch.where(torch.arange(ITEMS) < ITEMS // 2, 500.0, 5.0)
    return replace(found, ids=found.ids + 0.4 * loud), popularity


def test_it_learns_what_a_weighted_sum_cannot_tell(monkeypatch):
    monkeypatch.setattr(ranker_fit, "_EPOCHS", 30)
    found, popularity = crowded(3)
    blend = Blend(0.9, None, 0.1, 0.0)
    ranker, told = fit_ranker(found, blend, inputs(found, popularity), hidden=8)
    assert ranker is not None and told["kept"] and told["network"] > 1.15 * told["blend"]
    again, same = fit_ranker(found, blend, inputs(found, popularity), hidden=8)
    assert same == told and all(torch.equal(a, b) for a, b in zip(ranker.state_dict().values(),
                                                                  again.state_dict().values(), strict=True))


@pytest.mark.parametrize("told", ["last_text", "last_ids", "last_boosts", "recency"])
def test_it_reads_recency_and_the_newest_item(monkeypatch, told):
    """The blend can't tell the target from others that look like it; what is told of it here can."""
    monkeypatch.setattr(ranker_fit, "_EPOCHS", 30)
    found, popularity = crowded(3)
    noise = torch.randn(found.text.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    said = 0.3 * (found.items == found.items[:, :1]) + noise
    if told == "recency":
        counts = torch.bincount(found.items[:, 0], minlength=ITEMS).float()
        own = replace(inputs(found, popularity), recency=counts / counts.max())
    else:
        own = replace(inputs(found, popularity), **{told: said.clamp(min=0)})
    without, more = (fit_ranker(found, Blend(0.9, None, 0.1, 0.0), each, hidden=8)[1]
                     for each in (inputs(found, popularity), own))
    if told == "last_boosts":  # without neighbours in the blend there are none of the newest item either
        assert more == without
        without, more = (fit_ranker(found, START, each, hidden=8)[1] for each in (inputs(found, popularity), own))
    assert more["network"] > (1.01 if told == "recency" else 1.05) * without["network"]  # targets are spread evenly


def items_trained_on(found, blend):
    """Per user the columns of the candidates that it is trained on, told by their features, and whether it is."""
    _, examples = ranker_fit._prepared(found, blend, inputs(found, torch.rand(ITEMS)), 8)
    few, among = ranker_fit._best(examples, found.seen)
    same = (few.features[:, :, None] == examples.features[:, None]).all(dim=-1)
    same &= few.real[..., None] & examples.real[:, None]
    return [row.nonzero()[:, 1].tolist() for row in same], among.tolist(), examples.scores


def test_it_is_trained_on_seen_items_wherever_the_blend_puts_them(monkeypatch):
    """Behind all others here: it must have learnt to leave them there. They don't crowd out the best unseen ones."""
    monkeypatch.setattr(ranker_fit, "_BEST", 10)
    monkeypatch.setattr(ranker_fit, "_BEST_SEEN", 20)
    found, _ = crowded(3)
    seen = torch.zeros_like(found.seen)
    for user in range(USERS):
        seen[user, 1:1 + user % 26] = True  # up to 25, so that some are left out
    found = replace(found, seen=seen)
    columns, among, scores = items_trained_on(found, Blend(0.9, None, 0.1, -9.0))
    for user, own in enumerate(columns):
        real = [column for column in range(1, scores.shape[1]) if found.real[user, column]]
        best = sorted(real, key=lambda column: -float(scores[user, column]))
        unseen = [column for column in best if not seen[user, column]][:10]
        known = [column for column in best if seen[user, column]][:20]
        assert sorted(own) == sorted([0, *unseen, *known])
        assert among[user] == (len(unseen) < 10 or bool(scores[user, 0] >= scores[user, unseen[-1]]))
    assert len(set(among)) == 2


def test_what_no_user_differs_in_does_not_count(monkeypatch):
    """All validation histories are equally long; when serving, some are shorter."""
    monkeypatch.setattr(ranker_fit, "_EPOCHS", 20)
    found, popularity = crowded(3)
    same = replace(found, lengths=torch.full_like(found.lengths, 50))
    ranker, _ = fit_ranker(same, Blend(0.9, None, 0.1, 0.0), inputs(found, popularity), hidden=8)

    def added(length):
        text, ids = found.weighed(0.9)
        none = torch.zeros_like(text)
        parts = Parts(text, ids, none, none, none, none, found.seen, popularity[found.items], none,
                      torch.full((USERS, 1), length))
        return ranker(ranker.standardised(parts.features()))

    assert added(50).isfinite().all() and added(50).std() > 0
    assert torch.equal(added(3), added(50)) and all(part.isfinite().all() for part in ranker.folded())


def test_it_is_judged_by_users_that_it_was_not_trained_on(monkeypatch):
    trained, shown = [], []
    train, ranked = ranker_fit._train, ranker_fit._ranked
    monkeypatch.setattr(ranker_fit, "_EPOCHS", 1)
    monkeypatch.setattr(ranker_fit, "_train", lambda r, e, own: trained.append(set(own.tolist())) or train(r, e, own))
    monkeypatch.setattr(ranker_fit, "_ranked", lambda r, e: shown.append(len(trained)) or ranked(r, e))
    found, popularity = crowded(3)
    fit_ranker(found, Blend(0.9, None, 0.1, 0.0), inputs(found, popularity), hidden=8)
    there = set(found.found.nonzero()[:, 0].tolist())
    assert shown == [1, 2, 3] and trained[3] == there
    left_out = [there - fold for fold in trained[:3]]
    assert set().union(*left_out) == there and sum(map(len, left_out)) == len(there)


def test_all_cases_of_a_user_are_left_out_together(monkeypatch):
    """After a temporal split a user may have several."""
    trained, train = [], ranker_fit._train
    monkeypatch.setattr(ranker_fit, "_EPOCHS", 10)
    monkeypatch.setattr(ranker_fit, "_FEWEST_USERS", USERS // 3)
    monkeypatch.setattr(ranker_fit, "_train", lambda r, e, own: trained.append(set(own.tolist())) or train(r, e, own))
    found, popularity = crowded(3)
    found = replace(found, who=torch.arange(USERS) // 3 * 5)
    fit_ranker(found, Blend(0.9, None, 0.1, 0.0), inputs(found, popularity), hidden=8)
    everybody = set(range(USERS // 3))
    people = [everybody - {case // 3 for case in fold} for fold in trained[:3]]
    assert found.found.all() and set().union(*people) == everybody and sum(map(len, people)) == len(everybody)
    assert [len(fold) + 3 * len(own) for fold, own in zip(trained[:3], people, strict=True)] == [USERS] * 3
    monkeypatch.setattr(ranker_fit, "_FEWEST_USERS", USERS // 3 + 1)
    assert fit_ranker(found, START, inputs(found, popularity), hidden=8) == (None, {})


def test_it_is_not_kept_where_it_ranks_worse(monkeypatch):
    """A network that has learnt nothing but noise."""
    found, popularity = crowded(3)

    def spoilt(ranker, examples, users):
        ranker.direct.weight.data.fill_(0.0)
        ranker.out.weight.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(100)

    monkeypatch.setattr(ranker_fit, "_train", spoilt)
    ranker, told = fit_ranker(found, START, inputs(found, popularity), hidden=8)
    assert ranker is None and not told["kept"] and told["network"] < told["blend"]


def test_one_that_diverged_is_not_kept(monkeypatch):
    found, popularity = crowded(3)
    monkeypatch.setattr(ranker_fit, "_train", lambda ranker, *_: ranker.direct.weight.data.fill_(torch.nan))
    ranker, told = fit_ranker(found, START, inputs(found, popularity), hidden=8)
    assert ranker is None and told["network"] < 0.1 * told["blend"]


def test_few_users_train_none():
    found, popularity = planted(1, 0.3, 0.3, 0.5, users=100), torch.ones(ITEMS)
    assert fit_ranker(found, START, inputs(found, popularity), hidden=8) == (None, {})


@pytest.mark.parametrize("missing", ["nothing", *MISSING])
def test_the_model_reads_what_the_network_was_trained_on(llm, monkeypatch, missing):
    monkeypatch.setattr(ranker_fit, "_FEWEST_USERS", 10)
    monkeypatch.setattr(ranker_fit, "_worse", lambda gain: False)
    kept, ranked, taken, fit = [], ranker_fit._ranked, [], finish.fit_ranker
    monkeypatch.setattr(ranker_fit, "_ranked", lambda ranker, own: kept.append(own) or ranked(ranker, own))
    monkeypatch.setattr(finish, "fit_ranker", lambda found, *own: taken.append(found) or fit(found, *own))
    blend = {**SMALL["blend"], "network": 4, "users": 60}
    task = started(llm, **{**SMALL, "blend": blend}) if missing == "nothing" else started_without(llm, missing,
                                                                                              blend=blend)
    _, report = choose_blend(task)
    laser, (candidates,) = task.module, taken
    cases = DATA.cases("validation").sample(4000)
    assert report["users"] == 60 < report["network"]["users"] == len(cases), "the network learns from more users"
    want = ranked(laser.ranker, kept[0])
    torch.testing.assert_close(laser.score(cases.histories).gather(1, candidates.items), want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("limit", [10**6, N - 1])
def test_a_fit_ends_with_it_if_the_catalogue_is_not_too_large(llm, monkeypatch, limit):
    monkeypatch.setattr(ranker_fit, "_FEWEST_USERS", 10)
    monkeypatch.setattr(finish, "_RANKED_ITEMS", limit)
    sections = {**SMALL, "blend": {**SMALL["blend"], "network": 4}}
    task = started(llm, DATA, **sections)
    counts = torch.bincount(DATA.train_sequences.items, minlength=N).float()
    _, report = choose_blend(task)
    assert ("network" in report) == (limit > N)
    if "network" in report and report["network"]["kept"]:
        assert torch.equal(task.module.ranker.popularity, counts) and task.module.depth == 500
    else:
        assert task.module.ranker is None and task.module.depth == 0
