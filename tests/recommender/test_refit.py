"""Going on from a fitted model with newer data: what is carried over, what training makes of it, what is refused."""

import json
import os
import signal

import numpy as np
import polars as pl
import pytest
import tiny
import torch

from laserrec import LaserRecommender
from laserrec.cli.fit import refit
from laserrec.config import StudentConfig
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.llm import text_features
from laserrec.methods.all import METHODS
from laserrec.methods.bert4rec import BERT4Rec
from laserrec.methods.sasrec import SASRec
from laserrec.methods.warm_start import carry_sequence_model
from laserrec.recommender.distil import distil
from laserrec.training.trainer import Trainer
from laserrec.util.errors import UserError

N = 16
OLD, NEW = tiny.planted(N, 24), tiny.planted(N + 4, 60, seed=3)
STILL = {"id_model": {"lr": 1e-30, "weight_decay": 0.0}, "train": {"stage_one_epochs": 0, "stage_two_epochs": 0},
         "zesrec": {"lr": 1e-30}, "recformer": {"lr": 1e-30}}
"""Nothing is trained."""
MEAN = {"prompt": {"layout": "text_first", "item_side": "mean", "template": "no_instruction", "max_items": 3,
                   "max_item_tokens": 6},
        "head": {"id_share": 0.3, "id_product": True, "whiten_dims": 8, "projection": True, "seen_offset": True}}


def renumbered(data: Dataset, seed: int = 0) -> Dataset:
    """The same with its items in another order."""
    order = np.random.default_rng(seed).permutation(data.n_items)
    items = data.items[order].with_columns(item=pl.Series(range(data.n_items), dtype=pl.Int32))
    acts = data.interactions.with_columns(item=pl.Series(np.argsort(order)[data.interactions["item"]], dtype=pl.Int32))
    return Dataset(items, data.users, acts, {"sha256": f"{data.fingerprint} renumbered"})


MIXED = renumbered(NEW)


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """name -> a model fitted on OLD; made once."""
    made, place = {}, tmp_path_factory.mktemp("old")

    def get(name, **sections):
        key = json.dumps([name, sections])
        if key not in made:
            made[key] = fit(OLD, place / str(len(made)), name, **sections)
        return made[key]

    return get


def known(model: LaserRecommender) -> tuple[list[int], list[int]]:
    """Rows of the items that OLD has, there and in the model."""
    names = OLD.items["item_id"].to_list()
    return list(range(N)), model.dense_items(names, "items").tolist()


# -- what is carried over -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SASRec, BERT4Rec])
@pytest.mark.parametrize("table", ["ids", "llm_start", "text"])
def test_known_items_keep_their_rows(kind, table):
    config = tiny.ID_MODEL.model_copy(update={"items": table, "kind": kind.__name__.lower()})
    raw = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([4, -1, 0, 1, -1, 2, 3, 5, -1])
    own = raw[[4, 6, 0, 1, 7, 2, 3, 5, 8]]
    torch.manual_seed(1)
    old, new = (kind(config, len(text), None if table == "ids" else text).eval() for text in (raw[:6], own * 2 + 1))
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    carry_sequence_model(new, old, rows, None if table == "ids" else (own, raw[:6]))
    place = torch.argsort(rows)[3:]  # old row -> new row
    torch.testing.assert_close(new.item_embeddings()[place], old.item_embeddings())
    assert torch.equal(new.bias[place], old.bias)
    want = old.score(tiny.histories([0, 3], [5, 1, 2]))
    got = new.score(tiny.histories(place[[0, 3]].tolist(), place[[5, 1, 2]].tolist()))
    torch.testing.assert_close(got[:, place], want, atol=1e-5, rtol=1e-5)
    fresh = new.item_embeddings()[rows < 0]
    assert torch.isfinite(fresh).all() and not torch.equal(fresh[0], fresh[1])
    if table == "text":  # as the old model would read them
        torch.testing.assert_close(fresh, old.adaptor(raw[6:]))


def test_new_items_start_near_those_of_like_text_that_were_trained():
    config = tiny.ID_MODEL.model_copy(update={"items": "llm_start"})
    text = torch.eye(4, 6)
    torch.manual_seed(0)
    old, new = SASRec(config, 4, text), SASRec(config, 3, text[:3])
    old.note_trained(torch.tensor([0, 1, 2]))
    with torch.no_grad():
        old.bias.copy_(torch.arange(4.0))
    theirs = torch.stack([text[1], text[0], 0.7 * text[3] + 0.6 * text[2]])
    carry_sequence_model(new, old, torch.tensor([-1, 0, -1]), (theirs, text))
    torch.testing.assert_close(new.item.weight[0], old.item.weight[1], atol=1e-6, rtol=1e-4)
    assert torch.equal(new.item.weight[1], old.item.weight[0])
    torch.testing.assert_close(new.bias[[0, 2]], torch.tensor([1.0, 2.0]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["sasrec", "bert4rec", "laser", "zesrec"])
def test_a_refit_without_training_is_the_old_model_with_new_items(whole, tmp_path, name):
    old = whole(name, **(MEAN if name == "laser" else {}))
    model = old.refit(MIXED, tmp_path / "m", STILL, progress=False)
    assert model.method == name and len(model.items) == N + 4 and model.n_known == N + 4
    rows, there = known(model)
    torch.testing.assert_close(model.embeddings[there], old.embeddings[rows], atol=1e-5, rtol=1e-5)
    ask, moved = [[0, 1, 2], [5]], [[there[i] for i in row] for row in ([0, 1, 2], [5])]
    got, want = model.score(tiny.histories(*moved)), old.score(tiny.histories(*ask))
    torch.testing.assert_close(got[:, there], want, atol=1e-5, rtol=1e-4)
    assert model.facts["warm_start"] == {"fingerprint": old.facts["fingerprint"], "carried_items": N, "new_items": 4,
                                         "dropped_items": 0}


@pytest.mark.parametrize("table", ["ids", "llm_start"])
def test_texts_that_the_model_has_read_are_not_read_again(whole, tmp_path, monkeypatch, table):
    old, read, means = whole("laser", **MEAN, id_model={"items": table}), [], text_features._means
    monkeypatch.setattr(text_features, "_means", lambda llm, lines, *more: read.append(len(lines))
                        or means(llm, lines, *more))
    old.refit(MIXED, tmp_path / "m", STILL, progress=False)
    assert read == [4]


def test_items_that_were_added_stay_and_removed_ones_are_gone(whole, tmp_path, llm):
    whole("laser", **MEAN).save_pretrained(tmp_path / "old")
    old = LaserRecommender.from_pretrained(tmp_path / "old", llm())
    titles = ["a &amp;amp; saw", "a drill", "steel"]
    old.add_items(pl.DataFrame({"item_id": ["mine", "i18", "mine too"], "title": titles}))
    old.remove_items(["i3", "mine too"])
    for _ in range(2):  # the second time it is there
        model = old.refit(MIXED, tmp_path / "m", STILL, progress=False)
        assert model.items["item_id"].to_list()[N + 4 :] == ["mine"] and not model.unknown_items(["i18", "mine"])
        assert model.unknown_items(["i3", "mine too"]) == ["i3", "mine too"]
        assert model.items["title"][-1] == "a &amp; saw"  # its text is not cleaned once more
    loaded = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    assert loaded.removed == model.removed and loaded.items.equals(model.items)
    assert len(old.items) == N + 3  # it is as it was


def test_of_an_item_that_was_added_again_the_newer_text_stays(whole, tmp_path, llm):
    whole("laser", **MEAN).save_pretrained(tmp_path / "old")
    old = LaserRecommender.from_pretrained(tmp_path / "old", llm())
    for title in ("red paint", "a saw"):
        old.add_items(pl.DataFrame({"item_id": ["mine"], "title": [title]}))
        old.remove_items(["mine"])
    old.add_items(pl.DataFrame({"item_id": ["mine"], "title": ["corrected"]}))
    model = old.refit(MIXED, tmp_path / "m", STILL, progress=False)
    assert model.items.filter(item_id="mine")["title"].to_list() == ["corrected"]


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sasrec", "bert4rec", "laser"])
def test_a_refit_is_no_worse_than_the_model_that_it_starts_from(whole, tmp_path, name):
    more = renumbered(tiny.planted(N, 120, seed=5), seed=2)
    old = whole(name, **(MEAN if name == "laser" else {}))
    still = old.refit(more, tmp_path / "still", STILL, progress=False)
    model = old.refit(more, tmp_path / "m", {"id_model": {"max_epochs": 5}}, progress=False)
    before, after = (evaluate(name, m, more, "validation", 5).plain.ndcg for m in (still, model))
    assert after >= before and (name == "laser" or after > before)


def test_where_training_does_not_help_the_start_is_kept(whole, tmp_path, monkeypatch):
    old = whole("sasrec")
    model = old.refit(MIXED, tmp_path / "m", {"id_model": {"lr": 30.0, "max_epochs": 2}}, progress=False)
    assert model.facts["training"]["kept"]["epoch"] == 0
    rows, there = known(model)
    torch.testing.assert_close(model.embeddings[there], old.embeddings[rows])


@pytest.mark.parametrize("name", ["sasrec", "laser"])
@pytest.mark.parametrize("at", [2, 9])
def test_an_interrupted_refit_goes_on_to_the_same_model(whole, tmp_path, monkeypatch, name, at):
    old = whole(name)
    want = old.refit(MIXED, tmp_path / "whole", {"id_model": {"max_epochs": 3}}, progress=False)
    left, step = [at], Trainer._step

    def stopping(self, *arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            old.refit(MIXED, tmp_path / "m", {"id_model": {"max_epochs": 3}}, progress=False)
    assert not (tmp_path / "m" / "model.json").exists()
    torch.manual_seed(77)
    model = old.refit(MIXED, tmp_path / "m", {"id_model": {"max_epochs": 3}}, progress=False)
    asked = tiny.histories([0, 1], [7])
    torch.testing.assert_close(model.score(asked), want.score(asked), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [str, lambda folder: folder, Dataset.load])
def test_a_data_folder_is_loaded(tmp_path, kind):
    acts, goods = tiny.planted_tables(N, 24)
    config = tiny.config("none", data={"min_user_interactions": 1, "min_item_interactions": 1})
    old = LaserRecommender.fit(acts, goods, config, tmp_path / "run", method="ease", device="cpu", progress=False)
    new = old.refit(kind(tmp_path / "run" / "data"), tmp_path / "m", progress=False)
    again = LaserRecommender.fit_dataset(kind(tmp_path / "run" / "data"), config, tmp_path / "n", "ease", device="cpu",
                                         progress=False)
    want = old.recommend([["i1", "i2"]], k=3)
    assert new.recommend([["i1", "i2"]], k=3).equals(want) and again.recommend([["i1", "i2"]], k=3).equals(want)


def test_a_closed_form_is_fitted_anew(whole, fit, tmp_path):
    asked = tiny.histories([0, 1], [7])
    for name in ("ease", "ease-text", "popularity"):
        model = whole(name).refit(MIXED, tmp_path / f"{name}-1", progress=False)
        torch.testing.assert_close(model.score(asked), fit(MIXED, tmp_path / f"{name}-2", name).score(asked))


@pytest.mark.parametrize(("name", "anew"), [("ease", True), ("lrurec", True), ("sasrec", False)])
def test_a_refit_from_nothing_is_told(whole, tmp_path, capsys, name, anew):
    for there in (False, True):
        whole(name).refit(MIXED, tmp_path / "m", progress=True)
        assert (f"{name} can't go on from its weights: it is fitted" in capsys.readouterr().err) == (anew and not there)


def test_the_help_names_the_methods_that_go_on_from_their_weights():
    short, anew = refit.__doc__.split("Other\n")[0], LaserRecommender.refit.__doc__
    assert all((f" {name}" in short) == (method.carry is not None) for name, method in METHODS.items())
    assert all(name in anew for name, method in METHODS.items() if method.carry is None and method.sections != (
        "neighbours",) and name != "popularity")


@pytest.mark.parametrize("name", ["sasrec", "ease"])
def test_the_card_keeps_what_it_was_told(whole, tmp_path, llm, name):
    whole(name).save_pretrained(tmp_path / "old", licence="MIT", data_name="A shop")
    old = LaserRecommender.from_pretrained(tmp_path / "old", llm())
    model = old.refit(MIXED, tmp_path / "m", progress=False)
    assert model.facts["card"] == {"licence": "MIT", "data_name": "A shop"}
    assert "| data set | A shop |" in (tmp_path / "m" / "README.md").read_text()
    model.save_pretrained(tmp_path / "m", data_name="A shop until May")
    again = old.refit(MIXED, tmp_path / "m", progress=False)
    assert again.facts["card"] == {"licence": "MIT", "data_name": "A shop until May"}


def test_the_neighbours_are_those_of_the_new_data_and_the_blend_is_chosen_again(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("laserrec.methods.laser.finish._FEWEST_USERS", 10)
    sections = {**MEAN, "neighbours": {"count": 6, "l2": 1.0}, "blend": {"trials": 30, "regressions": 0}}
    model = whole("laser", **sections).refit(MIXED, tmp_path / "m", progress=False)
    assert model.facts["training"]["parts"]["users"] == 60
    if model.model.neighbours is not None:
        assert len(model.model.neighbours.items) == N + 4


# -- folders and refusals ---------------------------------------------------------------------------------------------


def test_a_finished_refit_is_loaded_and_another_one_refused(whole, fit, tmp_path, monkeypatch):
    model, another = whole("sasrec").refit(MIXED, tmp_path / "m", progress=False), whole("bert4rec")
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it trains"))
    again = whole("sasrec").refit(MIXED, tmp_path / "m", progress=False)
    assert torch.equal(again.embeddings, model.embeddings)
    for other, data in ((another, MIXED), (model, MIXED), (whole("sasrec"), OLD)):
        with pytest.raises(UserError, match="another method, other settings or other data"):
            other.refit(data, tmp_path / "m", progress=False)
    with pytest.raises(UserError, match="another method, other settings or other data"):
        fit(MIXED, tmp_path / "m", "sasrec")  # a fit from nothing is another model


@pytest.mark.parametrize(("changes", "told"), [
    ({"head": {"id_share": 0.5}}, r"head\.id_share can't change in a refit"),
    ({"prompt": {"max_items": 2}}, r"prompt\.max_items can't change in a refit"),
    ({"id_model": {"d_id": 32}}, r"id_model\.d_id can't change in a refit"),
    ({"zesrec": {"d_model": 32}}, r"zesrec\.d_model can't change in a refit"),
    ({"train": {"learning": 3}}, r"train\.learning"),
    ({"lr": 1}, r"changes are settings by section, as .*, not .'lr': 1."),
    ({"train": None}, r"changes are settings by section, .*, not .'train': None."),
    ({"nothing": {"lr": 1}}, r"nothing\.lr can't change"),
    ({"train": {"learn_temperature": True}}, r"other weights than the one to go on from \(log_temperature\)"),
])
def test_settings_that_the_weights_depend_on_can_t_change(whole, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        whole("laser").refit(MIXED, tmp_path / "m", changes, progress=False)


def test_what_can_t_be_refitted_is_told(whole, tmp_path):
    names = [f"x{j}" for j in range(N)]
    strangers = Dataset(OLD.items.with_columns(item_id=pl.Series(names)), OLD.users, OLD.interactions, {"sha256": "x"})
    with pytest.raises(UserError, match="knows none of the items of this data"):
        whole("sasrec").refit(strangers, tmp_path / "m", progress=False)
    fast = distil(whole("laser"), OLD, tmp_path / "fast", StudentConfig(hidden=8, epochs=1), False)
    with pytest.raises(UserError, match="refit the model that it was distilled from"):
        fast.refit(MIXED, tmp_path / "n", progress=False)
