"""The quickstart's whole way on a tiny catalogue and LLM, and what it says about the outcome."""

import json

import polars as pl
import pytest
import tiny

from laserrec.config import load_config
from laserrec.experiments import quickstart
from laserrec.experiments.quickstart import verdict

N = 10


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, table in zip(("interactions", "items"), tiny.planted_tables(N, users=30), strict=True):
        table.write_csv(folder / f"{name}.csv")
    monkeypatch.setattr(quickstart, "_DATA", str(folder))
    monkeypatch.setattr(quickstart, "ID_MODELS", {k: {"d_id": 16, "blocks": 1, "max_epochs": 2} for k in
                                                  quickstart.ID_MODELS})
    return folder


def test_the_whole_way(source, llm_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    config = tiny.config(llm_folder(), data={"min_user_interactions": 2, "min_item_interactions": 1})
    rows = quickstart.run(tmp_path / "run", config, progress=False)
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8")) == rows
    assert [r["model"] for r in rows] == ["Laser", "SASRec", "BERT4Rec", "popularity", "EASE", "EASE with LLM text",
                                          "untrained LLM, nearest items", "untrained LLM"]
    for row in rows:
        assert {"model", "split", "recall@10", "ndcg@10", "mrr", "users", "seconds"} <= row.keys()
        assert row["split"] == "test" and row["users"] == 30 and row["model"] in said
    assert rows[0]["seconds"] > 0 and verdict(rows)[:30] in said
    assert "next in truth" in said and "recommended next" in said
    titles = pl.read_csv(source / "items.csv")["title"].to_list()
    assert sum(t in said for t in titles) >= 3

    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert "| data set | source |" in card
    assert f"| test | {rows[0]['recall@10']:.4f} | {rows[0]['ndcg@10']:.4f} | {rows[0]['mrr']:.4f} | 30 |" in card

    again = quickstart.run(tmp_path / "run", config, progress=False)  # nothing is trained a second time
    measures = [[{k: v for k, v in r.items() if k != "seconds"} for r in table] for table in (rows, again)]
    assert measures[0] == measures[1]


def test_id_models_of_ids_alone_stand_beside_the_one_under_laser():
    used = load_config("quickstart").id_model
    settings = quickstart._id_settings(used)
    assert list(settings) == ["SASRec from LLM embeddings", "SASRec", "BERT4Rec"]
    assert settings["SASRec from LLM embeddings"] == used
    assert all(settings[n].items == "ids" and settings[n].seen_offset for n in ("SASRec", "BERT4Rec"))
    assert list(quickstart._id_settings(settings["SASRec"])) == ["SASRec", "BERT4Rec"]


@pytest.mark.parametrize(("laser", "word"), [(0.0520, "above"), (0.0510, "level with"), (0.0490, "level with"),
                                             (0.0480, "below")])
def test_the_verdict_is_held_against_the_best_id_model(laser, word):
    rows = [{"model": "Laser", "ndcg@10": laser, "recall@10": 0.1}, {"model": "SASRec", "ndcg@10": 0.04,
            "recall@10": 0.2}, {"model": "BERT4Rec", "ndcg@10": 0.05, "recall@10": 0.08},
            {"model": "popularity", "ndcg@10": 0.9, "recall@10": 0.9}]
    said = verdict(rows)
    assert f"Laser is {word} the best ID-only model here, BERT4Rec" in said
    assert f"{laser / 0.05 - 1:+.1%}" in said and "+25.0%" in said
