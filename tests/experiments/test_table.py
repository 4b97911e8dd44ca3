"""A result is found again only for the same data, settings, weights and way of measuring; a stopped table goes on."""

import numpy as np
import polars as pl
import pytest
import tiny

from laserrec.data.dataset import Dataset
from laserrec.experiments import table as tables
from laserrec.experiments.table import Row, Table, compare, summarise
from laserrec.methods.closed_form import Popularity
from laserrec.methods.sequence_task import SequenceTask
from laserrec.recommender.folder import read_note
from laserrec.util.device import CPU
from laserrec.util.errors import UserError
from laserrec.util.io import write_json

SASREC = {"id_model": {"kind": "sasrec", "items": "ids", "max_epochs": 1}}


class Doubled:
    def __init__(self, model):
        self.model = model

    def score(self, histories):
        return 2 * self.model.score(histories)


ROWS = [Row("popularity", "id", "popularity", seeded=False), Row("SASRec", "id", "sasrec", SASREC),
        Row("twice", "id", of=("SASRec",), make=lambda place, fitted: (Doubled(fitted.model), 3.0))]


@pytest.fixture
def make(llm_folder, tmp_path):
    """Table of these rows in one folder, with sections of the config."""

    def table(dataset: Dataset | None = None, rows=ROWS, **sections) -> Table:
        return Table(rows, dataset or tiny.planted(15, 30), tiny.config(llm_folder(), **sections), tmp_path / "table",
                     CPU, progress=False)

    return table


@pytest.fixture
def ranked(monkeypatch):
    """Names of the models that were ranked."""
    names = []
    own = tables.evaluate
    monkeypatch.setattr(tables, "evaluate", lambda name, *rest: names.append(name) or own(name, *rest))
    return names


def test_all_rows_of_all_seeds_once(make, ranked):
    found = make().results([0, 1])
    assert [(row["model"], row["seed"]) for row in found] == [
        ("popularity", None), ("SASRec", 0), ("twice", 0), ("SASRec", 1), ("twice", 1)]
    assert len(ranked) == 5
    assert make().results([0, 1]) == found and len(ranked) == 5
    assert found[1]["ndcg@10"] == found[2]["ndcg@10"]
    assert found[2]["train_seconds"] == pytest.approx(found[1]["train_seconds"] + 3, abs=0.11)


def test_the_second_seed_is_another_training(make):
    table = make()
    table.results([0, 1])
    one, two = (read_note(table.out / f"seed-{seed}" / "sasrec") for seed in (0, 1))
    assert one["config"]["id_model"]["seed"] == 0 and two["config"]["id_model"]["seed"] == 1
    assert one["files"]["weights.safetensors"] != two["files"]["weights.safetensors"]


def test_another_setting_of_the_evaluator_is_measured_anew(make, ranked):
    first = make().result("popularity")
    row = make(eval={"batch_size": 7}).result("popularity")
    assert ranked == ["popularity"] * 2 and row["ndcg@10"] == first["ndcg@10"]
    with pytest.raises(UserError, match="other settings"):  # the cut-off chooses the epoch too
        make(eval={"k": 3}).result("popularity")


def test_other_settings_never_show_the_old_row(make):
    make().result("SASRec")
    others = [Row("SASRec", "id", "sasrec", {"id_model": {**SASREC["id_model"], "max_epochs": 2}})]
    with pytest.raises(UserError, match="other settings"):
        make(rows=others).result("SASRec")


def test_other_tuned_settings_are_a_model_beside_the_old_one(make, ranked):
    """The old one is found by its settings alone, whatever its folder is called."""
    def row(epochs):
        return [Row("SASRec", "id", "sasrec", {"id_model": {**SASREC["id_model"], "max_epochs": epochs}}, tuned=True)]

    plain = make(rows=ROWS).folder("SASRec")
    first = make(rows=row(1)).result("SASRec")
    make(rows=row(1)).folder("SASRec").rename(plain)
    assert make(rows=row(1)).folder("SASRec") == plain and make(rows=row(2)).folder("SASRec") != plain
    other = make(rows=row(2)).result("SASRec")
    assert other["fingerprint"] != first["fingerprint"] and read_note(plain)["config"]["id_model"]["max_epochs"] == 1
    assert make(rows=row(2)).result("SASRec") == other and len(ranked) == 2


def test_other_texts_are_a_model_beside_the_old_one(make, tmp_path):
    def result(text):
        (tmp_path / "items.jsonl").write_text(f'{{"item_id": "i1", "text": "{text}"}}\n')
        return make(rows=[Row("KAR", "text", "kar", {"kar": {"knowledge": tmp_path, "max_epochs": 1}})]).result("KAR")

    first = result("A saw.")
    assert result("A hammer.")["fingerprint"] != first["fingerprint"] and result("A saw.") == first


def test_other_data_never_show_the_old_row(make):
    make().result("popularity")
    with pytest.raises(UserError, match="other data"):
        make(tiny.planted(15, 31)).result("popularity")


def test_other_weights_are_measured_anew(make, ranked):
    """Someone trained the folder again: the settings are the same, the weights are not."""
    table = make()
    old = table.result("twice", 0)
    assert ranked == ["twice"]
    note = read_note(folder := table.out / "seed-0" / "sasrec")
    note["files"]["weights.safetensors"]["sha256"] = "0" * 64
    write_json(folder / "model.json", note)
    assert make().fingerprint("twice", 0) != old["fingerprint"]
    with pytest.raises(UserError, match=r"weights\.safetensors"):  # and this folder is seen to be damaged
        make().result("twice", 0)


def test_another_language_model_is_another_row(make, llm_folder):
    rows = [Row("nearest", "text", "nearest-text", seeded=False)]
    one = make(rows=rows)
    other = make(rows=rows, backbone={"name": str(llm_folder("qwen2")), "precision": "fp32"})
    assert one.result("nearest")["fingerprint"] != other.fingerprint("nearest")
    other.features.__dict__["_sha256"] = "other weights under the same name"
    again = make(rows=rows)
    again.features.__dict__["_sha256"] = "other weights under the same name"
    assert again.fingerprint("nearest") != one.fingerprint("nearest")


def test_what_a_folder_holds_counts_and_not_where_it_is(make, tmp_path):
    def prints(folder):
        table = make(rows=[Row("KAR", "text", "kar", {"kar": {"knowledge": folder}}), ROWS[0]])
        return table.fingerprint("KAR")

    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "items.jsonl").write_text('{"item_id": "i1", "text": "A saw."}\n')
    first = prints(folder)
    assert prints(folder.rename(tmp_path / "moved")) == first
    (tmp_path / "moved" / "items.jsonl").write_text('{"item_id": "i1", "text": "A hammer."}\n')
    assert len({first, prints(tmp_path / "moved"), prints(None)}) == 3
    assert make(kar={"knowledge": folder}).fingerprint("SASRec") == make().fingerprint("SASRec")


def test_what_is_measured_counts(make):
    one, other = make(), make()
    other.measured_by = {"histories": "1"}
    assert one.fingerprint("popularity") != other.fingerprint("popularity")


def test_a_row_is_measured_on_the_model_it_belongs_to(make):
    dataset = tiny.planted(15, 30)
    row = make(dataset).result("popularity")
    model = Popularity(15).fit(dataset)
    result = tables.evaluate("x", model, dataset, "test")
    assert row["ndcg@10"] == result.plain.ndcg and row["mrr"] == result.plain.mrr


def test_a_stopped_table_goes_on(make, monkeypatch, tmp_path):
    """Stopped in the middle of a training: what is there stays, and the result is the uninterrupted one's."""
    rows = [ROWS[0], Row("SASRec", "id", "sasrec", {"id_model": {**SASREC["id_model"], "max_epochs": 4}})]
    train = {"checkpoint_minutes": 1e-9}
    whole = make(rows=rows, train=train)
    whole.out = tmp_path / "whole"
    expected = whole.results([0])
    own, calls = SequenceTask.begin_epoch, []

    def stop(self, number):
        calls.append(number)
        if number == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return own(self, number)

    monkeypatch.setattr(SequenceTask, "begin_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        make(rows=rows, train=train).results([0])
    assert (tmp_path / "table" / "popularity.json").is_file()
    again = make(rows=rows, train=train).results([0])
    assert calls == [1, 2, 3, 3, 4]  # it went on from the checkpoint behind the second epoch
    assert again[1]["ndcg@10"] == expected[1]["ndcg@10"] and again[1]["mrr"] == expected[1]["mrr"]


def test_the_id_model_of_a_row_serves_laser_too(make, llm_folder):
    config = tiny.config(llm_folder())
    own = {"id_model": {**config.id_model.model_dump(), "max_epochs": 1}}
    laser = {**own, "train": {"stage_one_epochs": 0, "stage_two_epochs": 0}}
    shared = make(rows=[Row("SASRec", "id", "sasrec", own), Row("Laser", "laser", "laser", laser)])
    found = {name: shared.result(name, 0)["train_seconds"] for name in ("Laser", "SASRec")}
    assert (shared.out / "seed-0" / "sasrec" / "model.json").is_file()
    assert not list((shared.out / "seed-0").glob("id-model-*"))
    assert found["Laser"] >= found["SASRec"]  # whose training is a part of it
    other = {"id_model": {**own["id_model"], "dropout": 0.3}}
    alone = make(rows=[Row("other", "id", "sasrec", other), Row("Laser", "laser", "laser", laser)])
    alone.result("Laser", 1)
    assert len(list((alone.out / "seed-1").glob("id-model-sasrec-*/model.json"))) == 1
    assert not (alone.out / "seed-1" / "other").exists()


def test_an_id_model_from_texts_is_shared_whatever_the_prompt_and_not_with_another_llm(make, llm_folder):
    config = tiny.config(llm_folder())
    own = {"id_model": {**config.id_model.model_dump(), "items": "llm_start", "max_epochs": 1},
           "train": {"stage_one_epochs": 0, "stage_two_epochs": 0}}
    rows = [Row("a", "laser", "laser", own),
            Row("b", "laser", "laser", {**own, "prompt": {"template": "no_instruction"}}),
            Row("c", "laser", "laser", {**own, "backbone": {"layers": 1}})]
    for row in rows:  # one after another, as separate commands
        table = make(rows=rows)
        table.result(row.name, 0)
    assert len(list((table.out / "seed-0").glob("id-model-sasrec-*/model.json"))) == 2


def test_rows_of_the_same_shuffles_share_the_id_model(make):
    """It is chosen once, for all of them."""
    rows = [Row("a", "laser", "laser"), Row("b", "laser", "laser", {"head": {"seen_offset": True}}),
            Row("SASRec", "id", "sasrec")]
    table = make(rows=rows, id_model={"max_epochs": 2}, blend={"shuffles": (1.0,)})
    table.results([0])
    place = table.out / "seed-0"
    assert len(list(place.glob("id-model-sasrec-*/model.json"))) == 1
    assert not (place / "a" / "id_model_trials").exists()
    below = [read_note(place / name)["config"]["id_model"] for name in ("a", "b")]
    assert below[0] == below[1] and below[0]["max_epochs"] == 2


def test_a_damaged_result_is_measured_anew(make, ranked):
    table = make()
    first = table.result("popularity")
    write_json(table.out / "popularity.json", [])
    assert make().result("popularity")["ndcg@10"] == first["ndcg@10"] and len(ranked) == 2


def test_numbers_stand_in_the_models_card(make):
    table = make()
    row = table.result("SASRec", 0)
    results = read_note(table.out / "seed-0" / "sasrec")["results"]
    assert [entry["ndcg@10"] for entry in results] == [row["ndcg@10"]]


def _row(name, kind, gains, out, seed, rng):
    from laserrec.evaluation.evaluate import Ranks, save_ranks

    ranks = np.where(rng.random(30) < gains, 1.0, 100.0)
    dataset = tiny.planted(15, 30)
    save_ranks(out / f"{name}-{seed}.parquet", dataset, "test", Ranks(ranks, ranks))
    hits = float((ranks <= 10).mean())
    return {"model": name, "kind": kind, "seed": seed, "recall@10": hits, "ndcg@10": hits, "mrr": hits,
            "ranks": f"{name}-{seed}.parquet"}


def test_means_spreads_and_paired_differences(tmp_path):
    rng = np.random.default_rng(0)
    rows = [_row(name, kind, gain, tmp_path, seed, rng) for name, kind, gain in (
        ("weak", "id", 0.1), ("strong", "id", 0.4), ("text", "text", 0.5), ("Laser", "laser", 0.9)) for seed in (0, 1)]
    summary = {entry["model"]: entry for entry in summarise(rows, tmp_path)}
    own = [row["ndcg@10"] for row in rows if row["model"] == "Laser"]
    laser = summary["Laser"]
    assert laser["ndcg@10"] == pytest.approx(np.mean(own)) and laser["ndcg@10_sd"] == pytest.approx(np.std(own, ddof=1))
    assert laser["against"] == "strong" and laser["seeds"] == 2
    assert laser["ndcg@10_difference"] == pytest.approx(laser["ndcg@10"] - summary["strong"]["ndcg@10"])
    assert laser["low"] < laser["ndcg@10_difference"] < laser["high"]
    lines = compare("Laser", rows, tmp_path)
    assert [(line["kind"], line["best"]) for line in lines] == [("id", "strong"), ("text", "text")]
    assert lines[1]["ndcg@10_ratio"] == pytest.approx(laser["ndcg@10"] / summary["text"]["ndcg@10"])


def test_intervals_are_over_users_and_not_over_their_cases(tmp_path):
    """As after a temporal split, where a user has a case for each interaction."""
    ranks = {"EASE": np.tile([1.0, 20.0, 3.0, 40.0], 5), "Laser": np.tile([2.0, 1.0], 10)}
    users = pl.Series([f"u{user}" for user in range(20)])

    def line(cases):
        for name, own in ranks.items():
            frame = pl.DataFrame({"user_id": pl.concat([users] * cases), "rank": np.tile(own, cases)})
            frame.write_parquet(tmp_path / f"{name}-{cases}.parquet")
        rows = [{"model": name, "kind": kind, "seed": 0, "recall@10": .5, "ndcg@10": .5, "mrr": .5,
                 "ranks": f"{name}-{cases}.parquet"} for name, kind in (("EASE", "id"), ("Laser", "laser"))]
        return summarise(rows, tmp_path)[1]

    assert line(3) == pytest.approx(line(1)) and line(1)["low"] < line(1)["ndcg@10_difference"]


def test_names_make_folders():
    assert Row("EASE with LLM text", "text").slug == "ease-with-llm-text"
    assert Row("Laser, distilled (no LLM)", "laser").slug == "laser-distilled-no-llm"
    assert Row("Laser", "laser", folder="model").slug == "model"
