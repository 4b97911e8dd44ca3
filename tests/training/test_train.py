"""The two-stage fit: what it sees, what it keeps, that it can be stopped anywhere, that it learns."""

import json
import signal

import numpy as np
import pytest
import tiny
import torch

from laserrec.config import Cuts, ItemSide, Layout, Prefix, Template
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.laser.encoder import Catalogue, Encoder
from laserrec.methods.laser.model import Laser
from laserrec.methods.popularity import Popularity
from laserrec.training import train
from laserrec.training.pretrain import pretrain_id_model
from laserrec.training.train import Fit, epoch_examples, fit_fingerprint
from laserrec.training.watch import read_training
from laserrec.util.errors import UserError

N = 20
WALK = 10
QUICK = {"template": Template.NO_INSTRUCTION, "max_items": 2, "max_item_tokens": 4}


def make_fit(backbone, folder, dataset: Dataset | None = None, id_model=None, world=None, **sections) -> Fit:
    """A fresh fit as the recommender makes it."""
    dataset = dataset or tiny.planted(N, users=20)
    sections = {**sections, "prompt": QUICK | sections.get("prompt", {})}
    config = tiny.config(backbone.name, **sections)
    id_model = id_model or tiny.id_model(dataset.n_items)
    torch.manual_seed(config.train.seed)
    laser = Laser(config, backbone, id_model.d_id, dataset.n_items)
    encoder = Encoder(laser, id_model, Catalogue(laser, dataset.items, dataset.n_items))
    return Fit(encoder, dataset, config, folder, fit_fingerprint(dataset.fingerprint, id_model, config), False, world)


def result(fit: Fit) -> dict[str, torch.Tensor]:
    return {**{k: v.clone() for k, v in fit.laser.state_dict().items()}, "items": fit.best_items.clone()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


# -- examples ---------------------------------------------------------------------------------------------------


def test_all_cuts_are_every_position_with_a_history():
    examples = epoch_examples({1: np.array([5, 6, 7]), 2: np.array([9]), 3: np.array([2, 3])}, Cuts.ALL, (0,))
    assert [(e.history.tolist(), e.target) for e in examples] == [([5], 6), ([5, 6], 7), ([2], 3)]


def test_random_cuts_are_one_a_user_and_new_each_epoch():
    sequences = {u: np.arange(1, 9) for u in range(1, 21)} | {99: np.array([3])}
    first, again, next_epoch = (epoch_examples(sequences, Cuts.RANDOM, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert len(first) == 20
    assert [e.target for e in first] == [e.target for e in again] != [e.target for e in next_epoch]
    assert {e.target for e in first} <= set(range(2, 9)) and len({e.target for e in first}) > 3
    assert all(e.history.tolist() == list(range(1, e.target)) for e in first)


# -- what it sees -----------------------------------------------------------------------------------------------


def held_out_apart() -> Dataset:
    """Items 11-15 are validation's alone, 16-20 test's alone."""
    rng = np.random.default_rng(0)
    return tiny.dataset([[*rng.integers(1, 11, 4).tolist(), 11 + u % 5, 16 + u % 5] for u in range(30)], N)


@pytest.mark.parametrize("layout", list(Layout))
def test_no_held_out_item_is_in_a_training_step(llm, tmp_path, monkeypatch, layout):
    dataset = held_out_apart()
    targets, histories = [], []
    contrast, outputs = train.item_contrast, Encoder.outputs

    def spy_contrast(users, items, wanted, *rest):
        assert items.shape[0] == N  # every item is a negative
        targets.extend((wanted + 1).tolist())
        return contrast(users, items, wanted, *rest)

    def spy_outputs(self, rows, as_item=False, hide_states=None):
        if self.laser.training:
            histories.extend(i for row in rows for i in row.tolist())
        return outputs(self, rows, as_item, hide_states)

    monkeypatch.setattr(train, "item_contrast", spy_contrast)
    monkeypatch.setattr(Encoder, "outputs", spy_outputs)
    make_fit(llm(), tmp_path, dataset, prompt={"layout": layout}).run()
    assert len(targets) == 3 * 90  # three epochs, every position but each user's first
    assert max(targets) <= 10 and max(histories) <= 10 and histories


def test_the_test_split_is_never_asked_for(llm, tmp_path, monkeypatch):
    asked = []
    cases = Dataset.cases
    monkeypatch.setattr(Dataset, "cases", lambda self, split: asked.append(split) or cases(self, split))
    make_fit(llm(), tmp_path).run()
    assert set(asked) == {"validation"}


def test_other_test_items_give_the_same_model(llm, tmp_path):
    a = held_out_apart()
    rows = a.interactions.to_dicts()
    b = tiny.dataset([[*[r["item"] for r in rows if r["user"] == u][:-1], 20 - u % 5] for u in range(1, 31)], N)
    models = []
    for name, dataset in (("a", a), ("b", b)):
        fit = make_fit(llm(), tmp_path / name, dataset)
        fit.run()
        models.append(result(fit))
    assert a.cases("test").targets.tolist() != b.cases("test").targets.tolist()
    assert_same(*models)


# -- what it keeps ----------------------------------------------------------------------------------------------


def test_the_log_and_the_kept_epoch(llm, tmp_path):
    fit = make_fit(llm(), tmp_path)
    log = fit.run()
    assert [(e["stage"], e["epoch"]) for e in log] == [(1, 0), (1, 1), (1, 2), (2, 1)]
    best = max(e["validation_ndcg@10"] for e in log[1:])
    assert fit.summary()["best"]["validation_ndcg@10"] == best == fit.place.best
    # The kept weights against the kept items give the logged number.
    fit.items = fit.best_items
    assert fit._validate().ndcg == pytest.approx(best, abs=1e-9)


def test_stage_two_starts_from_the_best_epoch_and_keeps_its_items(llm, tmp_path, monkeypatch):
    """Validation is made to fall, so that epoch 1 is best; stage 2 must start there."""
    fit = make_fit(llm(), tmp_path, train={"stage_one_epochs": 3, "stage_two_epochs": 2})
    scores, seen = iter([0.0, 0.9, 0.5, 0.4, 0.3, 0.95]), []
    validate, step = Fit._validate, Fit._train_step

    def falling(self):
        metrics = validate(self)
        return metrics.__class__(**{**vars(metrics), "ndcg": next(scores)})

    def spy(self, examples):
        if self.place.stage == 2 and not seen:
            seen.append((result(self), {k: v.clone() for k, v in self.best_state.items()}))
        if self.place.stage == 2:
            items.append(self.items.clone())
        return step(self, examples)

    items = []
    monkeypatch.setattr(Fit, "_validate", falling)
    monkeypatch.setattr(Fit, "_train_step", spy)
    log = fit.run()
    weights, best = seen[0]
    weights.pop("items")
    assert_same(weights, best)
    one = make_fit(llm(), tmp_path / "one", train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    monkeypatch.setattr(Fit, "_validate", validate)
    one.run()
    assert_same(best, dict(one.laser.state_dict()))
    assert all(torch.equal(i, one.best_items) for i in items)
    assert torch.equal(fit.best_items, one.best_items)
    assert fit.place.best == 0.95 and len(log) == 6


def test_stages_can_be_left_out(llm, tmp_path):
    for name, epochs, expected in (("one", (1, 0), [(1, 0), (1, 1)]), ("two", (0, 1), [(1, 0), (2, 1)])):
        settings = dict(zip(("stage_one_epochs", "stage_two_epochs"), epochs, strict=True))
        log = make_fit(llm(), tmp_path / name, train=settings).run()
        assert [(e["stage"], e["epoch"]) for e in log] == expected


def test_stage_one_encodes_items_anew_and_stage_two_does_not(llm, tmp_path, monkeypatch):
    calls = []
    outputs = Fit._item_outputs
    monkeypatch.setattr(Fit, "_item_outputs", lambda self: calls.append(self.place.stage) or outputs(self))
    make_fit(llm(), tmp_path / "a").run()
    assert calls == [1, 1, 1]
    calls.clear()
    make_fit(llm(), tmp_path / "b", prompt={"item_side": ItemSide.PLAIN}).run()
    assert calls == [1]


def test_item_embeddings_are_made_without_dropout(llm, tmp_path):
    one = make_fit(llm(), tmp_path, head={"projection": True, "dropout": 0.5},
                   train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    one.run()
    one.laser.eval()
    torch.testing.assert_close(one.best_items, one.encoder.encode_items(16), rtol=1e-4, atol=1e-5)


def test_validation_users_are_the_same_for_every_seed(llm, tmp_path):
    picked = [make_fit(llm(), tmp_path / str(seed), train={"validation_users": 7, "seed": seed}).validation.users
              for seed in (0, 1)]
    assert picked[0].tolist() == picked[1].tolist() and len(picked[0]) == 7


def test_learning_rate_schedule(llm, tmp_path):
    fit = make_fit(llm(), tmp_path, train={"warmup_fraction": 0.5, "cosine_decay": True, "lr": 1.0})
    fit._new_optimizer()
    rates = []
    for epoch in (1, 2):
        for step in range(10):
            fit.place.epoch, fit.place.step = epoch, step
            fit._set_rate(10)
            rates.append({g["lr"] for g in fit.optimizer.param_groups})
    flat = [r.pop() for r in rates if len(r) == 1]
    assert len(flat) == 20 and flat[0] == pytest.approx(0.1) and flat[4] == pytest.approx(0.5)
    top = flat.index(max(flat))
    assert flat[:top] == sorted(flat[:top]) and flat[top:] == sorted(flat[top:], reverse=True) and flat[-1] < 0.01


# -- stop and resume --------------------------------------------------------------------------------------------

RICH = {"mformer": {"dropout": 0.3, "state_dropout": 0.2}, "train": {"cosine_decay": True, "warmup_fraction": 0.2},
        "head": {"projection": True, "whiten_dims": 16, "id_share": 0.3}}


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("gradient", [False, True])
def test_the_same_seed_gives_the_same_weights(llm, tmp_path, layout, gradient):
    sections = {**RICH, "prompt": {"layout": layout}, "train": {"item_gradient": gradient}}
    models = []
    for name in "ab":
        torch.manual_seed(hash(name) % 100)
        fit = make_fit(llm(), tmp_path / name, **sections)
        torch.rand(3)
        fit.run()
        models.append(result(fit))
    assert_same(*models)
    other = make_fit(llm(), tmp_path / "c", **{**sections, "train": {"item_gradient": gradient, "seed": 1}})
    other.run()
    assert not torch.equal(other.laser.suffix, models[0]["suffix"])


class Stop:
    """Ctrl-C during the n-th call of a function."""

    def __init__(self, call, at: int):
        self.call, self.left = call, at

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.call(*args, **kwargs)


@pytest.mark.parametrize("where", ["step", "loss", "items", "validation"])
@pytest.mark.parametrize("at", [2, 4])
def test_stop_and_resume_is_the_uninterrupted_run(llm, tmp_path, monkeypatch, where, at):
    """`step`: between two steps; `loss`: in the midst of one, when dropout was drawn already."""
    whole = make_fit(llm(), tmp_path / "whole", **RICH)
    log = whole.run()
    owner, name = {"step": (train.Progress, "advance"), "loss": (train, "item_contrast"),
                   "items": (Fit, "_item_outputs"), "validation": (Fit, "_validate")}[where]
    steps = len(epoch_examples(whole.dataset.train_sequences, Cuts.ALL, (0,))) // 16 + 1
    count = {"step": at * steps - 1, "loss": at * steps * 3 // 4 - 1, "items": 1 + at // 2, "validation": at}[where]
    call = getattr(owner, name)
    stop = Stop(call, count)
    monkeypatch.setattr(owner, name, lambda *a, **k: stop(*a, **k))
    first = make_fit(llm(), tmp_path / "cut", **RICH)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    monkeypatch.setattr(owner, name, call)
    second = make_fit(llm(), tmp_path / "cut", **RICH)
    torch.manual_seed(77)
    resumed = second.run()
    assert_same(result(second), result(whole))
    dropped = ("seconds",)
    assert [{k: v for k, v in e.items() if k not in dropped} for e in resumed] == [
        {k: v for k, v in e.items() if k not in dropped} for e in log]


def test_a_second_ctrl_c_saves_no_half_step(llm, tmp_path, monkeypatch):
    fit = make_fit(llm(), tmp_path)
    call = torch.nn.utils.clip_grad_norm_

    def twice(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return call(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", twice)
    with pytest.raises(KeyboardInterrupt):
        fit.run()
    assert not list(tmp_path.glob("*checkpoint*")) and not read_training(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"prefix": "none"}, {"state_dropout": 0.4}])
def test_a_step_in_many_passes_has_the_gradient_of_one(llm, tmp_path, settings):
    gradients = []
    for limit in (10**6, 1):
        torch.manual_seed(5)
        fit = make_fit(llm(), tmp_path, mformer=settings | {"dropout": 0.0}, train={"tokens_per_pass": limit})
        fit._new_optimizer()
        fit._prepare_items()
        examples = epoch_examples(fit.dataset.train_sequences, Cuts.RANDOM, (0,))[:7]
        assert len(fit._passes(examples)) == (1 if limit > 1 else 7)
        torch.manual_seed(6)
        fit.optimizer.step = lambda: None
        loss = fit._train_step(examples)
        gradients.append({"loss": torch.tensor(loss)} | {n: p.grad for n, p in fit.laser.named_parameters()
                                                         if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_checkpoint_of_other_settings_is_refused(llm, tmp_path, monkeypatch):
    call = train.item_contrast
    stop = Stop(call, 3)
    monkeypatch.setattr(train, "item_contrast", lambda *a: stop(*a))
    with pytest.raises(KeyboardInterrupt):
        make_fit(llm(), tmp_path).run()
    with pytest.raises(UserError, match="other settings or data"):
        make_fit(llm(), tmp_path, train={"lr": 5e-3}).run()
    with pytest.raises(UserError, match="other settings or data"):
        make_fit(llm(), tmp_path, id_model=tiny.id_model(N, seed=5)).run()


def test_the_pace_of_checkpoints_may_change(llm, tmp_path):
    dataset, model = tiny.planted(N), tiny.id_model(N)
    prints = [fit_fingerprint(dataset.fingerprint, model, tiny.config("x", train=t))
              for t in ({}, {"checkpoint_minutes": 1.0}, {"seed": 3})]
    assert prints[0] == prints[1] != prints[2]


# -- it learns --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A planted catalogue and a SASRec that knows a part of it."""
    dataset = tiny.planted(WALK, users=60)
    folder = tmp_path_factory.mktemp("walk")
    config = tiny.ID_MODEL.model_copy(update={"max_epochs": 8, "lr": 1e-2, "batch_size": 16})
    pretrain_id_model(dataset, config, folder, progress=False)
    from laserrec.methods.id_store import load_id_model

    return dataset, load_id_model(folder, dataset).model


@pytest.mark.parametrize(("prefix", "layout"), [
    (Prefix.MFORMER, Layout.TEXT_FIRST), (Prefix.LEARNED, Layout.PREFIX_FIRST)])
def test_who_follows_whom_is_learnt(llm, walk, tmp_path, prefix, layout):
    """Ten items, evenly popular."""
    dataset, id_model = walk
    fit = make_fit(llm(), tmp_path, dataset, id_model, mformer={"prefix": prefix, "routing": "gate_scaled"},
                   head={"whiten_dims": WALK - 1, "projection": True},
                   prompt={"layout": layout, "item_side": ItemSide.PLAIN, "max_item_tokens": 16, "max_items": 1},
                   train={"stage_one_epochs": 6, "stage_two_epochs": 1, "item_gradient": True, "lr": 2e-2})
    before = fit.encoder.laser.backbone.tensor_hash()
    fit.run()
    assert fit.encoder.laser.backbone.tensor_hash() == before

    def score(rows):
        users = torch.nn.functional.normalize(fit.encoder.encode(rows, 64), dim=-1)
        return users @ torch.nn.functional.normalize(fit.best_items, dim=-1).T

    popular = evaluate("popularity", Popularity(dataset).score, dataset, "test", k=1).plain
    assert evaluate("laser", score, dataset, "test", k=1).plain.recall > popular.recall + 0.4


def test_a_learnt_temperature_is_trained_watched_and_saved(llm, tmp_path):
    fit = make_fit(llm(), tmp_path, train={"learn_temperature": True, "temperature": 0.2, "weight_decay": 0.5})
    fit.run()
    tau = fit.laser.log_temperature.exp().item()
    assert 0 < tau != pytest.approx(0.2, rel=1e-3)
    lines = [json.loads(x) for x in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert lines[0]["temperature"] > 0 and "log_temperature" in fit.best_state
    assert [len(g["params"]) for g in fit.optimizer.param_groups if g["weight_decay"]] == [
        sum(isinstance(m, torch.nn.Linear) for m in fit.laser.modules())]  # it is not decayed
