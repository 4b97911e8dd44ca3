"""Figure 3: who is learnt from, what a transfer gives where it must, what is found again, what the files hold."""

import json

import planted_texts
import pytest
import tiny

from laserrec.cli.reproduce import reproduce_app
from laserrec.config import Config, merge
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.experiments import table as tables
from laserrec.experiments.paper import curves, transfer
from laserrec.experiments.paper.run import Setup
from laserrec.recommender import fitting
from laserrec.util.errors import UserError

SMALL = {"data": {"min_user_interactions": 2, "min_item_interactions": 1},
         "prompt": tiny.QUICK | {"layout": "text_first", "item_side": "mean", "max_item_tokens": 8},
         "head": {"whiten_dims": 8, "projection": True},
         "train": {"stage_one_epochs": 1, "stage_two_epochs": 0, "batch_size": 32}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two shops that share nothing but the words of their titles and what follows what."""
    place = tmp_path_factory.mktemp("shops")
    for number, name in enumerate(("here", "there")):
        raw = from_frames(*planted_texts.shop(name, seed=number))
        prepare(raw.interactions, raw.items, tiny.config("none", **SMALL).data, place / name)
    return {name: place / name for name in ("here", "there")}


@pytest.fixture
def rivals(monkeypatch):
    """Of a few neurons, whatever the figure's own settings are."""
    rows = transfer.transferred()
    small = {"recformer": {"recformer": tiny.RIVALS["recformer"]}, "laser": {},
             "zesrec": {"zesrec": tiny.RIVALS["zesrec"] | {"max_epochs": 25, "dropout": 0.0}},
             "sasrec": {"id_model": tiny.ID_MODEL.model_dump() | {"items": "text", "max_epochs": 40, "lr": 1e-2,
                                                                      "dropout": 0.0}}}
    own = [tables.Row(row.name, row.kind, row.method, small[row.method]) for row in rows]
    monkeypatch.setattr(transfer, "transferred", lambda: own)


@pytest.fixture
def setup(data, llm_folder, tmp_path):
    return Setup(data, {"tiny": tiny.config(llm_folder(), **SMALL)}, tmp_path / "paper", "cpu", progress=False)


# -- who is learnt from -----------------------------------------------------------------------------------------------


def test_users_that_are_left_out_are_in_no_training_and_no_validation_input():
    whole = tiny.planted(20, 40)
    part = transfer.few_users(whole, 25, seed=3)
    kept = set(part.train_users.tolist())
    assert len(kept) == 10 and set(part.interactions["user"]) == kept
    assert set(part.cases("validation").users.tolist()) == kept and len(part.cases("test")) == 0
    assert part.items.equals(whole.items) and part.fingerprint != whole.fingerprint
    whole_of = dict(zip(whole.train_users.tolist(), whole.train_sequences.lists(), strict=True))
    assert dict(zip(part.train_users.tolist(), part.train_sequences.lists(), strict=True)) == {
        user: whole_of[user] for user in kept}


def test_a_larger_share_of_a_seed_holds_the_smaller_ones():
    whole = tiny.planted(20, 40)
    drawn = [set(transfer.few_users(whole, percent, 1).train_users.tolist()) for percent in (5, 50, 100)]
    assert drawn[0] < drawn[1] < drawn[2] == set(whole.train_users.tolist())
    assert drawn[1] != set(transfer.few_users(whole, 50, 2).train_users.tolist())
    names = {transfer.few_users(whole, percent, seed).fingerprint for percent in (5, 50) for seed in (1, 2)}
    assert len(names) == 4
    with pytest.raises(UserError, match="1% of 40 training users is no user"):
        transfer.few_users(whole, 1, 0)


def test_no_fit_of_the_target_sees_a_user_that_was_not_drawn(setup, rivals, monkeypatch):
    seen, own = [], fitting.fit

    def fit(method, dataset, *rest):
        seen.append(dataset)
        return own(method, dataset, *rest)

    monkeypatch.setattr(tables, "fit", fit)
    transfer.reproduce(setup, [0], [0, 10], ["zesrec"], ["here"])
    there = Dataset.load(setup.data["there"])
    drawn = set(transfer.few_users(there, 10, 0).train_users.tolist())
    assert len(drawn) == 6 and len(seen) >= 3
    for dataset in seen:
        if dataset.items["item_id"][0].startswith("there"):
            assert set(dataset.interactions["user"]) == drawn and "test" not in dataset.interactions["split"]


# -- what it finds ----------------------------------------------------------------------------------------------------


def test_what_was_learnt_in_one_shop_helps_in_the_other(setup, rivals, monkeypatch):
    result = transfer.reproduce(setup, [0], [0, 2, 100], ["zesrec", "Text SASRec"], ["here"])
    found = {(row["model"], row["start"], row["percent"]): row for row in result["rows"]}
    assert len(found) == 2 * 5 and result["missing"] == []
    for model in ("ZESRec", "text SASRec"):  # 10 of 40 items are 0.25 by chance
        zero, few, alone = (found[model, *point] for point in (("transfer", 0), ("transfer", 2), ("nothing", 2)))
        assert zero["recall@10"] > 0.9 and zero["training_users"] == 0 and zero["train_seconds"] == 0
        assert few["recall@10"] > 0.9 > 0.7 > alone["recall@10"] and few["training_users"] == 1
        assert few["fingerprint"] != zero["fingerprint"] != alone["fingerprint"]
    everyone = found["ZESRec", "nothing", 100]
    assert everyone["training_users"] == 60
    kept = setup.out / "there" / "tiny" / "seed-0" / "zesrec.json"  # where the other tables have it
    assert json.loads(kept.read_text())["ndcg@10"] == everyone["ndcg@10"]

    monkeypatch.setattr(tables, "fit", lambda *_: pytest.fail("it fits again"))
    monkeypatch.setattr(tables, "evaluate", lambda *_: pytest.fail("it ranks again"))
    again = transfer.reproduce(setup, [0], [0, 2, 100], ["zesrec", "text-sasrec"], ["here"])
    assert again["rows"] == result["rows"] == json.loads((setup.out / "figure3.json").read_text())["rows"]


def test_a_budget_leaves_the_rest_and_the_next_call_goes_on(setup, rivals):
    nothing = transfer.reproduce(setup, [0], [0, 10], ["zesrec"], ["here"], until=0.0)
    assert nothing["rows"] == [] and [row["percent"] for row in nothing["missing"]] == [0, 10, 10]
    first = transfer.reproduce(setup, [0], [0], ["zesrec"], ["here"])
    both = transfer.reproduce(setup, [0], [0, 10], ["zesrec"], ["here"], until=0.0)
    assert both["rows"] == first["rows"] and len(both["missing"]) == 2
    assert "budget" in curves.markdown(both)


def test_a_smaller_call_leaves_what_was_measured_with_the_same_settings(setup, rivals):
    first = transfer.reproduce(setup, [0], [0, 10], ["zesrec"], ["here"])["rows"]
    both = transfer.reproduce(setup, [1], [0], ["zesrec"], ["there"])
    assert len(first) == 3 and len(both["rows"]) == 4 and both["missing"] == []
    assert all(row in both["rows"] for row in first)
    assert json.loads((setup.out / "figure3.json").read_text())["rows"] == both["rows"]
    base = Config.model_validate(merge(setup.bases["tiny"].model_dump(), {"eval": {"batch_size": 7}}))
    other = Setup(setup.data, {"other": base}, setup.out, "cpu", progress=False)
    assert transfer.reproduce(other, [0], [0], ["zesrec"], ["here"], until=0.0)["rows"] == both["rows"]
    other = Setup(setup.data, {"tiny": base}, setup.out, "cpu", progress=False)
    changed = transfer.reproduce(other, [0], [0], ["zesrec"], ["here"])["rows"]
    assert [(row["source"], row["seed"], row["percent"]) for row in changed] == [("here", 0, 0)]


def test_another_source_model_is_another_result(setup, rivals, tmp_path):
    first = transfer.reproduce(setup, [0], [0, 50], ["zesrec"], ["here"])["rows"]
    raw = from_frames(*planted_texts.shop("here", seed=7))
    prepare(raw.interactions, raw.items, setup.bases["tiny"].data, tmp_path / "here")
    other = Setup({**setup.data, "here": tmp_path / "here"}, setup.bases, tmp_path / "other", "cpu", progress=False)
    second = transfer.reproduce(other, [0], [0, 50], ["zesrec"], ["here"])["rows"]
    same = [one["fingerprint"] == two["fingerprint"] for one, two in zip(first, second, strict=True)]
    assert [row["start"] for row in first] == ["transfer", "transfer", "nothing"] and same == [False, False, True]


# -- from the command to the files ----------------------------------------------------------------------------------


def test_the_command_writes_all_files_for_all_models(data, rivals, llm_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    settings = tmp_path / "tiny.toml"
    settings.write_text(f"""
        [backbone]
        name = '{llm_folder()}'
        layers = 1
        mean_layers = [1]
        precision = "fp32"
        [id_model]
        items = "ids"
        d_id = 16
        heads = 2
        max_epochs = 1
        [mformer]
        experts = 2
        queries = 2
        blocks = 2
        d_model = 16
        heads = 2
        [head]
        whiten_dims = 8
        [train]
        stage_one_epochs = 1
        [neighbours]
        count = 5
        """)
    words = ["figure3", tmp_path / "out", "--data", *data.values(), "--sources", "here", "--percents", 0, 20, "--bases",
             "quickstart", "--config", settings, "--device", "cpu", "--quiet", "--json", tmp_path / "f.json"]
    with pytest.raises(SystemExit) as stop:
        reproduce_app(list(map(str, words)))
    assert not stop.value.code
    result = json.loads((tmp_path / "f.json").read_text())
    assert {(row["model"], row["start"], row["percent"]) for row in result["rows"]} == {
        (model, *point) for model in ("Laser", "RECFORMER", "ZESRec", "text SASRec")
        for point in (("transfer", 0), ("transfer", 20), ("nothing", 20))}
    assert all(row["mrr"] > 0 and row["source"] == "here" and row["target"] == "there" for row in result["rows"])
    said, text = capsys.readouterr().out, (tmp_path / "out" / "figure3.md").read_text()
    zero = next(row for row in result["rows"] if row["model"] == "Laser" and row["percent"] == 0)
    assert f"{zero['ndcg@10']:.4f}" in said and "## here to there, preset quickstart" in text
    assert f"| Laser | from the source's model | {zero['ndcg@10']:.4f} |" in text
    assert (tmp_path / "out" / "figure3.png").read_bytes().startswith(b"\x89PNG")
    assert result["machine"]["cores"] >= 1


def test_means_and_deviations_over_seeds():
    row = {"source": "a", "target": "b", "base": "small", "model": "m", "start": "transfer", "percent": 10.0}
    rows = [{**row, "seed": seed, "ndcg@10": value, "recall@10": value} for seed, value in ((0, 0.1), (1, 0.3))]
    rows.append({**row, "start": "nothing", "percent": 100.0, "seed": 0, "ndcg@10": 0.5, "recall@10": 0.5})
    panel = curves.lines(rows, "ndcg@10")["a", "b", "small"]
    heads, cells = curves.table(panel)
    assert heads == ["model", "start", "10%", "100%"]
    assert cells == [["m", "from the source's model", "0.2000 ± 0.1414", ""], ["m", "from nothing", "", "0.5000"]]


@pytest.mark.parametrize(("given", "told"), [
    ({"models": ["lasr"]}, "there is no 'lasr' in figure3; there are: Laser, RECFORMER, ZESRec, text SASRec"),
    ({"percents": [101]}, "101% of the training users makes no sense"),
    ({"sources": ["nowhere"]}, "source 'nowhere' is none of the data sets: here, there"),
])
def test_what_makes_no_sense_is_told(setup, given, told):
    with pytest.raises(UserError, match=told):
        transfer.reproduce(setup, [0], **given)


def test_one_data_set_is_not_enough(setup):
    alone = Setup({"here": setup.data["here"]}, setup.bases, setup.out, progress=False)
    with pytest.raises(UserError, match="from one data set to another"):
        transfer.reproduce(alone, [0])
