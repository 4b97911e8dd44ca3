"""What Laser's two stages train on, and that they learn."""

import math

import numpy as np
import pytest
import tiny
import torch

from laserrec.config import Cuts, IdModelConfig
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.closed_form import Popularity
from laserrec.methods.laser import task as module
from laserrec.methods.laser.examples import LaserExamples, epoch_examples
from laserrec.methods.laser.readers import Reader
from laserrec.methods.laser.task import LaserTask
from laserrec.methods.protocol import Phase
from laserrec.methods.sasrec import SASRec
from laserrec.methods.sequence_task import SequenceTask
from laserrec.training.trainer import Pace, Trainer
from laserrec.training.watch import read_training

N = 20


def examples(rows, cuts: Cuts, seed: tuple[int, ...]) -> list[tuple[list[int], int]]:
    sequences = tiny.histories(*rows)
    of, cut = epoch_examples(sequences, cuts, seed)
    batch = LaserExamples(sequences, of, cut, np.ones(len(of), dtype=np.int64), 0.0).batch(np.arange(len(of)))
    return list(zip(batch.histories.lists(), batch.targets.tolist(), strict=True))


def test_all_cuts_are_every_position_with_a_history():
    assert examples([[5, 6, 7], [9], [2, 3]], Cuts.ALL, (0,)) == [([5], 6), ([5, 6], 7), ([2], 3)]


def test_random_cuts_are_one_a_user_and_new_each_epoch():
    rows = [list(range(1, 9)) for _ in range(20)] + [[3]]
    first, again, later = (examples(rows, Cuts.RANDOM, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert len(first) == 20 and first == again != later
    assert {t for _, t in first} <= set(range(2, 9)) and len({t for _, t in first}) > 3
    assert all(history == list(range(1, target)) for history, target in first)


@pytest.mark.parametrize("cuts", Cuts)
def test_an_epoch_has_at_most_so_many_examples_drawn_anew(cuts):
    sequences = tiny.histories(*(list(range(9)) for _ in range(20)))
    everything = set(zip(*(x.tolist() for x in epoch_examples(sequences, Cuts.ALL, (0, 1))), strict=True))
    first, again, later = (epoch_examples(sequences, cuts, seed, 12) for seed in ((0, 1), (0, 1), (0, 2)))
    drawn = [set(zip(*(x.tolist() for x in e), strict=True)) for e in (first, again, later)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 12 and drawn[0] <= everything
    assert len(epoch_examples(sequences, cuts, (0, 1), 1000)[0]) == (160 if cuts == Cuts.ALL else 20)


@pytest.mark.parametrize("cuts", Cuts)
def test_an_epoch_reads_about_so_many_items(cuts):
    sequences = tiny.histories(*(list(range(9)) for _ in range(50)))
    _, cut = epoch_examples(sequences, cuts, (0, 1), None, 60, 4)
    assert abs(int(cut.clamp(max=4).sum()) - 60) <= 15
    assert len(epoch_examples(sequences, cuts, (0, 1), 10, 60, 4)[0]) == 10  # both bounds hold
    assert len(epoch_examples(sequences, cuts, (0, 1), None, 10_000, 4)[0]) == (400 if cuts == Cuts.ALL else 50)


def test_lengths_are_what_the_llm_reads(llm):
    laser, data = tiny.laser(llm(), n=N, prompt={"max_items": 3}), tiny.planted(N, 20)
    given = LaserTask(laser, data, tiny.World(), fixed=False).begin_epoch(1)
    batch = given.batch(np.arange(len(given.lengths)))
    texts = laser.texts.texts(batch.histories, as_item=False)
    assert given.lengths.tolist() == [len(text) + 2 + 1 for text in texts]  # prefix of two, suffix


def held_out_apart() -> Dataset:
    """Rows 10-14 are validation's alone, 15-19 test's alone."""
    rng = np.random.default_rng(0)
    return tiny.dataset([[*rng.integers(0, 10, 4).tolist(), 10 + u % 5, 15 + u % 5] for u in range(30)], N)


@pytest.mark.parametrize("layout", ["prefix_first", "text_first"])
def test_no_held_out_item_is_in_a_training_step(llm, tmp_path, monkeypatch, layout):
    targets, histories = [], []
    contrast, read = module.item_contrast, Reader.read

    def spy_contrast(users, items, wanted, *rest):
        assert items.shape[0] == N  # every item is a negative
        targets.extend(wanted.tolist())
        return contrast(users, items, wanted, *rest)

    def spy_read(self, rows, hide=None):
        if self.training:
            histories.extend(rows.items.tolist())
        return read(self, rows, hide)

    monkeypatch.setattr(module, "item_contrast", spy_contrast)
    monkeypatch.setattr(Reader, "read", spy_read)
    tiny.trainer(llm(), tmp_path, held_out_apart(), prompt={"layout": layout}).run()
    assert len(targets) == 3 * 90  # three epochs, every position but each user's first
    assert max(targets) < 10 and max(histories) < 10 and histories


def test_the_test_split_is_never_asked_for(llm, tmp_path, monkeypatch):
    asked, cases = [], Dataset.cases
    monkeypatch.setattr(Dataset, "cases", lambda self, split: asked.append(split) or cases(self, split))
    tiny.trainer(llm(), tmp_path).run()
    assert set(asked) == {"validation"}


def test_other_test_items_give_the_same_model(llm, tmp_path):
    a = held_out_apart()
    rows = a.interactions.to_dicts()
    b = tiny.dataset([[*[r["item"] for r in rows if r["user"] == u][:-1], 19 - u % 5] for u in range(30)], N)
    assert a.cases("test").targets.tolist() != b.cases("test").targets.tolist()
    fits = [tiny.trainer(llm(), tmp_path / name, data) for name, data in (("a", a), ("b", b))]
    for fit in fits:
        fit.run()
    tiny.assert_same(*map(tiny.result, fits))


def test_stage_one_encodes_items_anew_and_stage_two_does_not(llm, tmp_path, monkeypatch):
    calls, read = [], LaserTask._read_items
    monkeypatch.setattr(LaserTask, "_read_items", lambda self: calls.append(self.fixed) or read(self))
    tiny.trainer(llm(), tmp_path / "a").run()
    assert calls == [False] * 3
    calls.clear()
    tiny.trainer(llm(), tmp_path / "b", prompt={"item_side": "plain"}).run()
    assert calls == [False]


def test_item_embeddings_are_made_without_dropout(llm, tmp_path):
    fit = tiny.trainer(llm(), tmp_path, head={"projection": True, "dropout": 0.5},
                       train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    fit.run()
    laser, rows = fit.phase.task.module.eval(), torch.arange(N)
    torch.testing.assert_close(fit.best["vectors"], laser.embed_items(laser.item_outputs(rows), rows),
                               rtol=1e-4, atol=1e-5)


def test_a_learnt_temperature_is_trained_watched_and_saved(llm, tmp_path):
    fit = tiny.trainer(llm(), tmp_path, train={"learn_temperature": True, "temperature": 0.2, "weight_decay": 0.5})
    fit.run()
    tau = float(fit.best["laser.log_temperature"].exp())
    assert 0 < tau != pytest.approx(0.2, rel=1e-3)
    assert all(0 < line["temperature"] < 1 for line in read_training(tmp_path))


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A planted catalogue of ten items, evenly popular, and a SASRec that knows a part of it."""
    data = tiny.planted(10, users=60)
    torch.manual_seed(0)
    model = SASRec(IdModelConfig(**{**tiny.ID_MODEL.model_dump(), "lr": 1e-2}), 10)
    phase = Phase("sasrec", SequenceTask(model, data), 8, 16, 1e-2)
    Trainer([phase], data, tmp_path_factory.mktemp("walk"), "walk", Pace(progress=False)).run()
    return data, model


@pytest.mark.parametrize(("prefix", "layout"), [("mformer", "text_first"), ("learned", "prefix_first")])
def test_who_follows_whom_is_learnt(llm, walk, tmp_path, prefix, layout):
    data, below = walk
    fit = tiny.trainer(llm(), tmp_path, data, below, mformer={"prefix": prefix, "routing": "gate_scaled"},
                       head={"whiten_dims": 9, "projection": True},
                       prompt={"layout": layout, "item_side": "plain", "max_item_tokens": 16, "max_items": 1},
                       train={"stage_one_epochs": 6, "stage_two_epochs": 1, "item_gradient": True, "lr": 2e-2})
    before = llm().tensor_hash()
    fit.run()
    assert llm().tensor_hash() == before
    popular = evaluate("popularity", Popularity(10).fit(data), data, "test", k=1).plain
    assert evaluate("laser", fit.phase.task.scorer(), data, "test", k=1).plain.recall > popular.recall + 0.4


def targets_of(data) -> torch.Tensor:
    """All that a pass over the training sequences predicts."""
    of, cut = epoch_examples(data.train_sequences, Cuts.ALL, (0, 1, 1))
    return data.train_sequences.items[data.train_sequences.starts[of] + cut]


@pytest.mark.parametrize("more", [{}, {"history_negatives": False}], ids=["plain", "no history negatives"])
def test_targets_of_the_batch_alone_are_learnt_from_and_teach_the_items_too(llm, more):
    data = tiny.planted(N, 20)
    laser = tiny.laser(llm(), n=N, prompt=tiny.QUICK, train={"negatives": "batch", **more},
                       mformer={"dropout": 0.0, "prefix": "learned"})
    task = LaserTask(laser, data, tiny.World(), fixed=False)
    task.start(lambda: None)
    given = task.begin_epoch(1)
    batch = given.batch(np.arange(12))
    whole, gradients = 0.0, []
    for parts in ([np.arange(12)], [np.arange(5), np.arange(5, 12)]):
        laser.zero_grad()
        whole = sum(task.loss(batch, rows)["loss"] for rows in parts)
        whole.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in laser.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    items = torch.unique(batch.targets)
    fresh = laser.head(laser.item_side.outputs(items))
    users, _ = laser.user_side.text(batch.histories)
    counts = torch.bincount(targets_of(data), minlength=N)
    logits = torch.nn.functional.normalize(users, dim=-1) @ torch.nn.functional.normalize(fresh, dim=-1).T
    logits = logits / laser.temperature - (counts / counts.sum()).log()[items]
    losses = []
    for row, (history, target) in enumerate(zip(batch.histories.lists(), batch.targets.tolist(), strict=True)):
        allowed = [i for i, item in enumerate(items.tolist()) if not more or item == target or item not in history]
        losses.append(torch.logsumexp(logits[row, allowed], 0) - logits[row, items.tolist().index(target)])
    assert float(whole.detach()) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    fixed = LaserTask(laser, data, tiny.World(), fixed=True)
    assert float(fixed.loss(batch, np.arange(12))["loss"]) != pytest.approx(float(whole.detach()), rel=1e-3)


def sampled_task(llm, fixed: bool, **train) -> LaserTask:
    given = {"negatives": "sampled", "sampled_items": 5, "history_negatives": False, "item_gradient": True} | train
    laser = tiny.laser(llm(), n=N, prompt={"layout": "none", "item_side": "mean"}, train=given,
                       mformer={"prefix": "none"}, head={"whiten_dims": 9, "projection": True})
    with torch.no_grad():
        laser.head.projection.weight.add_(torch.randn_like(laser.head.projection.weight) * 0.3)
    task = LaserTask(laser, tiny.planted(N, 20), tiny.World(), fixed)
    task.start(lambda: None)
    return task


@pytest.mark.parametrize("more", [{}, {"history_negatives": True}], ids=["no history negatives", "plain"])
@pytest.mark.parametrize("fixed", [False, True], ids=["stage 1", "stage 2"])
def test_a_few_items_drawn_at_each_step_are_weighed_by_how_often_they_are_drawn(llm, fixed, more):
    task = sampled_task(llm, fixed, **more)
    laser, rows = task.module, np.arange(12)
    batch = task.begin_epoch(1).batch(rows)
    few, targets = batch.candidates.items.tolist(), batch.targets.tolist()
    assert set(targets) <= set(few) and 5 <= len(few) < N
    unit = torch.nn.functional.normalize
    laser.head.dropout.p = 0.0
    items = laser.vectors[:, : laser.d_text] if fixed else laser.head(task.outputs)
    users, _ = laser.user_side.text(batch.histories)
    counts = np.bincount(targets_of(task.dataset), minlength=N)
    cosines, losses = (unit(users, dim=-1) @ unit(items, dim=-1).T).tolist(), []
    for row, (history, target) in enumerate(zip(batch.histories.lists(), targets, strict=True)):
        total = 0.0
        for item in few:
            missed = (1 - 5 / N) * (1 - counts[item] / counts.sum()) ** 11
            allowed = bool(more) or item == target or item not in history
            total += allowed * math.exp(cosines[row][item] / laser.temperature) / (1 - missed * (item != target))
        losses.append(math.log(total) - cosines[row][target] / laser.temperature)
    whole = task.loss(batch, rows)["loss"]
    assert float(whole.detach()) == pytest.approx(sum(losses) / 12, rel=1e-4)
    in_parts = sum(task.loss(batch, part)["loss"] for part in (rows[:5], rows[5:]))
    assert float(in_parts.detach()) == pytest.approx(float(whole.detach()), rel=1e-4)


def test_a_sample_of_all_items_is_the_full_softmax(llm):
    found = []
    for train in ({"sampled_items": N}, {"negatives": "all"}):
        torch.manual_seed(0)
        task = sampled_task(llm, False, **train)
        torch.manual_seed(1)
        loss = task.loss(task.begin_epoch(1).batch(np.arange(12)), np.arange(12))["loss"]
        loss.backward()
        found.append((loss.detach(), task.module.head.projection.weight.grad))
    tiny.assert_same(*(dict(enumerate(each)) for each in found))


def test_each_step_draws_other_items(llm):
    task = sampled_task(llm, False)
    one, other = (task.begin_epoch(1).batch(np.arange(3)).candidates.items.tolist() for _ in range(2))
    assert one != other and len(one) < N / 2


def test_batch_negatives_need_items_that_are_trained():
    with pytest.raises(ValueError, match=r"train.negatives batch .* needs prompt.item_side trained"):
        tiny.config("x", train={"negatives": "batch"}, prompt={"item_side": "plain"})
