"""The card says what was recorded, all of it and nothing else; the hub's library reads its metadata."""

import json
import re

import polars as pl
import pytest
import tiny
from huggingface_hub import ModelCard

from laserrec import LaserRecommender
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.evaluation.evaluate import evaluate
from laserrec.llm.fetch import DEFAULT_NAME
from laserrec.methods.all import METHODS
from laserrec.recommender.card import card_text
from laserrec.recommender.folder import update_note
from laserrec.recommender.results import record_result
from laserrec.recommender.scorers import FirstItems

N = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "data"
    raw = from_frames(*tiny.planted_tables(N, users=16))
    prepare(raw.interactions, raw.items, tiny.config("none", data={"min_user_interactions": 2}).data, folder)
    return Dataset.load(folder)


@pytest.fixture(scope="module")
def fitted(data, fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "tools"
    fit(data, folder, train={"stage_one_epochs": 1, "stage_two_epochs": 0, "batch_size": 32})
    return folder


@pytest.fixture
def model(fitted, llm):
    return LaserRecommender.from_pretrained(fitted, llm())


@pytest.fixture
def note(fitted):
    return json.loads((fitted / "model.json").read_text())


def test_a_fit_writes_a_card_that_the_hub_reads(fitted, note, data):
    card = ModelCard.load(fitted / "README.md")
    best = note["training"]["kept"]
    assert card.data.library_name == "laserrec" and "sequential-recommendation" in card.data.tags
    assert card.data.license is None and card.data.base_model is None  # none was stated; a local folder is none
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {("validation", m): round(best[f"validation_{m}"], 4) for m in ("recall@10", "ndcg@10", "mrr")}
    text = card.text
    for said in ("# tools", "| data set | not stated |", f"| users | {data.n_users} |", f"| items | {N} |",
                 "| split | leave_one_out |", data.fingerprint, note["backbone"]["sha256"], "folder: not stated",
                 f"| {note['training']['trained_parameters']:,} |", f"| {note['training']['bi_tuning_parameters']:,} |",
                 "No test results were recorded", "@misc{zhang2024laser", "| `mformer.experts` | 3 |"):
        assert said in text, said
    assert str(fitted.parent) not in str(card)  # no path of this machine


PARTS = {"users": 9, "ndcg@10": {"given": 0.1, "chosen": 0.23456}}


@pytest.mark.parametrize(("network", "want"), [
    ({}, 0.2346), ({"network": {"blend": 0.23, "network": 0.2, "kept": False}}, 0.2346),
    ({"network": {"users": 9000, "blend": 0.23456, "network": 0.34567, "kept": True}}, 0.3457)])
def test_its_validation_metric_is_of_the_model_as_it_was_saved(fitted, note, network, want):
    """With its parts weighed, and by users that no part of it was trained on."""
    note["training"]["parts"] = {**PARTS, **network}
    measured = {"split": "validation", "ndcg@10": 0.9, "users": 99}
    note["results"] = [measured, {"split": "test", "ndcg@10": 0.8, "users": 99}]
    text = card_text(note, "tools", ["i1", "i2"])
    if want == 0.3457:  # the network was trained on the users of the other measurement
        assert "| validation | 0.3457 | 9,000 |" in text and "0.9000" not in text
    else:
        assert "| validation | 0.9000 | 99 |" in text
    note["results"] = []
    assert f"| validation | {want} | {'9,000' if want == 0.3457 else 9} |" in card_text(note, "tools", ["i1", "i2"])


def test_its_example_runs(fitted, model, monkeypatch, llm_folder):
    code = re.search(r"```python\n(.*?)```", (fitted / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 5
    monkeypatch.chdir(fitted.parent)
    names: dict = {}
    exec(code.replace("FOLDER-OF-THE-LLM", str(llm_folder())), names)
    assert len(names["history"]) == 2 and isinstance(names["model"], LaserRecommender)


def test_recorded_results_are_shown_and_measured_anew_they_are_replaced(model, data, fitted, tmp_path, llm):
    model.save_pretrained(tmp_path / "m", licence="CC-BY-4.0", data_name="Planted tools")
    result = evaluate("laser", model, data, "test", 10)
    for _ in range(2):
        record_result(tmp_path / "m", result, data)
    card = ModelCard.load(tmp_path / "m" / "README.md")
    tests = {r.metric_type: r for r in card.data.eval_results if r.dataset_split == "test"}
    assert len(card.data.eval_results) == 6 and tests["ndcg@10"].metric_value == round(result.plain.ndcg, 4)
    assert tests["mrr"].dataset_name == "Planted tools" and tests["mrr"].dataset_type == "planted-tools"
    assert card.data.license == "cc-by-4.0" and "folder: CC-BY-4.0" in card.text
    assert f"| test | {result.plain.recall:.4f} | {result.plain.ndcg:.4f} |" in card.text
    assert "No test results" not in card.text and "of other data" not in card.text
    again = LaserRecommender.from_pretrained(tmp_path / "m", llm())  # what was told is kept
    again.add_items(pl.DataFrame({"item_id": ["new"], "title": ["glue"]}))
    again.record(evaluate("laser", FirstItems(model, N), data, "validation", 10), data)
    again.save_pretrained(tmp_path / "n")
    text = (tmp_path / "n" / "README.md").read_text()
    assert "folder: CC-BY-4.0" in text and "| items added after training | 1 |" in text
    assert text.count("| validation |") == 1 and text.count("| test |") == 1


def test_results_on_other_data_say_so(note, data):
    row = {"split": "test", "recall@5": 0.5, "ndcg@5": 0.25, "mrr": 0.1, "users": 9, "data_sha256": "another"}
    text = card_text({**note, "results": [row]}, "a/b", ["i1"])
    assert "| test | 0.5000 | 0.2500 | 0.1000 | 9 |" in text and "Recall@5" in text
    assert "of other data than the model was trained on (sha256 another)" in text


def test_the_backbones_licence_is_told_where_it_is_known(note):
    def with_backbone(**named):
        return card_text({**note, "backbone": {**note["backbone"], **named}}, "a/b", ["i1"])

    text = with_backbone(name=DEFAULT_NAME, sha256="abc")
    card = ModelCard(text)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and "| licence | Apache-2.0 |" in text
    assert card.data.to_dict()["base_model_relation"] == "adapter" and "| abc |" in text and "backbone=" not in text
    text = with_backbone(name="some-lab/llm", revision="c0ffee")
    assert ModelCard(text).data.base_model == "some-lab/llm" and "| revision | c0ffee |" in text
    assert "| licence | not stated here; see its page |" in text


def test_a_licence_that_the_hub_does_not_list(note):
    data = ModelCard(card_text({**note, "card": {"licence": "Shop Licence 1.0 (internal)"}}, "a/b", ["i1"])).data
    assert data.license == "other" and data.license_name == "shop-licence-1.0-internal"


def test_a_persons_card_is_left_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert update_note(tmp_path, card={"licence": "mit"})
    (tmp_path / "README.md").write_text("# My own\n")
    assert not update_note(tmp_path, card={"licence": "isc"})
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My own\n"


def test_a_card_of_what_was_recorded_nothing_of(note):
    old = {k: v for k, v in note.items() if k not in ("laserrec", "n_items", "files", "training", "data")}
    text = card_text({**old, "n_items": old["n_known"]}, "a/b", ["i1"])
    assert "None were recorded." in text and "| trained | not recorded |" in text
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize("name", [name for name in METHODS if name != "laser"])
def test_cards_of_other_methods(data, fit, tmp_path, name):
    """They name their own settings, no paper, and the LLM only where it read texts."""
    fit(data, tmp_path / "m", name)
    text, card = (tmp_path / "m" / "README.md").read_text(), ModelCard.load(tmp_path / "m" / "README.md")
    assert f"Its method is {name}." in text and f"| method | {name} |" in text and data.fingerprint in text
    assert ("## The frozen LLM" in text) == METHODS[name].reads_text(tiny.config("x"))
    assert ("| `id_model.kind` | " in text) == (METHODS[name].sections == ("id_model",))
    assert ("| `neighbours.decay` | " in text) == (METHODS[name].sections == ("neighbours",))
    assert all(f"| `{section}." in text for section in METHODS[name].sections)
    assert f"| `id_model.kind` | {name} |" in text or METHODS[name].sections != ("id_model",)
    for said in ("Laser](", "zhang2024laser", "adapter", "Bi-Tuning", "prefix"):
        assert said not in text, said
    assert not {"prompt-tuning", "arxiv:2409.01605"} & set(card.data.tags)
    assert card.data.base_model is None and len(card.data.eval_results) == 3
    assert ("backbone=" in text) == METHODS[name].loads_llm  # the others have taken from it what they need


def test_the_card_of_closed_forms_alone_tells_of_no_prefix(data, fit, tmp_path):
    fit(data, tmp_path / "m", id_model={"kind": "none"}, prompt={"layout": "none", "item_side": "mean"},
        mformer={"prefix": "none"}, head={"whiten_dims": 8}, neighbours={"count": 4},
        train={"stage_one_epochs": 0, "stage_two_epochs": 0})
    text = (tmp_path / "m" / "README.md").read_text()
    assert "The language model reads new items alone." in text and "This folder holds the weights" in text
    for said in ("trained prefix", "ID-based", "the adapter", "ID model,", "Bi-Tuning's"):
        assert said not in text, said
