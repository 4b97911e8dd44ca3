"""Many data sets in small, and the rivals' tuning."""

import gzip
import json
import shutil

import pytest
import tiny

from laserrec.config import Config, merge
from laserrec.experiments import datasets, tuning
from laserrec.experiments.datasets import RIVALS, means, reproduce
from laserrec.experiments.quality import LASER
from laserrec.experiments.tuning import tune
from laserrec.recommender import fitting
from laserrec.util.device import CPU
from laserrec.util.errors import UserError


@pytest.fixture
def root(tmp_path):
    for name, users in (("hats", 30), ("shoes", 40)):
        folder = tmp_path / "root" / name
        folder.mkdir(parents=True)
        acts, items = tiny.planted_tables(15, users)
        (folder / "interactions.csv.gz").write_bytes(gzip.compress(acts.write_csv().encode()))
        lines = "\n".join(json.dumps(row) for row in items.select("item_id", "title", "brand", "category").to_dicts())
        (folder / "items.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path / "root"


@pytest.fixture
def small(llm_folder, monkeypatch):
    few = {"id_model.max_epochs": [1, 2]}
    changed = [r if r.method != "sasrec" else r.__class__(r.name, r.kind, r.method, {"id_model": {
        **tiny.ID_MODEL.model_dump(), "max_epochs": 1, "items": r.start["id_model"]["items"]}}, few, True)
        for r in RIVALS]
    monkeypatch.setattr(datasets, "RIVALS", tuple(changed))
    return tiny.config(llm_folder(), train={"stage_one_epochs": 1, "stage_two_epochs": 0},
                       data={"min_item_interactions": 1, "min_user_interactions": 2}, head={"whiten_dims": 8},
                       prompt={"layout": "text_first", "item_side": "plain", "max_items": 2, "max_item_tokens": 4})


def test_all_models_on_all_data_sets_and_nothing_twice(root, small, tmp_path, monkeypatch):
    trained = []

    def fit(method, dataset, config, folder, *rest, **more):
        trained.extend([] if (folder / "model.json").is_file() else [(method, folder.parent.name)])
        return fitting.fit(method, dataset, config, folder, *rest, **more)

    monkeypatch.setattr(tuning, "fit", fit)
    monkeypatch.setattr("laserrec.experiments.table.fit", fit)
    rows = reproduce(root, [], tmp_path / "out", small, [0, 1], 3, progress=False, device="cpu")
    assert {row["data"] for row in rows} == {"hats", "shoes"}
    for data in ("hats", "shoes"):
        own = [row for row in rows if row["data"] == data]
        assert {row["model"] for row in own} == {LASER, *(r.name for r in RIVALS)}
        assert sum(row["model"] == "SASRec" for row in own) == 2 and sum(row["model"] == "EASE" for row in own) == 1
    assert json.loads((tmp_path / "out" / "datasets.json").read_text()) == rows
    tried = {row["model"]: row["trials"] for row in rows}
    assert tried[LASER] == 0 and tried["popularity"] == 1 and tried["EASE"] == 3 and tried["SASRec"] == 2
    assert [trained.count(("sasrec", place)) for place in ("trials", "seed-0", "seed-1")] == [8, 0, 4]
    assert [trained.count(("ease", place)) for place in ("trials", "hats", "shoes")] == [6, 0, 0]
    assert not list((tmp_path / "out").glob("*/trials"))
    table = means(rows, 10)
    assert len(table) == 16 and {row["seeds"] for row in table if row["model"] == LASER} == {2}
    monkeypatch.setattr(tuning, "fit", None)  # nothing is fitted twice
    monkeypatch.setattr("laserrec.experiments.table.fit", None)
    assert reproduce(root, [], tmp_path / "out", small, [0, 1], 3, progress=False, device="cpu") == rows


def test_the_best_setting_on_validation_is_kept(small, tmp_path, monkeypatch):
    data, features = tiny.planted(15, 30), None
    asked = []

    def fit(method, dataset, config, *_, **__):
        asked.append((config.neighbours.l2, config.neighbours.decay))
        ndcg = {200.0: 0.3, 100.0: 0.4, 400.0: 0.2}[config.neighbours.l2] + (config.neighbours.decay == 0.5) / 10
        facts = {"training": {"seconds": 2.0, "kept": {"validation_ndcg@10": ndcg}}}
        return type("Fitted", (), {"facts": facts})

    monkeypatch.setattr(tuning, "fit", fit)
    choices = {"neighbours.l2": [100.0, 200.0, 400.0], "neighbours.decay": [0.5, 0.8]}
    found = tune("ease", {}, choices, 20, data, small, features, CPU, tmp_path / "t.jsonl")
    assert found.settings == {"neighbours": {"l2": 100.0, "decay": 0.5}} and found.ndcg == pytest.approx(0.5)
    assert found.trials == len(asked) == len(set(asked)) and found.seconds == 2.0 * found.trials
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write('{"key": "torn')  # a killed run
    again = tune("ease", {}, choices, 20, data, small, features, CPU, tmp_path / "t.jsonl")
    assert again == found and len(asked) == found.trials
    bounded = tune("ease", {}, choices, 2, data, small, features, CPU, tmp_path / "other.jsonl")
    assert bounded.trials == 2


def test_settings_that_change_together(small, tmp_path, monkeypatch):
    """Either change alone is worse than none."""
    def fit(method, dataset, config, *_, **__):
        own = config.neighbours
        ndcg = {(200.0, 0.8): 0.3, (100.0, 0.5): 0.4}.get((own.l2, own.decay), 0.1)
        facts = {"training": {"seconds": 2.0, "kept": {"validation_ndcg@10": ndcg}}}
        return type("Fitted", (), {"facts": facts})

    monkeypatch.setattr(tuning, "fit", fit)
    start = {"neighbours": {"l2": 200.0, "decay": 0.8}}
    both = {("neighbours.l2", "neighbours.decay"): [(50.0, 0.9), (100.0, 0.5)], "neighbours.row_power": [0.5]}
    found = tune("ease", start, both, 20, tiny.planted(15, 30), small, None, CPU, tmp_path / "t.jsonl")
    assert found.settings == {"neighbours": {"l2": 100.0, "decay": 0.5}} and found.ndcg == 0.4


def test_the_best_trials_model_is_kept(small, tmp_path, monkeypatch):
    """Also where another trial is the same model, since a value is the config's own."""
    def fit(method, dataset, config, folder, *_, **__):
        folder.mkdir(parents=True)
        facts = {"training": {"seconds": 2.0, "kept": {"validation_ndcg@10": config.neighbours.decay}}}
        return type("Fitted", (), {"facts": facts})

    monkeypatch.setattr(tuning, "fit", fit)
    choices = {"neighbours.decay": [0.4, 0.9], "neighbours.l2": [small.neighbours.l2]}
    found = tune("ease", {"neighbours": {"decay": 0.6}}, choices, 20, tiny.planted(15, 30), small, None, CPU,
                 tmp_path / "t.jsonl")
    assert found.ndcg == 0.9 and found.trials == 3
    assert [found.folder] == list((tmp_path / "trials").iterdir()) and found.key.startswith(found.folder.name)


def test_missing_data_sets_are_named(root, small, tmp_path):
    with pytest.raises(UserError, match=r"no data set 'gloves' in .*; there are: hats, shoes"):
        reproduce(root, ["gloves"], tmp_path / "out", small, [0], 1, progress=False, device="cpu")
    shutil.rmtree(root)
    with pytest.raises(UserError, match=r"holds no data sets; each is a folder with interactions\.csv\.gz"):
        reproduce(root, [], tmp_path / "out", Config(), [0], 1, progress=False, device="cpu")


def test_a_smaller_call_leaves_what_was_measured(root, small, tmp_path):
    def rows(names, seeds, trials, models, config=small):
        return reproduce(root, names, tmp_path / "out", config, seeds, trials, progress=False, device="cpu",
                         models=models)

    def places(lines):
        return [(line["data"], line["model"], line["seed"]) for line in lines]

    first = rows([], [0, 1], 1, ["ease", "popularity", "sasrec"])
    assert len(first) == 2 * 4
    again = rows(["hats"], [0], 1, ["sasrec"])
    assert len(again) == 8 and all(line in again for line in first)
    assert json.loads((tmp_path / "out" / "datasets.json").read_text()) == again
    more = rows(["hats"], [0], 2, ["sasrec"])  # two epochs are better: the other seed's one epoch isn't shown as theirs
    assert more[0]["settings"]["id_model"]["max_epochs"] == 2
    assert set(places(more)) == set(places(first)) - {("hats", "SASRec", 1)}
    other = Config.model_validate(merge(small.model_dump(), {"eval": {"batch_size": 7}}))
    assert places(rows(["hats"], [0], 1, ["ease"], other)) == [
        ("hats", "EASE", None), *[place for place in places(first) if place[0] == "shoes"]]


def test_no_rival_is_tuned_without_validation(root, small, tmp_path):
    blind = small.model_copy(update={"eval": small.eval.model_copy(update={"validates": False})})
    with pytest.raises(UserError, match=r"eval\.validates is false; set it to true, or fit Laser alone"):
        reproduce(root, ["hats"], tmp_path / "out", blind, [0], 1, progress=False, device="cpu", models=["ease"])
    assert not (tmp_path / "out").exists()
    rows = reproduce(root, ["hats"], tmp_path / "out", blind, [0], 1, progress=False, device="cpu", models=["laser"])
    assert [row["model"] for row in rows] == [LASER]


def test_a_longer_search_may_find_other_settings(root, small, tmp_path):
    def rows(trials):
        return reproduce(root, ["hats"], tmp_path / "out", small, [0], trials, progress=False, device="cpu",
                         models=["ease"])

    one, more = rows(1), rows(9)
    assert one[0]["settings"] != more[0]["settings"] and one[0]["ndcg@10"] != more[0]["ndcg@10"]
    assert rows(1) == one


def test_some_of_the_models(root, small, tmp_path):
    rows = reproduce(root, ["hats"], tmp_path / "out", small, [0], 1, progress=False, device="cpu",
                     models=["popularity", "ease"])
    assert [row["model"] for row in rows] == ["popularity", "EASE"]
    with pytest.raises(UserError, match=r"there is no .easel. in this table; there are: "):
        reproduce(root, ["hats"], tmp_path / "out", small, [0], 1, progress=False, models=["easel"])
