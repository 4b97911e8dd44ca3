"""The quickstart's whole way on a tiny catalogue and LLM, and what it says about the outcome."""

import json
from dataclasses import replace

import polars as pl
import pytest
import tiny
from rich.console import Console

from laserrec.config import load_config
from laserrec.experiments import quickstart, table
from laserrec.experiments.quickstart import _example, verdict
from laserrec.llm import text_features
from laserrec.presets import PRESETS

N = 10


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, frame in zip(("interactions", "items"), tiny.planted_tables(N, users=30), strict=True):
        frame.write_csv(folder / f"{name}.csv")
    monkeypatch.setattr(quickstart, "_DATA", str(folder))
    monkeypatch.setenv("COLUMNS", "300")
    return folder


@pytest.fixture
def config(llm_folder, monkeypatch):
    monkeypatch.setitem(PRESETS["instant"]["head"], "whiten_dims", 8)
    return tiny.config(llm_folder(), data={"min_user_interactions": 2, "min_item_interactions": 1},
                       prompt={"layout": "text_first", "item_side": "mean", "max_items": 4, "max_item_tokens": 8},
                       head={"whiten_dims": 8, "projection": True}, neighbours={"count": 5, "l2": 1.0},
                       train={"stage_one_epochs": 1, "stage_two_epochs": 0})


def test_the_whole_way(source, config, tmp_path, capsys, monkeypatch):
    out, fitted, own = tmp_path / "run", [], table.fit
    monkeypatch.setattr(table, "fit", lambda method, *rest: fitted.append((method, capsys.readouterr().out))
                        or own(method, *rest))
    rows = quickstart.run(out, config, progress=False, device="cpu")
    said = "".join(part for _, part in fitted) + capsys.readouterr().out
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == rows
    assert [row["model"] for row in rows] == ["Laser", "SASRec", "popularity", "EASE", "EASE with LLM text",
                                              "untrained LLM, nearest items"]
    for row in rows:
        assert row["split"] == "test" and row["users"] == 30 and row["model"] in said and row["seconds"] >= 0
    titles = pl.read_csv(source / "items.csv")["title"].to_list()
    early = next(part for method, part in fitted if method == "sasrec")  # printed before the first training by gradient
    assert "recommended 5" in early and "bought next" in early and sum(t in early for t in titles) >= 5
    headings = [said.index(f"\n{number}  ") for number in range(1, 7)]
    assert headings == sorted(headings) and "Laser is " in said and "What to try next" in said
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| test | {rows[0]['recall@10']:.4f} | {rows[0]['ndcg@10']:.4f} | {rows[0]['mrr']:.4f} | 30 |" in card


def test_at_80_columns_titles_are_cut_and_nothing_else(monkeypatch, capsys):
    """Amazon's titles are longer than a line, and some hold brackets."""
    monkeypatch.setenv("COLUMNS", "80")
    data = tiny.planted(N)
    long = data.items.with_columns(title=pl.lit("[red] ") + pl.col("title") + pl.lit(" and more of it" * 9))

    class Model:
        def recommend(self, histories, k, exclude_seen):
            return pl.DataFrame({"rank": [1, 2], "item_id": ["i1", "i2"]})

    _example(Console(), Model(), replace(data, items=long))
    lines = capsys.readouterr().out.splitlines()
    told = [line.split("[red]")[0].split() for line in lines[1:] if line.strip()]
    assert [" ".join(words[:-1]) for words in told if words[0] != "bought"] == ["recommended 1", "recommended 2"]
    assert all(len(line) <= 80 and "…" in line for line in lines[1:] if line.strip())
    assert all(words[-1] in data.items["item_id"].to_list() for words in told)


def test_one_sasrec_is_rival_and_id_model(source, config, tmp_path):
    quickstart.run(tmp_path / "run", config, progress=False, device="cpu")
    folders = {place.parent.name for place in (tmp_path / "run").glob("*/model.json")}
    assert {"model", "sasrec", "instant", "ease"} <= folders and "model-id-model" not in folders


def test_a_second_start_trains_reads_and_measures_nothing(source, config, tmp_path, monkeypatch, capsys):
    rows = quickstart.run(tmp_path / "run", config, progress=False, device="cpu")
    first = capsys.readouterr().out
    for module, name in ((table, "evaluate"), (text_features, "_means")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr("laserrec.recommender.fitting._train", None)
    assert quickstart.run(tmp_path / "run", config, progress=False, device="cpu") == rows
    second = capsys.readouterr().out
    assert [x for x in second.splitlines() if "recommended" in x] == [x for x in first.splitlines()
                                                                      if "recommended" in x]


def test_a_stopped_quickstart_goes_on(source, config, tmp_path, monkeypatch):
    own, calls = table.evaluate, []

    def stop(name, *rest):
        calls.append(name)
        if calls == ["SASRec", "Laser"]:
            raise KeyboardInterrupt
        return own(name, *rest)

    monkeypatch.setattr(table, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run(tmp_path / "run", config, progress=False, device="cpu")
    rows = quickstart.run(tmp_path / "run", config, progress=False, device="cpu")
    assert calls.count("SASRec") == 1 and calls.count("Laser") == 2 and len(rows) == 6


def test_the_preset_trains_one_sasrec():
    config, sasrec = load_config("quickstart"), next(row for row in quickstart.rows() if row.name == "SASRec")
    assert config.id_model.model_copy(update=sasrec.settings["id_model"]) == config.id_model


@pytest.mark.parametrize(("low", "high", "word"), [(0.001, 0.02, "above"), (-0.001, 0.02, "level with"),
                                                   (-0.02, -0.001, "below")])
def test_the_verdict_goes_by_the_interval(low, high, word):
    said = verdict({"best": "EASE", "recall@10_ratio": 1.21, "ndcg@10_ratio": 1.16, "ndcg@10_difference": 0.0148,
                    "low": low, "high": high})
    assert f"Laser is {word} the best model of ids alone, EASE" in said
    assert "Recall@10 x 1.21" in said and "+0.0148" in said and f"{low:+.4f} to {high:+.4f}" in said
