"""Laser put together: scores as shares and terms, mean items, new items, and no part that is not needed."""

import numpy as np
import polars as pl
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.config import Config, Layout, StudentConfig
from laserrec.llm.text_features import whitened
from laserrec.methods.laser.build import compose, restore, shapes
from laserrec.methods.laser.sides import ReadUsers, StudentUsers, SummedUsers
from laserrec.methods.laser.task import LaserTask
from laserrec.methods.neighbours import regress
from laserrec.util.distributed import World

cosine = F.cosine_similarity
ROWS = tiny.histories([0, 1, 2], [6], [3, 8, 1, 4, 7], [10, 11])
MEAN = {"prompt": {"layout": "text_first", "item_side": "mean", "max_items": 4, "max_item_tokens": 8},
        "head": {"whiten_dims": 8, "projection": True, "id_share": 0.3, "seen_offset": True},
        "neighbours": {"count": 6, "l2": 1.0, "text_weight": 1.0}}
INSTANT = {"id_model": {"kind": "none"}, "prompt": {"layout": "none", "item_side": "mean"},
           "mformer": {"prefix": "none"}, "head": {"whiten_dims": 8},
           "train": {"stage_one_epochs": 0, "stage_two_epochs": 0}}


def started(llm, n: int = 20, **sections):
    """A Laser as it is before its first epoch, and its data."""
    laser, data = tiny.laser(llm(), n=n, **sections), tiny.planted(n, 40)
    task = LaserTask(laser, data, World(), fixed=False)
    task.start(lambda: None)
    return laser.eval(), data


@pytest.mark.parametrize("layout", [Layout.PREFIX_FIRST, Layout.TEXT_FIRST])
def test_items_are_histories_of_themselves(llm, layout):
    laser = tiny.laser(llm(), prompt={"layout": layout}).eval()
    with torch.no_grad():
        each = laser.reader.read(tiny.histories(*([i] for i in range(12))))[0]
    torch.testing.assert_close(laser.item_outputs(torch.arange(12)), each, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scores_weight_text_and_id_by_their_shares(llm):
    text, both = (started(llm, n=12, head={"id_share": share})[0] for share in (0.0, 0.3))
    ids = both.ids
    want = 0.7 * text.score(ROWS) + 0.3 * torch.stack(
        [cosine(ids.user(ROWS), item[None]) for item in ids.item(torch.arange(12))], dim=1)
    torch.testing.assert_close(both.score(ROWS), want, rtol=1e-4, atol=1e-4)
    assert both.d_out == text.d_out + 16 == both.vectors.shape[1]


@torch.no_grad()
def test_an_item_or_user_the_id_model_does_not_know_is_compared_by_text(llm):
    laser = tiny.laser(llm(), n=12, n_known=9, head={"id_share": 0.4}).eval()
    a, b, none, known = torch.randn(6, 32), torch.randn(6, 32), torch.zeros(6, 16), torch.randn(6, 16)
    torch.testing.assert_close(cosine(laser._joined(a, none), laser._joined(b, none)), cosine(a, b))
    # One side it knows beside one it doesn't: the text alone, and never more than the text's share allows.
    torch.testing.assert_close(cosine(laser._joined(a, known), laser._joined(b, none)), 0.6**0.5 * cosine(a, b))
    assert not laser.ids.user(tiny.histories([9, 11])).any() and not laser.ids.item(torch.tensor([9])).any()
    torch.testing.assert_close(laser.ids.user(tiny.histories([0, 10, 1]))[0],
                               laser.ids.model.next_item_state(torch.tensor([[0, 1]]))[0])
    assert torch.equal(laser.ids.item(torch.tensor([2]))[0], laser.ids.model.item_embeddings()[2])


@torch.no_grad()
def test_an_untrained_user_is_the_weighted_sum_of_her_items(llm):
    laser, _ = started(llm, **MEAN)
    kept = whitened(laser.item_side.means, 1)[:, :8]
    unit = F.normalize(kept, dim=-1)
    want = F.normalize(unit[4] + 0.8 * unit[6] + 0.64 * unit[2], dim=-1) @ unit.T
    user = F.normalize(laser.users(tiny.histories([2, 6, 4]))[:, :8], dim=-1)
    torch.testing.assert_close((user @ F.normalize(laser.vectors[:, :8], dim=-1).T)[0], want, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_scores_are_cosines_then_neighbours_then_the_seen_offset(llm):
    laser, data = started(llm, **MEAN)
    histories = data.cases("test").histories.take(range(5))
    cosines, scores = laser.users(histories) @ laser.vectors.T, laser.score(histories)
    weights = regress(data.train_sequences, 20, laser.config.neighbours, whitened(laser.item_side.means, 1))
    top = weights.topk(6, dim=1)
    kept = torch.zeros_like(weights).scatter(1, top.indices, top.values.clamp(min=0))
    tau, scale = laser.config.neighbours.temperature, laser.neighbours.log_scale.exp()
    for row, history in enumerate(histories.lists()):
        boost, seen = torch.zeros(20), set()
        for age, item in enumerate(reversed(history)):
            if item not in seen:
                boost += 0.8**age * kept[item]
                seen.add(item)
        want = tau * torch.log((cosines[row] / tau).exp() + scale * boost)
        own = torch.tensor(sorted(seen))
        want[own] = cosines[row, own] + laser.seen.offset
        torch.testing.assert_close(scores[row], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sections", [{}, {"prompt": {"layout": "text_first"}}, MEAN, {**INSTANT, "neighbours": {
    "count": 4}}])
@torch.no_grad()
def test_added_items_leave_the_others_alone_and_can_be_dropped_again(llm, sections):
    laser, _ = started(llm, **sections)
    scores = laser.score(ROWS)
    new = tiny.items(23).tail(3)
    vectors = laser.add_items(new)
    assert len(laser.vectors) == 23 and vectors.shape == (3, laser.d_out)
    torch.testing.assert_close(laser.score(ROWS)[:, :20], scores, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(laser.score(tiny.histories([21, 3], [22]))).all()
    laser.drop_items(20)
    torch.testing.assert_close(laser.score(ROWS), scores)
    again = laser.add_items(new, vectors)  # nothing is encoded this time
    assert again is vectors or torch.equal(again, vectors)


@torch.no_grad()
def test_a_failed_addition_leaves_nothing_behind(llm, monkeypatch):
    laser, _ = started(llm, **MEAN)
    before = laser.score(ROWS)
    monkeypatch.setattr(laser, "embed_items", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        laser.add_items(tiny.items(22).tail(2))
    assert len(laser.vectors) == len(laser.item_side.means) == len(laser.texts) == 20
    torch.testing.assert_close(laser.score(ROWS), before)


@torch.no_grad()
def test_a_new_twin_of_an_item_is_scored_like_it(llm):
    laser, _ = started(llm, **MEAN)
    twin = tiny.items(20).filter(pl.col("item") == 6).with_columns(item_id=pl.lit("twin"))
    laser.add_items(twin)
    scores, plain = laser.score(tiny.histories([5]))[0], (laser.users(tiny.histories([5])) @ laser.vectors.T)[0]
    assert scores[20] > plain[20] + 1e-4, "its parents' neighbours boost it"
    assert abs(scores[20] - scores[6]) < 0.2 * (scores.max() - scores.min())
    seen_twin = laser.score(tiny.histories([6]))[0]
    assert seen_twin[20] > laser.users(tiny.histories([6]))[0] @ laser.vectors[20] + 1e-4


def test_compositions_hold_what_they_need_and_no_more(llm):
    paper, small, instant = (tiny.laser(llm(), **s) for s in ({}, MEAN, INSTANT))
    assert isinstance(paper.user_side, ReadUsers) and paper.item_side.trained and not paper.terms
    assert isinstance(small.user_side, SummedUsers) and small.added is not None and len(small.terms) == 2
    assert instant.reader is None and instant.texts is None and not list(instant.parameters())
    tree = small.config.model_copy(update={"student": StudentConfig(hidden=4)})
    means = small.item_side.means
    distilled = compose(tree, tiny.items(12), 12, tiny.features(llm(), tree), tiny.id_model(12), means)
    assert isinstance(distilled.user_side, StudentUsers) and distilled.reader is None


def test_what_is_restored_scores_alike_and_no_llm_is_loaded_for_what_reads_no_history(llm, monkeypatch):
    laser, _ = started(llm, **INSTANT)
    features = tiny.features(llm(), laser.config)
    features._loaded = None
    monkeypatch.setattr("laserrec.llm.text_features.load_backbone", lambda *a, **k: pytest.fail("the LLM was loaded"))
    again = restore(laser.config, tiny.items(20), 20, features, None, laser.state_dict(), laser.item_tensors())
    torch.testing.assert_close(again.score(ROWS), laser.score(ROWS))


def test_weights_that_do_not_fit_are_refused(llm):
    laser, _ = started(llm, **MEAN)
    kept, weights = laser.item_tensors(), laser.state_dict()
    features = tiny.features(llm(), laser.config)
    for wrong in ({**kept, "vectors": kept["vectors"][:5]}, {**kept, "means": kept["means"][:5]}):
        with pytest.raises(RuntimeError):
            restore(laser.config, tiny.items(20), 20, features, tiny.id_model(20), weights, wrong)
    with pytest.raises(RuntimeError, match=r"network of this version reads \d+ features, this one 7"):
        restore(laser.config, tiny.items(20), 20, features, tiny.id_model(20),
                {**weights, "ranker.hidden.weight": torch.zeros(32, 7)}, kept)
    claimed = shapes(laser.config, 20)
    assert {name: tuple(weights[name].shape) for name in claimed} == claimed and len(claimed) == 3


def test_settings_that_make_no_sense(llm_folder):
    tree = tiny.config(llm_folder()).model_dump()
    for prompt, message in (({"item_side": "mean"}, r"head\.projection"), ({"layout": "none"}, "item_side mean")):
        with pytest.raises(ValueError, match=message):
            Config.model_validate({**tree, "prompt": {**tree["prompt"], **prompt}})
    for settings, message in (({"mean_layers": (3, 1)}, r"must ascend .* given \[3, 1\]"),
                              ({"mean_layers": (0, 1)}, r"from 1 or more; given \[0, 1\]"),
                              ({"mean_layers": (1,), "shard": True}, r"mean_layers = \[\]")):
        with pytest.raises(ValueError, match=message):
            Config.model_validate({"backbone": settings})


LIGHT = {**MEAN, "prompt": {"layout": "none", "item_side": "mean"}, "mformer": {"prefix": "none"},
         "transformer": {"blocks": 1, "d_model": 16, "heads": 2, "d_inner": 16, "max_history": 4}}


@torch.no_grad()
def test_a_transformer_over_the_items_starts_at_nothing_and_then_reads_their_order(llm):
    laser, _ = started(llm, **LIGHT)
    assert laser.reader is None and laser.texts is None
    one, other, empty = tiny.histories([2, 6, 4]), tiny.histories([6, 2, 4]), tiny.histories([])
    sums = laser.user_side.sums_alone()
    torch.testing.assert_close(laser.user_side.text(one)[0], sums.text(one)[0])
    laser.transformer.map.weight.normal_()
    added = [laser.user_side.text(rows)[0] - sums.text(rows)[0] for rows in (one, other, empty)]
    assert (added[0] - added[1]).abs().max() > 1e-3 and not added[2].any()
    batch = laser.user_side.text(tiny.histories([2, 6, 4], [], [1], [9, 9, 9, 2, 6, 4]))[0]
    alone = [laser.user_side.text(tiny.histories(row))[0][0] for row in ([2, 6, 4], [], [1], [9, 9, 9, 2, 6, 4])]
    torch.testing.assert_close(batch, torch.stack(alone), atol=1e-5, rtol=1e-4)
    long, newest = (laser.transformer(tiny.histories(row), laser.user_side._white)
                    for row in ([7, 9, 9, 9, 2, 6, 4], [9, 2, 6, 4]))
    torch.testing.assert_close(long, newest)  # of which it reads four


def test_a_transformer_is_trained_saved_and_claimed(llm):
    laser, data = started(llm, **LIGHT)
    task = LaserTask(laser, data, World(), fixed=False)
    task.outputs = laser.item_side.means
    batch = task.begin_epoch(1).batch(np.arange(16))
    optimizer = torch.optim.SGD(laser.parameters(), lr=0.1)
    for _ in range(2):  # at first the map is zero, and hides what is in front of it
        optimizer.zero_grad()
        task.loss(batch, np.arange(16))["loss"].backward()
        optimizer.step()
    assert laser.transformer.enter.weight.grad.abs().max() > 0
    laser.eval().requires_grad_(False)
    assert laser.transformer.map.weight.abs().max() > 0
    weights = dict(laser.state_dict())
    claimed = shapes(laser.config, 20)
    assert "transformer.encoder.position.weight" in claimed
    assert {name: tuple(weights[name].shape) for name in claimed} == claimed
    again = restore(laser.config, data.items, 20, laser.features, laser.ids.model, weights, laser.item_tensors())
    torch.testing.assert_close(again.score(ROWS), laser.eval().score(ROWS))


def test_where_the_llm_reads_histories_no_transformer_is_claimed(llm):
    laser, _ = started(llm, **{**LIGHT, "prompt": MEAN["prompt"], "mformer": {}})
    claimed, weights = shapes(laser.config, 20), dict(laser.state_dict())
    assert laser.transformer is None and laser.config.transformer.blocks == 1
    assert {name: tuple(weights[name].shape) for name in claimed} == claimed
