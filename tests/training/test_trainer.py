"""The one trainer: what it keeps, and that it can be stopped anywhere; with Laser and with a sequence model."""

import signal

import numpy as np
import pytest
import tiny
import torch

from laserrec.config import IdModelConfig
from laserrec.data.dataset import Dataset
from laserrec.methods.laser import task as laser_task
from laserrec.methods.protocol import Phase
from laserrec.methods.sasrec import SASRec
from laserrec.methods.sequence_task import SequenceTask
from laserrec.training import trainer as module
from laserrec.training.trainer import Goal, GoalMissedError, Pace, Trainer
from laserrec.training.watch import read_training
from laserrec.util.errors import UserError

LAYOUTS = ["prefix_first", "text_first"]
SMALL = IdModelConfig(d_id=16, blocks=1, heads=2, dropout=0.2, max_history=6, batch_size=8, lr=1e-2, seen_offset=True)


def sequence_trainer(folder, epochs: int = 3, data: Dataset | None = None, pace: Pace | None = None,
                     softmax: str = "full", **settings) -> Trainer:
    data = data or tiny.planted(25, 40)
    torch.manual_seed(0)
    model = SASRec(SMALL.model_copy(update={"softmax": softmax, "negatives": 5}), data.n_items)
    phase = Phase("sasrec", SequenceTask(model, data), epochs, 8, 1e-2, **settings)
    return Trainer([phase], data, folder, "planted", pace or Pace(progress=False))


def without_seconds(log: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in log]


# -- what it keeps ----------------------------------------------------------------------------------------------


def test_the_log_and_the_kept_epoch(llm, tmp_path):
    fit = tiny.trainer(llm(), tmp_path)
    log = fit.run()
    assert [(e["phase"], e["epoch"]) for e in log] == [("stage 1", 0), ("stage 1", 1), ("stage 1", 2), ("stage 2", 1)]
    best = max(e["validation_ndcg@10"] for e in log[1:])
    summary = fit.summary()
    assert summary["kept"]["validation_ndcg@10"] == best == fit.place.best and summary["epochs"] == 3
    # The kept weights against the kept items give the logged number.
    assert fit._validate(fit.phase).ndcg == pytest.approx(best, abs=1e-9)


def ndcgs(monkeypatch, numbers: list[float]) -> None:
    """Validation gives these, in turn."""
    given, validate = iter(numbers), Trainer._validate
    monkeypatch.setattr(Trainer, "_validate", lambda self, phase: (
        metrics := validate(self, phase)).__class__(**{**vars(metrics), "ndcg": next(given)}))


def test_stage_two_starts_from_the_best_epoch_and_keeps_its_items(llm, tmp_path, monkeypatch):
    """Validation is made to fall, so that epoch 1 is best; stage 2 must start there."""
    one = tiny.trainer(llm(), tmp_path / "one", train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    one.run()
    ndcgs(monkeypatch, [0.0, 0.9, 0.5, 0.4, 0.3, 0.95])
    fit = tiny.trainer(llm(), tmp_path / "all", train={"stage_one_epochs": 3, "stage_two_epochs": 2})
    starts, items, loss = [], [], laser_task.LaserTask.loss

    def spy(self, batch, rows):
        if self.fixed:
            starts.append({k: v.clone() for k, v in self.state().items()})
            items.append(self.module.vectors.clone())
        return loss(self, batch, rows)

    monkeypatch.setattr(laser_task.LaserTask, "loss", spy)
    log = fit.run()
    tiny.assert_same(starts[0], tiny.result(one))
    assert all(torch.equal(i, one.best["vectors"]) for i in items)
    assert torch.equal(fit.best["vectors"], one.best["vectors"])
    assert fit.place.best == 0.95 and len(log) == 6 and fit.summary()["kept"] == log[-1]


@pytest.mark.parametrize(("later", "kept"), [([0.3, 0.2], ("stage 1", 0)), ([0.6, 0.7], ("stage 2", 2))])
def test_without_stage_one_the_kept_epoch_is_the_one_that_is_used(llm, tmp_path, monkeypatch, later, kept):
    """Where no epoch of stage 2 beats the untrained model, that is what is kept, and what is told."""
    ndcgs(monkeypatch, [0.5, *later])
    fit = tiny.trainer(llm(), tmp_path, train={"stage_one_epochs": 0, "stage_two_epochs": 2})
    start = fit.phases[0].task.module.reader.suffix.detach().clone()
    fit.run()
    assert (fit.summary()["kept"]["phase"], fit.summary()["kept"]["epoch"]) == kept
    assert torch.equal(fit.best["laser.reader.suffix"], start) == (kept[1] == 0)


def test_stages_can_be_left_out(llm, tmp_path):
    for name, epochs, expected in (("one", (1, 0), [("stage 1", 0), ("stage 1", 1)]),
                                   ("two", (0, 1), [("stage 1", 0), ("stage 2", 1)]), ("no", (0, 0), [("stage 1", 0)])):
        settings = dict(zip(("stage_one_epochs", "stage_two_epochs"), epochs, strict=True))
        log = tiny.trainer(llm(), tmp_path / name, train=settings).run()
        assert [(e["phase"], e["epoch"]) for e in log] == expected


def test_the_best_epoch_on_validation_is_kept_and_patience_ends_it(tmp_path):
    fit = sequence_trainer(tmp_path, 60, patience=2, eval_every=2)
    looked = {e["epoch"]: e["validation_ndcg@10"] for e in fit.run() if "validation_ndcg@10" in e}
    kept, last = fit.summary()["kept"], max(looked)
    assert list(looked) == list(range(2, last + 1, 2))
    assert looked[kept["epoch"]] == max(looked.values()) and last == kept["epoch"] + 4 < 60


def test_without_validation_the_last_epoch_is_kept(tmp_path):
    data = tiny.dataset([[i % 25, (i + 1) % 25] for i in range(30)], 25)
    data = Dataset(data.items, data.users, data.interactions.with_columns(split=data.interactions["split"].replace(
        {"test": "train", "validation": "train"})), data.meta)
    with pytest.raises(UserError, match=r"eval\.validates = false .laserrec fit DATA OUT --eval\.no-validates"):
        sequence_trainer(tmp_path / "a", data=data)
    fit = sequence_trainer(tmp_path / "b", data=data, pace=Pace(progress=False, validates=False))
    log = fit.run()
    assert [e["epoch"] for e in log] == [1, 2, 3] and not any("validation" in key for e in log for key in e)
    assert fit.summary()["kept"] == log[-1]
    tiny.assert_same(tiny.result(fit), dict(fit.phase.task.module.state_dict()))


def test_validation_users_are_the_same_for_every_seed(llm, tmp_path):
    picked = [tiny.trainer(llm(), tmp_path / str(seed), train={"validation_users": 7, "seed": seed}).validation.users
              for seed in (0, 1)]
    assert picked[0].tolist() == picked[1].tolist() and len(picked[0]) == 7


def test_learning_rate_schedule(tmp_path):
    fit = sequence_trainer(tmp_path, 2, warmup_fraction=0.5, cosine_decay=True)
    fit._begin_phase()
    rates = []
    for epoch in (1, 2):
        for step in range(10):
            fit.place.epoch, fit.place.step = epoch, step
            rates.append(fit._set_rate(10))
            assert {g["lr"] for g in fit.optimizer.param_groups} == {rates[-1]}
    assert rates[0] == pytest.approx(1e-3) and rates[4] == pytest.approx(5e-3)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 1e-4


def test_what_is_decayed_and_what_is_not(llm, tmp_path):
    fit = tiny.trainer(llm(), tmp_path, train={"weight_decay": 0.5, "learn_temperature": True})
    fit._begin_phase()
    maps = sum(isinstance(m, torch.nn.Linear) for m in fit.phase.task.module.modules())
    assert next((len(g["params"]), g["weight_decay"]) for g in fit.optimizer.param_groups) == (maps, 0.5)
    assert fit.optimizer.param_groups[1]["weight_decay"] == 0
    other = sequence_trainer(tmp_path, weight_decay=1.0)
    other._begin_phase()
    assert other.optimizer.param_groups[1]["params"] == [other.phase.task.module.seen.offset]


# -- stop and resume --------------------------------------------------------------------------------------------

RICH = {"mformer": {"dropout": 0.3, "state_dropout": 0.2}, "train": {"cosine_decay": True, "warmup_fraction": 0.2},
        "head": {"projection": True, "whiten_dims": 16, "id_share": 0.3}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_same_seed_gives_the_same_weights(llm, tmp_path, layout, gradient):
    sections = {**RICH, "prompt": {"layout": layout}, "train": {"item_gradient": gradient}}
    models = []
    for name in "ab":
        fit = tiny.trainer(llm(), tmp_path / name, **sections)
        torch.rand(3)
        fit.run()
        models.append(tiny.result(fit))
    tiny.assert_same(*models)
    other = tiny.trainer(llm(), tmp_path / "c", **{**sections, "train": {"item_gradient": gradient, "seed": 1}})
    other.run()
    assert not torch.equal(other.best["laser.reader.suffix"], models[0]["laser.reader.suffix"])


class Stop:
    """An interruption during the n-th call of a function."""

    def __init__(self, call, at: int, error: type[BaseException] | None = None):
        self.call, self.left, self.error = call, at, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and self.error is not None:
            raise self.error
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.call(*args, **kwargs)


PLACES = {"step": (module.Progress, "advance"), "loss": (laser_task, "item_contrast"),
          "items": (laser_task.LaserTask, "_read_items"), "validation": (Trainer, "_validate")}


@pytest.mark.parametrize(("where", "at"), [("step", 9), ("step", 17), ("loss", 5), ("loss", 13), ("items", 2),
                                           ("items", 3), ("validation", 2), ("validation", 4)])
def test_stop_and_resume_is_the_uninterrupted_run(llm, tmp_path, monkeypatch, where, at):
    """`step`: between two steps; `loss`: in the midst of one, when dropout was drawn already."""
    whole = tiny.trainer(llm(), tmp_path / "whole", **RICH)
    log = whole.run()
    owner, name = PLACES[where]
    stop = Stop(getattr(owner, name), at)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *a, **k: stop(*a, **k))
        with pytest.raises(KeyboardInterrupt):
            tiny.trainer(llm(), tmp_path / "cut", **RICH).run()
    assert stop.left <= 0
    second = tiny.trainer(llm(), tmp_path / "cut", **RICH)
    torch.manual_seed(77)
    resumed = second.run()
    tiny.assert_same(tiny.result(second), tiny.result(whole))
    assert without_seconds(resumed) == without_seconds(log)


@pytest.mark.parametrize("error", [None, RuntimeError])
@pytest.mark.parametrize("softmax", ["full", "sampled"])
@pytest.mark.parametrize("at", [2, 7, 12])
def test_a_sequence_model_too(tmp_path, monkeypatch, error, at, softmax):
    """Ctrl-C, and a crash, after which the last timed checkpoint is all there is."""
    pace = Pace(progress=False, checkpoint_minutes=0.0)
    whole = sequence_trainer(tmp_path / "whole", pace=pace, softmax=softmax)
    log = whole.run()
    stop = Stop(SASRec.loss, at, error)
    with monkeypatch.context() as patch:
        patch.setattr(SASRec, "loss", lambda *a: stop(*a))
        with pytest.raises(error or KeyboardInterrupt):
            sequence_trainer(tmp_path / "cut", pace=pace, softmax=softmax).run()
    assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    second = sequence_trainer(tmp_path / "cut", pace=pace, softmax=softmax)
    torch.manual_seed(99)
    assert without_seconds(second.run()) == without_seconds(log)
    tiny.assert_same(tiny.result(second), tiny.result(whole))
    steps = [e["step"] for e in read_training(tmp_path / "cut")]
    assert steps == sorted(set(steps)) and steps[-1] == whole.place.steps


def test_a_training_that_misses_its_goal_can_go_on(tmp_path):
    """Nothing is lost; one that meets its goal is not touched by it."""
    whole = sequence_trainer(tmp_path / "whole")
    log = whole.run()
    reached = max(e["validation_ndcg@10"] for e in log[:2])
    for at in range(2):  # the second time it stops where it stands
        cut = sequence_trainer(tmp_path / "cut")
        cut.goal = Goal(2, reached + 0.01)
        with pytest.raises(GoalMissedError):
            cut.run()
        assert without_seconds(cut.log) == without_seconds(log[:2]), at
    second = sequence_trainer(tmp_path / "cut")
    second.goal = Goal(2, reached)
    assert without_seconds(second.run()) == without_seconds(log)
    tiny.assert_same(tiny.result(second), tiny.result(whole))


def test_a_second_ctrl_c_saves_no_half_step(tmp_path, monkeypatch):
    call = torch.nn.utils.clip_grad_norm_

    def twice(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return call(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", twice)
    with pytest.raises(KeyboardInterrupt):
        sequence_trainer(tmp_path).run()
    assert not list(tmp_path.glob("*checkpoint*")) and not read_training(tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, monkeypatch):
    stop = Stop(SASRec.loss, 3)
    with monkeypatch.context() as patch:
        patch.setattr(SASRec, "loss", lambda *a: stop(*a))
        with pytest.raises(KeyboardInterrupt):
            sequence_trainer(tmp_path).run()
    other = sequence_trainer(tmp_path)
    other.fingerprint = "another"
    with pytest.raises(UserError, match="other settings or data"):
        other.run()


@pytest.mark.parametrize("settings", [{}, {"prefix": "none"}, {"state_dropout": 0.4}])
def test_a_step_in_many_passes_has_the_gradient_of_one(llm, tmp_path, settings):
    gradients = []
    for limit in (10**6, 1):
        fit = tiny.trainer(llm(), tmp_path, mformer=settings | {"dropout": 0.0}, train={"tokens_per_pass": limit})
        fit._begin_phase()
        task = fit.phase.task
        task.start(lambda: None)
        examples = task.begin_epoch(1)
        index = np.arange(7)
        assert len(fit._passes(examples.lengths[index])) == (1 if limit > 1 else 7)
        torch.manual_seed(6)
        fit.optimizer.step = lambda: None
        fit._step(examples.batch(index), examples.lengths[index])
        gradients.append({"loss": fit._loss} | {n: p.grad for n, p in task.module.named_parameters()
                                                if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
