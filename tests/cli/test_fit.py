"""Fitting from the command line: every method, resumed, refused, with items that nobody bought yet."""

import json
import re
import shutil

import polars as pl
import pytest

from laserrec.cli.fit import fit
from laserrec.config import load_config
from laserrec.data.dataset import Dataset
from laserrec.methods.all import METHODS
from laserrec.recommender import recommender
from laserrec.recommender.recommender import LaserRecommender


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_fitted_evaluated_and_recommends(run, settings, data, tmp_path, method):
    model, numbers = tmp_path / "model", tmp_path / "numbers.json"
    code, out, err = run("fit", data, model, "--method", method, "--config", settings, "--quiet", "--json", numbers)
    assert code == 0 and err == "", err
    facts = json.loads(numbers.read_text())
    assert facts["method"] == method and facts["kept"].keys() >= {"phase", "epoch", "validation_ndcg@10"}
    assert f"{method} in {model}: validation NDCG@10 {facts['kept']['validation_ndcg@10']:.4f}" in out
    assert f"({facts['kept']['phase']}" in out
    code, out, err = run("evaluate", data, model, "--split", "validation", "--quiet", "--json", numbers)
    assert code == 0, err
    assert json.loads(numbers.read_text())[0]["ndcg@10"] == pytest.approx(facts["kept"]["validation_ndcg@10"])
    code, _, err = run("recommend", model, "--history", "i1,i2", "--k", 3, "--json", numbers)
    assert code == 0 and [row["rank"] for row in json.loads(numbers.read_text())] == [1, 2, 3], err
    code, out, _ = run("fit", data, model, "--method", method, "--config", settings, "--quiet")
    assert code == 0 and "was there already" in out


def test_the_help_names_every_method():
    named = re.search(r"\n *method\n(.+?)\n *id_model\n", fit.__doc__, re.DOTALL)[1]
    assert {*re.findall(r"[\w-]+", named)} - {"or"} == {*METHODS}


def test_settings_come_from_preset_file_and_flags(run, settings, data, tmp_path):
    model = tmp_path / "model"
    code, _, err = run("fit", data, model, "--config", settings, "--quiet", "--train.lr", "2e-3")
    assert code == 0, err
    tree = json.loads((model / "model.json").read_text())["config"]
    assert tree["train"]["lr"] == 2e-3  # the flag
    assert tree["mformer"]["experts"] == 2  # the file
    assert tree["train"]["negatives"] == "sampled"  # the preset
    code, _, err = run("fit", data, model, "--config", settings, "--train.lr", "0.5", "--quiet")
    assert code == 2 and "other settings" in err


def test_one_seed_for_all_parts(run, data, tmp_path):
    """--seed is every part's, but for those that have a flag of their own."""
    code, _, err = run("fit", data, tmp_path / "m", "--method", "popularity", "--seed", "3", "--train.seed", "5",
                       "--quiet")
    assert code == 0, err
    tree = json.loads((tmp_path / "m" / "model.json").read_text())["config"]
    seeds = {name: section["seed"] for name, section in tree.items() if section and "seed" in section}
    assert seeds.pop("train") == 5 and {"id_model", "zesrec", "llamarec"} < set(seeds) and set(seeds.values()) == {3}


def test_an_id_model_of_its_own(run, settings, data, tmp_path):
    """pretrain fits the kind that the settings name; fit takes its folder, and no other."""
    ids, model = tmp_path / "ids", tmp_path / "model"
    code, out, err = run("pretrain", data, ids, "--config", settings, "--id-model.kind", "bert4rec", "--quiet")
    assert code == 0 and f"bert4rec in {ids}" in out, err
    code, _, err = run("fit", data, model, "--id-model", ids, "--config", settings, "--quiet")
    assert code == 0, err
    own = json.loads((model / "model.json").read_text())["config"]["id_model"]
    assert own["kind"] == "bert4rec" and own["items"] == load_config("small", settings).id_model.items
    code, _, err = run("fit", data, tmp_path / "x", "--method", "sasrec", "--id-model", ids, "--config", settings)
    assert code == 2 and "method sasrec takes no ID model" in err
    code, _, err = run("pretrain", data, tmp_path / "x", "--preset", "instant")
    assert code == 2 and "these settings have no ID model" in err


@pytest.fixture
def with_new(data, tmp_path):
    """The data folder with two items that nobody bought."""
    folder = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("text_features"))
    pl.DataFrame({"item_id": ["new1", "new2"], "title": ["steel drill 99", "red paint [5 l]"], "brand": ["x", None],
                  "category": [None, None]}, schema_overrides={"category": pl.String}
                 ).write_parquet(folder / "new_items.parquet")
    return folder


def test_items_that_nobody_bought_can_be_recommended(run, settings, with_new, tmp_path):
    model, numbers = tmp_path / "model", tmp_path / "numbers.json"
    arguments = ("fit", with_new, model, "--config", settings, "--quiet", "--json", numbers)
    for _ in range(2):  # the second time they are there already
        code, out, err = run(*arguments)
        assert code == 0 and "2 items without enough interactions can be recommended too" in out, err
        assert json.loads(numbers.read_text())["new_items"] == 2
        items = LaserRecommender.from_pretrained(model).items["item_id"].to_list()
        assert items[-2:] == ["new1", "new2"] and len(items) == len({*items}) == 12
    code, out, err = run("evaluate", with_new, model, "--quiet")
    assert code == 0 and "all 10 items ranked" in out, err
    code, out, err = run("recommend", model, "--history", "new2", "--k", "12", "--exclude", "i1, i2")
    assert code == 0 and "paint [5 l]" in out, err


def test_a_method_of_ids_leaves_them_out_and_tells(run, settings, with_new, tmp_path):
    code, out, err = run("fit", with_new, tmp_path / "model", "--method", "ease", "--config", settings, "--quiet")
    assert code == 0 and "2 items without enough interactions are left out: ease can't take items" in out, err


@pytest.mark.parametrize("command", [["fit"], ["pretrain"]])
def test_the_device_is_handed_down(run, settings, data, tmp_path, monkeypatch, command):
    asked = []
    monkeypatch.setattr(recommender, "choose", lambda name: asked.append(name) or stop())

    def stop():
        raise KeyboardInterrupt

    code, *_ = run(*command, data, tmp_path / "model", "--config", settings, "--device", "cuda:1")
    assert code == 130 and asked == ["cuda:1"]


def test_ctrl_c_tells_how_to_go_on(run, monkeypatch, tmp_path):
    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(Dataset, "load", staticmethod(stop))
    code, _, err = run("pretrain", tmp_path, tmp_path / "out")
    assert code == 130 and "run the same command again" in err


def test_distilling(run, settings, data, tmp_path):
    model, fast, numbers = tmp_path / "model", tmp_path / "fast", tmp_path / "numbers.json"
    code, _, err = run("fit", data, model, "--config", settings, "--quiet")
    assert code == 0, err
    code, out, err = run("distil", data, model, fast, "--epochs", 1, "--hidden", 8, "--quiet", "--json", numbers)
    assert code == 0 and "teacher" in out and "answers without the LLM" in out, err
    facts = json.loads(numbers.read_text())
    assert facts.keys() == {"config", "histories", "seconds", "validation"} and facts["config"]["hidden"] == 8
    assert f"{facts['validation']['student']['ndcg@10']:.4f}" in out
    code, _, err = run("distil", data, model, tmp_path / "x", "--epochs", 0)
    assert code == 2 and "epochs: Input should be greater" in err
