"""Every method's fit: a folder that is loaded, resumed or refused, whatever happened to an earlier fit into it."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import tiny
import torch

from laserrec import LaserRecommender
from laserrec.data.losses import LossWarning
from laserrec.evaluation.evaluate import evaluate
from laserrec.llm.backbone import load_backbone
from laserrec.methods.all import METHODS
from laserrec.methods.closed_form import FitOnce
from laserrec.methods.laser import finish
from laserrec.recommender import fitting
from laserrec.recommender import folder as folders
from laserrec.recommender.results import record_result
from laserrec.training.trainer import Trainer
from laserrec.util.device import CPU
from laserrec.util.errors import UserError

N, USERS = 16, 24
DATA = tiny.planted(N, USERS)
ROWS = tiny.histories([0, 1, 2], [6], [3, 8, 1, 4, 7], [10, 11])
ASK = {"anna": ["i1", "i2"], "bob": ["i9"]}
TRAINED = tuple(name for name, method in METHODS.items() if method.sections != ("neighbours",))
"""Methods that are trained in steps; the others are closed forms."""
GROWING = ("laser", "recformer", "zesrec")
"""Methods that take new items."""
PHASED = ("laser", "llamarec", "recformer")
"""Methods of several phases."""
OFTEN = {"train": {"checkpoint_minutes": 1e-9, "lr": 1e-2, "stage_one_epochs": 1, "stage_two_epochs": 1,
                   "batch_size": 32}}
INSTANT = {"id_model": {"kind": "none"}, "prompt": {"layout": "none", "item_side": "mean"},
           "mformer": {"prefix": "none"}, "head": {"whiten_dims": 8, "seen_offset": True, "seen_offset_start": -3.0},
           "neighbours": {"count": 6, "l2": 1.0}, "train": {"stage_one_epochs": 0, "stage_two_epochs": 0}}


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """name -> (folder, model) of a fit that nothing interrupted; made once."""
    made, place = {}, tmp_path_factory.mktemp("whole")

    def get(name):
        if name not in made:
            made[name] = place / name, fit(DATA, place / name, name)
        return made[name]

    return get


def same(a: LaserRecommender, b: LaserRecommender) -> None:
    torch.testing.assert_close(a.score(ROWS), b.score(ROWS), rtol=0, atol=0)


@pytest.fixture
def no_training(monkeypatch):
    """From its call on."""
    return lambda: monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it trains"))


# -- a fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_fitted_model_is_measured_saved_and_loaded(whole, name, llm, tmp_path):
    folder, model = whole(name)
    result = evaluate(name, model, DATA, "test", batch_size=7)
    assert len(result.ranks.plain) == USERS and 0 <= result.plain.ndcg <= result.plain.recall <= 1
    if name in ("laser", "sasrec", "ease", "ease-text"):  # in few epochs, or in closed form
        assert evaluate(name, model, DATA, "validation", k=3).plain.recall > 3 / N
    note = json.loads((folder / "model.json").read_text())
    assert note["format"] == 3 and note["method"] == name and note["n_known"] == note["n_items"] == N
    assert (note["backbone"] is None) == (not METHODS[name].reads_text(model.config))
    assert note["training"]["seconds"] >= 0 and not (folder / "checkpoint.safetensors").exists()
    model.save_pretrained(tmp_path / "copy")
    want = model.recommend(ASK, k=4)
    assert want["user_id"].to_list() == ["anna"] * 4 + ["bob"] * 4 and want["rank"].to_list() == [1, 2, 3, 4] * 2
    for place in (folder, tmp_path / "copy"):
        again = LaserRecommender.from_pretrained(place, llm())
        same(again, model)
        assert again.fitted.log == model.fitted.log
        assert again.method == name and again.config == model.config and again.recommend(ASK, k=4).equals(want)


TEXTS = {"id_model": {**tiny.ID_MODEL.model_dump(), "items": "llm_start", "max_epochs": 2, "lr": 1e-2,
                      "batch_size": 16},
         "prompt": {"layout": "none", "item_side": "mean"}, "transformer": {"d_model": 16, "d_inner": 16, "heads": 2},
         "head": {"whiten_dims": 8, "projection": True, "id_share": 0.4}, "neighbours": {"count": 6, "l2": 1.0}}


def test_an_item_that_was_removed_stays_so_when_the_fit_is_loaded(settings, llm, tmp_path):
    cold = DATA.items.tail(2).drop("item")
    cold = cold.with_columns(item_id=pl.Series(["cold1", "cold2"]), title=pl.lit("&amp; saw"))
    data = replace(DATA)
    data.__dict__["new_items"] = cold  # as read from its folder
    model = LaserRecommender.fit_dataset(data, settings(), tmp_path / "m", device="cpu", progress=False)
    assert model.items["item_id"].to_list()[N:] == ["cold1", "cold2"]
    assert model.items["title"].to_list()[N:] == ["&amp; saw"] * 2  # as it was read, when it was cleaned
    model.remove_items(["cold1"])
    model.save_pretrained(tmp_path / "m")
    for _ in range(2):
        again = LaserRecommender.fit_dataset(data, settings(), tmp_path / "m", device="cpu", progress=False)
        assert again.unknown_items(["cold1", "cold2"]) == ["cold1"] and len(again.items) == N + 2


def test_without_texts_a_laser_is_its_regression_and_id_model(fit, llm, no_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finish, "_FEWEST_USERS", 1)
    model = fit(no_text, tmp_path / "m", progress=True, **TEXTS, blend={"trials": 20})
    assert "no item has a text" in capsys.readouterr().err
    config = model.config
    assert config.transformer.blocks == config.train.stage_one_epochs == config.neighbours.text_weight == 0
    assert model.model.ids.model.config.items == "ids" and model.model.transformer is None
    assert evaluate("laser", model, no_text, "test", k=3).plain.recall > 3 / N
    again = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    same(again, model)
    told = model.facts["training"]["parts"]["ndcg@10"]
    assert "chosen" in told and "without the text part" not in told
    with pytest.warns(LossWarning, match="of 2 of 2 items there is nothing that this model reads"):
        again.add_items(pl.DataFrame({"item_id": ["x", "y"], "title": ["saw", "glue"]}))  # which it has never read
    assert not again.encode_items(["x", "y"]).any()
    assert again.recommend(ASK, k=4).equals(model.recommend(ASK, k=4))
    assert len(again.recommend([["x"]], k=3)) == 3
    same(fit(no_text, tmp_path / "m", **TEXTS, blend={"trials": 20}), model)  # found by the settings that were given
    again.add_items(pl.DataFrame({"item_id": ["new"], "title": ["a saw"]}))
    assert again.recommend(ASK, k=4).height == 8
    more = replace(no_text, interactions=tiny.planted(N, USERS + 6).interactions, meta={"sha256": "more without texts"})
    newer = model.refit(more, tmp_path / "newer", progress=False)
    assert evaluate("laser", newer, more, "test", k=3).plain.recall > 3 / N
    start = fit(no_text, tmp_path / "ids", "sasrec", id_model=TEXTS["id_model"]).model.item.weight
    assert len(start.unique(dim=0)) == len(start)  # not all alike for want of texts


@pytest.fixture
def no_text():
    items = DATA.items.with_columns(pl.lit(None, pl.String).alias(name) for name in ("title", "brand", "category"))
    return replace(DATA, items=items, meta={"sha256": "planted without texts"})


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_folder_is_loaded(whole, fit, name, no_training):
    folder, model = whole(name)
    no_training()
    same(fit(DATA, folder, name), model)


OTHERS = {"laser": {"train": {"seed": 5}}, "sasrec": {"id_model": {"dropout": 0.3}},
          "bert4rec": {"id_model": {"mask_probability": 0.5}}, "gru4rec": {"id_model": {"dropout": 0.4}},
          "fdsa": {"fdsa": {"dropout": 0.3}}, "zesrec": {"zesrec": {"body": "transformer"}},
          "kar": {"kar": {"own_experts": 3}}, "recguru": {"recguru": {"negatives": 7}}}


def own_other(name: str) -> dict:
    """Other settings of a method's own section."""
    section = METHODS[name].sections[-1]
    return {section: {"decay": 0.5} if section == "neighbours" else {"seed": 5}}


@pytest.mark.parametrize("name", METHODS)
def test_other_settings_data_or_method_are_refused_before_anything_is_trained(whole, fit, name, no_training):
    folder, _ = whole(name)
    no_training()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    other = "sasrec" if name == "laser" else "laser"
    for data, method, sections in ((DATA, name, OTHERS.get(name, own_other(name))),
                                   (tiny.planted(N, USERS + 1), name, {}), (DATA, other, {})):
        with pytest.raises(UserError, match="holds a model of another method, other settings or other data"):
            fit(data, folder, method, **sections)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


@pytest.mark.parametrize("changed", [{"dropout": 0.3}, {"kind": "bert4rec"}, {"kind": "none"}, {"seed": 4}])
def test_other_settings_of_the_id_model_are_other_settings(whole, fit, no_training, changed):
    folder, _ = whole("laser")
    no_training()
    with pytest.raises(UserError, match="other settings"):
        fit(DATA, folder, id_model={**tiny.ID_MODEL.model_dump(), "max_epochs": 2, "lr": 1e-2,
                                   "batch_size": 16, **changed})


def test_settings_of_pace_are_no_other_settings(whole, fit, no_training):
    folder, _ = whole("laser")
    no_training()
    fit(DATA, folder, train={**OFTEN["train"], "tokens_per_pass": 77}, prompt={"text_cache_gib": 0.0})


def test_what_a_folder_of_texts_holds_is_a_setting_and_not_where_it_is(fit, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "items.jsonl").write_text('{"item_id": "i1", "text": "a saw"}\n')
    model = fit(DATA, tmp_path / "m", "kar", kar={"knowledge": str(texts)})
    moved = texts.rename(tmp_path / "moved")
    same(fit(DATA, tmp_path / "m", "kar", kar={"knowledge": str(moved)}), model)
    (moved / "items.jsonl").write_text('{"item_id": "i1", "text": "a drill"}\n')
    for knowledge in (str(moved), None):
        with pytest.raises(UserError, match="other settings"):
            fit(DATA, tmp_path / "m", "kar", kar={"knowledge": knowledge})


@pytest.mark.parametrize("name", ["popularity", "laser"])
def test_it_goes_into_no_folder_that_holds_something_else(fit, tmp_path, no_training, name):
    """It would be gone when the finished model takes the folder's place."""
    no_training()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for place in (tmp_path / "mine", tmp_path / "not there yet" / ".." / "mine"):
        with pytest.raises(UserError, match=r"mine holds thesis\.txt, which is no part of a fit; name another folder"):
            fit(DATA, place, name)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# -- interrupted and killed -------------------------------------------------------------------------------------


class Stop:
    """A signal to this process before the n-th call of a function."""

    def __init__(self, owner, name: str, at: int, number: int):
        self.call, self.left, self.number = getattr(owner, name), at, number
        setattr(owner, name, lambda *a, **k: self(*a, **k))

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.call(*args, **kwargs)


def places(name: str) -> list[tuple]:
    """Where a fit is stopped: in the ID model, at the first step, in the midst, and while the folder is written."""
    if name not in TRAINED:
        return [(FitOnce, "start", 1)]
    return [(Trainer, "_step", at) for at in ((2, 5, 9) if name in PHASED else (1, 3))]


CUTS = [pytest.param(name, *place, id=f"{name}-{place[1]}-{place[2]}") for name in METHODS for place in places(name)]


@pytest.mark.parametrize(("name", "owner", "call", "at"), CUTS)
def test_an_interrupted_fit_goes_on_to_the_same_model(whole, fit, tmp_path, monkeypatch, name, owner, call, at):
    monkeypatch.setattr(owner, call, getattr(owner, call))  # put back at the end
    stop = Stop(owner, call, at, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(DATA, tmp_path / "m", name)
    assert stop.left == 0 and not (tmp_path / "m" / "model.json").exists()
    with pytest.raises(UserError, match=r"unfinished fit; start the same|is not a model folder"):
        LaserRecommender.from_pretrained(tmp_path / "m")
    torch.manual_seed(77)
    same(fit(DATA, tmp_path / "m", name), whole(name)[1])


def test_a_fit_that_is_interrupted_behind_its_training_is_not_trained_again(whole, fit, tmp_path, monkeypatch):
    def interrupted(task, progress):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(METHODS, "laser", replace(METHODS["laser"], finish=interrupted))
        with pytest.raises(KeyboardInterrupt):
            fit(DATA, tmp_path / "m")
    want = whole("laser")[1]
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("it trains"))
    same(fit(DATA, tmp_path / "m"), want)


CLEAN = multiprocessing.get_context("forkserver")
"""Starts processes from one that has imported everything and computed nothing: polars must not be forked at work."""
CLEAN.set_forkserver_preload(["laserrec.recommender.recommender", "torch.utils.tensorboard", "pandas",
                              "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"])
KILLED = [*(pytest.param(name, *places(name)[-1], id=name) for name in METHODS),
          *(pytest.param(name, folders.__name__, "write_card", 1, id=f"{name}-saving")
            for name in ("popularity", "laser"))]


def fit_until(tree, name, place, owner, call, at, ready=None) -> None:
    """A fit that is killed before the n-th call of a function; with `ready`, one that says so and waits there."""
    torch.set_num_threads(1)
    owner = sys.modules[owner] if isinstance(owner, str) else owner
    if ready is None:
        Stop(owner, call, at, signal.SIGKILL)
    else:
        setattr(owner, call, lambda *_: ready.send("here") or signal.pause())
    backbone = load_backbone(tree.backbone)
    fitting.fit(name, DATA, tree, place, CPU, None, tiny.features(backbone, tree), progress=False)


def started(*arguments):
    process = CLEAN.Process(target=fit_until, args=arguments, daemon=True)
    process.start()
    return process


@pytest.mark.parametrize(("name", "owner", "call", "at"), KILLED)
def test_a_killed_fit_goes_on_to_the_same_model(whole, fit, settings, tmp_path, name, owner, call, at):
    _, want = whole(name)
    process = started(settings(**OFTEN), name, tmp_path / "m", owner, call, at)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "m" / "model.json").exists()
    torch.manual_seed(77)
    same(fit(DATA, tmp_path / "m", name), want)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_an_unfinished_fit_of_other_settings_is_refused(fit, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", Trainer._step)
        Stop(Trainer, "_step", 3, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            fit(DATA, tmp_path, "sasrec")
    with pytest.raises(UserError, match="belongs to a training with other settings or data"):
        fit(DATA, tmp_path, "sasrec", id_model={**tiny.ID_MODEL.model_dump(), "dropout": 0.3})


def test_of_two_fits_into_one_folder_the_second_is_told_who_has_it(fit, settings, tmp_path):
    mine, other = CLEAN.Pipe()
    process = started(settings(), "sasrec", tmp_path / "m", Trainer, "run", 1, other)
    try:
        assert mine.poll(120) and mine.recv() == "here"
        with pytest.raises(UserError, match=rf"m is in use by fit, process {process.pid} on .*; wait for it to end"):
            fit(DATA, tmp_path / "m", "sasrec")
    finally:
        process.kill()
        process.join()
    fit(DATA, tmp_path / "m", "sasrec")  # the lock ends with its process


def test_what_was_chosen_on_validation_is_kept(fit, llm, tmp_path, monkeypatch):
    monkeypatch.setattr("laserrec.methods.laser.finish._FEWEST_USERS", 10)
    sections = {**INSTANT, "blend": {"trials": 100, "regressions": 2}}
    model = fit(DATA, tmp_path / "m", **sections)
    parts = model.facts["training"]["parts"]
    assert parts["users"] == USERS and parts["ndcg@10"]["chosen"] >= parts["ndcg@10"]["given"]
    assert model.config.neighbours.l2 == parts["chosen"].get("l2", 1.0)
    again = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    assert again.config == model.config
    same(again, model)
    same(fit(DATA, tmp_path / "m", **sections), model)  # the folder knows the settings that were asked for


# -- an ID model that is there already --------------------------------------------------------------------------


def test_a_given_id_model_replaces_the_settings_and_the_card_says_so(whole, fit, tmp_path, llm, no_training_of_it):
    (given, below), (other, _) = whole("bert4rec"), whole("sasrec")
    no_training_of_it()
    model = fit(DATA, tmp_path / "m", below=given)  # whose settings say sasrec
    assert model.config.id_model == below.config.id_model and model.config.id_model.kind == "bert4rec"
    for name, tensor in below.model.state_dict().items():
        assert torch.equal(model.model.ids.model.state_dict()[name], tensor), name
    assert "| `id_model.kind` | bert4rec |" in (tmp_path / "m" / "README.md").read_text()
    assert "| `id_model.kind` | bert4rec |" in (given / "README.md").read_text()
    again = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    same(again, model)
    assert again.config == model.config
    same(fit(DATA, tmp_path / "m", below=given), model)  # loaded
    with pytest.raises(UserError, match="other settings"):
        fit(DATA, tmp_path / "m", below=other)


def test_the_id_model_inside_a_laser_is_read_as_a_model_of_its_own(whole, fit, tmp_path, llm):
    folder, laser = whole("laser")
    inside = LaserRecommender.from_pretrained(folder / "id_model", llm())
    assert inside.method == "sasrec" and inside.config.id_model == laser.config.id_model
    torch.testing.assert_close(inside.score(ROWS), laser.model.ids.model.score(ROWS), rtol=0, atol=0)
    result = evaluate("inside", inside, DATA, "test", batch_size=7)
    record_result(folder / "id_model", result, DATA)  # writes nothing: the files are the Laser's
    same(LaserRecommender.from_pretrained(folder, llm()), laser)
    with pytest.raises(UserError, match="is a part of"):
        folders.shared_files(folder / "id_model")
    inside.save_pretrained(tmp_path / "own")
    same(LaserRecommender.from_pretrained(tmp_path / "own", llm()), inside)
    other = fit(DATA, tmp_path / "m", below=folder / "id_model", train={"lr": 1e-4})
    assert other.config.id_model == laser.config.id_model


@pytest.fixture
def no_training_of_it(monkeypatch):
    """No sequence model is fitted from its call on."""
    task = "laserrec.methods.sequence_task.SequenceTask.begin_epoch"
    return lambda: monkeypatch.setattr(task, lambda *_: pytest.fail("it trains"))


def test_an_id_model_that_does_not_fit_is_refused(whole, fit, tmp_path):
    given = whole("sasrec")[0]
    with pytest.raises(UserError, match=r"was fitted on other data \(sha256 planted"):
        fit(tiny.planted(N, USERS + 1), tmp_path / "m", below=given)
    with pytest.raises(UserError, match=r"popularity; Laser's ID model is a sequence model: sasrec, bert4rec"):
        fit(DATA, tmp_path / "m", below=whole("popularity")[0])
    with pytest.raises(UserError, match="method ease takes no ID model"):
        fit(DATA, tmp_path / "m", "ease", below=given)
    with pytest.raises(UserError, match="is not a model folder"):
        fit(DATA, tmp_path / "m", below=tmp_path / "nothing")


# -- what a method can't do is said -----------------------------------------------------------------------------

NEW = pl.DataFrame({"item_id": ["new1", "new2"], "title": ["steel drill 99", "blue wood"]})


@pytest.mark.parametrize("name", [name for name in METHODS if name not in GROWING])
def test_methods_that_take_no_new_items_say_so(whole, name):
    model = whole(name)[1]
    with pytest.raises(UserError, match=f"method {name} can't take items that it was not fitted on; fit it again"):
        model.add_items(NEW)
    assert len(model.items) == N and model.recommend(ASK, k=99).height == 2 * N


@pytest.mark.parametrize("name", [name for name in GROWING if name != "laser"])
def test_methods_that_know_items_by_their_text_take_new_ones(whole, name, llm, tmp_path):
    whole(name)[1].save_pretrained(tmp_path / "m")
    model = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    old, asked = model.score(ROWS), {"anna": ["i1", "new1"], "bob": ["new2"]}
    assert model.add_items(NEW) == 2 and model.add_items(NEW, exists="skip") == 0
    torch.testing.assert_close(model.score(ROWS)[:, :N], old, rtol=0, atol=0)
    want = model.recommend(asked, k=99)
    assert want.height == 2 * (N + 2)
    model.save_pretrained(tmp_path / "grown")
    again = LaserRecommender.from_pretrained(tmp_path / "grown", llm())
    assert again.recommend(asked, k=99).equals(want) and again.n_known == N


@pytest.mark.parametrize("name", [name for name in METHODS if name not in TRAINED])
@pytest.mark.parametrize("ask", [lambda m: m.encode_items(), lambda m: m.encode_users(ASK), lambda m: m.nearest(3, 2),
                                 lambda m: m.use_index("no folder"), lambda m: m.embeddings])
def test_methods_without_vectors_say_so(whole, name, ask):
    with pytest.raises(UserError, match=f"method {name} has no vectors of users and items"):
        ask(whole(name)[1])


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in ("laser", "llamarec")])
def test_a_trained_models_vectors_give_its_scores(whole, name):
    model = whole(name)[1]
    users, items = model.encode_users(ASK), model.encode_items(["i3", "i5"])
    scores = model.score(tiny.histories([0, 1], [8]))
    np.testing.assert_allclose(users @ items.T, scores[:, [2, 4]], atol=1e-5)
    assert len(model.nearest(3, 5).items) == 5 and 3 not in model.nearest(3, 5).items


@pytest.mark.parametrize("name", METHODS)
def test_removed_items_are_gone_for_every_method(whole, name, llm, tmp_path):
    whole(name)[1].save_pretrained(tmp_path / "m")
    model = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    want = [i for i in model.recommend(ASK, k=99)["item_id"] if i != "i5"]
    assert model.remove_items(["i5"]) == 1
    model.save_pretrained(tmp_path / "m")
    for one in (model, LaserRecommender.from_pretrained(tmp_path / "m", llm())):
        assert one.recommend(ASK, k=99)["item_id"].to_list() == want
        with pytest.raises(UserError, match=r"unknown item ids, first \['i5'\]"):
            one.recommend([["i5"]])


# -- instant ----------------------------------------------------------------------------------------------------


def test_the_instant_preset_lives_a_whole_life_without_an_llm_to_answer(fit, llm, llm_folder, tmp_path, monkeypatch):
    model = fit(DATA, tmp_path / "m", **INSTANT)
    assert evaluate("instant", model, DATA, "validation", k=3).plain.recall > 3 / N
    assert not (tmp_path / "m" / "id_model").exists() and model.facts["training"]["epochs"] == 0
    loads = []
    from laserrec.llm import text_features

    load = text_features.load_backbone
    monkeypatch.setattr(text_features, "load_backbone", lambda *a, **k: loads.append(a) or load(*a, **k))
    loaded = LaserRecommender.from_pretrained(tmp_path / "m")
    want = model.recommend(ASK, k=99)
    assert loaded.recommend(ASK, k=99).equals(want)
    same(loaded, model)
    loaded.remove_items(["i4"])
    assert loaded.recommend(ASK, k=99)["item_id"].to_list() == [i for i in want["item_id"] if i != "i4"]
    loaded.save_pretrained(tmp_path / "without i4")
    assert loads == []
    assert loaded.add_items(NEW) == 2 and len(loads) == 1  # new texts are read, once
    grown = loaded.recommend({"anna": ["i1", "new1"], "bob": ["new2"]}, k=99)
    assert grown.height == 2 * (N + 1) and {"new1", "new2"} <= set(grown["item_id"])
    loaded.save_pretrained(tmp_path / "grown")
    again = LaserRecommender.from_pretrained(tmp_path / "grown")
    same(again, loaded)
    assert again.recommend({"anna": ["i1", "new1"], "bob": ["new2"]}, k=99).equals(grown)
    assert again.remove_items(["new1"]) == 1 and again.add_items(NEW.head(1)) == 1  # the id is free again
    assert again.items.height == N + 3 and len(loads) == 2


def test_the_id_model_is_the_best_of_several_shuffles(fit, tmp_path):
    """On walks up the catalogue order is all, so a shuffled one loses."""
    long = {"id_model": {"max_epochs": 12, "patience": 12, "shuffle": 1.0}, "blend": {"shuffles": (0.0, 1.0, 0.3)}}
    model = fit(DATA, tmp_path / "m", "laser", **long)
    alone = {value: fit(DATA, tmp_path / f"{value}", "sasrec", id_model={**long["id_model"], "shuffle": value})
             for value in (1.0, 0.0, 0.3)}
    ndcg = {value: own.facts["training"]["kept"]["validation_ndcg@10"] for value, own in alone.items()}
    best = max(ndcg, key=ndcg.get)
    assert best != 1.0 and model.config.id_model.shuffle == best
    same_states = {name: tensor for name, tensor in alone[best].model.state_dict().items()}
    tiny.assert_same(same_states, dict(model.model.ids.model.state_dict()))
    assert not (tmp_path / "m" / "id_model_trials").exists() and (tmp_path / "m" / "id_model" / "log.jsonl").is_file()
    same(model, fit(DATA, tmp_path / "m", "laser", **long))
    with pytest.raises(UserError, match="another method, other settings or other data"):
        fit(DATA, tmp_path / "m", "laser", id_model=long["id_model"], blend={"shuffles": (0.2,)})


def test_a_choice_between_id_models_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Neither finished trainings nor those that wait are trained again."""
    settings = tiny.config(None, id_model={"kind": "sasrec", "max_epochs": 4, "shuffle": 1.0, "eval_every": 1},
                           blend={"shuffles": (0.0, 0.3), "shuffle_epochs": 2})
    one = fitting.fit_id_model(DATA, settings, tmp_path / "below", CPU, None, progress=False)
    shutil.rmtree(tmp_path / "below")
    monkeypatch.setattr(Trainer, "_epoch", None)
    other = fitting.fit_id_model(DATA, settings, tmp_path / "below", CPU, None, progress=False)
    assert one.config == other.config and one.facts == other.facts and one.log == other.log
    there = fitting.open_folder(tmp_path / "below", CPU)
    tiny.assert_same(dict(one.model.state_dict()), dict(there.model.state_dict()))
