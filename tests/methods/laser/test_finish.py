"""The end of a fit: Laser's parts are weighed on validation, and the model then scores as was found."""

import numpy as np
import pytest
import tiny
import torch

from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.laser import finish
from laserrec.methods.laser.blend import Blend
from laserrec.methods.laser.finish import choose_blend
from laserrec.methods.laser.task import LaserTask
from laserrec.methods.neighbours import Neighbours

N = 20


def walks(users: int) -> Dataset:
    """Users who walk up the catalogue and jump elsewhere half of the time."""
    draw, rows = np.random.default_rng(0), []
    for _ in range(users):
        row = [int(draw.integers(N))]
        for _ in range(draw.integers(4, 8)):
            row.append((row[-1] + 1) % N if draw.random() < 0.5 else int(draw.integers(N)))
        rows.append(row)
    return tiny.dataset(rows, N)


DATA = walks(70)
SMALL = {"prompt": {"layout": "text_first", "item_side": "mean", "max_item_tokens": 8},
         "head": {"projection": True, "whiten_dims": 8, "seen_offset": True, "id_share": 0.3, "id_product": True},
         "neighbours": {"count": 6, "l2": 1.0}, "blend": {"trials": 200, "regressions": 3}}
INSTANT = {"prompt": {"layout": "none", "item_side": "mean"}, "head": {"whiten_dims": 8, "seen_offset": True},
           "neighbours": {"count": 6, "l2": 1.0}, "train": {"stage_one_epochs": 0, "stage_two_epochs": 0},
           "blend": {"trials": 200, "regressions": 3}}


def started(llm, data=DATA, **sections) -> LaserTask:
    task = LaserTask(tiny.laser(llm(), n=N, **sections), data, tiny.World(), fixed=False)
    task.start(lambda: None)
    task.module.eval()
    return task


@pytest.mark.parametrize("sections", [SMALL, INSTANT], ids=["small", "instant"])
def test_the_model_scores_as_was_found(llm, sections):
    task = started(llm, **sections)
    given = evaluate("given", task.module, DATA, "validation").plain.ndcg
    config, report = choose_blend(task)
    found = report["ndcg@10"]
    assert report["users"] == 70 and found["given"] == pytest.approx(given, abs=2e-3)
    assert found["chosen"] == pytest.approx(evaluate("chosen", task.module, DATA, "validation").plain.ndcg, abs=2e-3)
    assert found["chosen"] >= found["given"]
    assert "without neighbours" in found and found["without neighbours"] <= found["chosen"] + 1e-6
    chosen, laser = report["chosen"], task.module
    assert config is laser.config and config.head.id_share == laser.id_share == chosen["id_share"]
    assert config.neighbours.share == chosen["share"] and config.neighbours.l2 == chosen["l2"]
    assert laser.seen.offset.item() == pytest.approx(chosen["seen_offset"])
    again = started(llm, **sections)
    assert choose_blend(again)[1] == report


MISSING = ["all texts", "some texts", "some IDs"]


def test_without_validation_nothing_is_chosen(llm):
    task = started(llm, **{**SMALL, "eval": {"validates": False}})
    before = {name: tensor.clone() for name, tensor in task.module.state_dict().items()}
    config, report = choose_blend(task)
    assert report == {} and config is task.module.config
    assert all(torch.equal(before[name], tensor) for name, tensor in task.module.state_dict().items())


def started_without(llm, missing: str, **sections) -> LaserTask:
    """Where items, and users who read them alone, lack a part; nothing stands beside the sum of the history's items."""
    task = LaserTask(tiny.laser(llm(), n=N, **{**SMALL, "prompt": INSTANT["prompt"], "mformer": {"prefix": "none"},
                                               **sections}), DATA, tiny.World(), fixed=False)
    means = task.module.item_side.means
    if missing == "all texts":
        means.copy_(means[:1].clone())
    elif missing == "some texts":
        means[::3] = torch.nan  # as of items without vectors of their own
    else:
        task.module.ids._known[::3] = False
    task.start(lambda: None)
    task.module.eval()
    return task


@pytest.mark.parametrize("missing", MISSING)
def test_the_model_scores_as_was_found_where_parts_are_missing(llm, missing):
    task = started_without(llm, missing)
    given = evaluate("given", task.module, DATA, "validation").plain.ndcg
    found = choose_blend(task)[1]["ndcg@10"]
    assert found["given"] == pytest.approx(given, abs=1e-5)
    assert found["chosen"] == pytest.approx(evaluate("chosen", task.module, DATA, "validation").plain.ndcg, abs=1e-5)


def test_a_dropped_part_costs_nothing(llm, monkeypatch):
    """Whatever the search says is done: here, cosines of the texts alone."""
    task = started(llm, **SMALL)
    laser, rows = task.module, tiny.histories([0, 1], [7], [3, 4, 9])
    texts = torch.nn.functional.normalize(laser.user_side.text(rows)[0], dim=-1)
    want = (texts @ torch.nn.functional.normalize(laser.vectors[:, : laser.d_text], dim=-1).T).detach()

    def settled(found, start, grid, trials):
        return Blend(0.0, None, start.temperature, 0.0), found.ndcg(start)

    monkeypatch.setattr(finish, "search", settled)
    monkeypatch.setattr(finish, "choose", settled)
    config, _ = choose_blend(task)
    assert config.neighbours.count == 0 and config.head.id_share == 0 and laser.neighbours is None
    assert laser.vectors.shape == (N, laser.d_text) == (N, laser.d_out)
    torch.testing.assert_close(laser.score(rows), want)


def test_nothing_is_chosen_without_trials_or_of_few_users(llm):
    for data, sections in ((DATA, {**SMALL, "blend": {}}), (walks(20), SMALL)):
        task = started(llm, data, **sections)
        before = task.module.score(tiny.histories([0, 1], [7]))
        config, report = choose_blend(task)
        assert report == {} and config is task.module.config
        assert torch.equal(before, task.module.score(tiny.histories([0, 1], [7])))


def test_the_test_split_is_never_asked_for(llm, monkeypatch):
    task, asked, cases = started(llm, **SMALL), [], Dataset.cases
    monkeypatch.setattr(Dataset, "cases", lambda self, split: asked.append(split) or cases(self, split))
    choose_blend(task)
    assert set(asked) == {"validation"}


def test_the_regression_climbs_to_what_is_better_within_its_budget(llm, monkeypatch):
    """Walks have an order, which items that merely stand together don't show."""
    fits, fit = [], Neighbours.fit
    monkeypatch.setattr(Neighbours, "fit", lambda self, *own: fits.append(self.config) or fit(self, *own))
    given = {**INSTANT, "neighbours": {"count": 6, "l2": 1.0, "share": 0.01},
             "blend": {"trials": 50, "regressions": 40}}
    task = started(llm, walks(400), **given)
    first, chosen = len(fits), choose_blend(task)[1]["chosen"]
    assert chosen["order"] > 0
    assert first < len(fits) <= first + 40
    for count in (0, 2):
        task = started(llm, walks(400), **{**given, "blend": {"trials": 50, "regressions": count}})
        first = len(fits)
        choose_blend(task)
        assert len(fits) == first + count


def test_rungs_both_ways():
    assert finish._both_ways((1.0, 2.0, 4.0, 8.0), 2.0) == ([4.0, 8.0], [1.0])
    assert finish._both_ways((8.0, 4.0, 2.0, 1.0), 2.0) == ([1.0], [4.0, 8.0])
    assert finish._both_ways((8.0, 4.0), 5.0) == ([4.0], [8.0])
