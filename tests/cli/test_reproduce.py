"""`laserrec reproduce`: what goes to the experiments, and what is printed and written of the outcome."""

import json
import sys
import time

import pytest
import tiny

from laserrec.cli.reproduce import over, reproduce_app
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.experiments import coldstart, quality
from laserrec.util.errors import UserError

LINE = {"kind": "id", "best": "EASE", "recall@10_ratio": 1.21, "ndcg@10_ratio": 1.16, "ndcg@10_difference": 0.0148,
        "low": 0.0122, "high": 0.0175}


@pytest.fixture
def data(tmp_path):
    prepare(*bought(40), tmp_path / "data")
    return tmp_path / "data"


def bought(users):
    raw = from_frames(*tiny.planted_tables(15, users))
    config = tiny.config("none", data={"min_user_interactions": 2, "min_item_interactions": 1}).data
    return raw.interactions, raw.items, config


def run(*words):
    with pytest.raises(SystemExit) as stop:
        reproduce_app(list(map(str, words)))
    assert not stop.value.code


def test_quality(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    asked = []
    row = {"model": "EASE", "kind": "id", "seeds": 2, "against": "EASE", "ndcg@10_difference": 0.0, "low": 0.0,
           "high": 0.0, **{f"{m}{end}": 0.5 for m in ("recall@10", "ndcg@10", "mrr") for end in ("", "_sd")}}
    result = {"rows": [], "summary": [row], "laser_over": [LINE], "config": {}}
    monkeypatch.setattr(quality, "reproduce", lambda *given: asked.append(given) or result)
    run("quality", tmp_path / "out", "--data", data, "--seeds", "2", "--train.lr", "0.5", "--device", "cpu", "--quiet",
        "--json", tmp_path / "quality.json")
    dataset, config, out, seeds, progress, device = asked[0]
    assert dataset.n_items == 15 and config.train.lr == 0.5 and out == tmp_path / "out" and list(seeds) == [0, 1]
    assert progress is False and device == "cpu"
    written = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert written.pop("machine")["cores"] >= 1 and written == result
    said = capsys.readouterr().out
    assert "0.5000 ± 0.5000" in said and str(data)[:20] in said and over(LINE, 10) in said


def test_cold_start(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    asked = []
    rows = [{"model": "Laser", "seed": seed, "target": "new", "history": "all", "recall@10": value, "ndcg@10": value,
             "mrr": 0.0, "users": 7} for seed, value in ((0, 0.1), (1, 0.3))]
    monkeypatch.setattr(coldstart, "reproduce", lambda *given: asked.append(given) or {"rows": rows, "share": 0.2})
    run("cold-start", tmp_path / "out", "--data", data, "--seeds", "2", "--share", "0.2", "--quiet")
    assert list(asked[0][3]) == [0, 1] and asked[0][4] == 0.2
    said = capsys.readouterr().out
    assert "0.2000" in said and "14" in said


def test_the_bundled_data_are_prepared_where_none_are_given(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("laserrec.data.prepare.prepare_source", lambda *given: asked.append(given))
    with pytest.raises(Exception, match="not a data folder"):
        reproduce_app(["quality", str(tmp_path / "out")], exit_on_error=False)
    assert asked[0][:2] == ("amazon-scientific", tmp_path / "out" / "data")


def test_a_ratio_is_a_sentence():
    said = over(LINE, 10)
    assert said.startswith("Laser over the best ID-only model, EASE: Recall@10 x 1.210, NDCG@10 x 1.160")
    assert "+0.0148 (+0.0122 to +0.0175)" in said


def test_a_table_of_the_paper(data, tmp_path, monkeypatch, capsys):
    from laserrec.experiments.paper import run as paper

    monkeypatch.setenv("COLUMNS", "200")
    asked, began = [], time.monotonic()
    row = {"data": "data", "base": "small", "model": "w/o prefix", "kind": "laser", "seed": 0, "recall@10": 0.25,
           "ndcg@10": 0.125, "mrr": 0.1, "train_seconds": 3.0, "published": {"Scientific": (0.3, 0.2, 0.1)}}
    result = {"experiment": "table4", "title": "Laser without its parts", "split": "test", "rows": [row],
              "missing": [{"data": "data", "base": "small", "model": "w/o stage 2", "why": "the budget was used up"}]}
    monkeypatch.setattr(paper, "reproduce", lambda *given: asked.append(given) or result)
    run("table4", tmp_path / "out", "--data", data, "--bases", "small", "--seeds", 2, "--budget", 1.5, "--workers", 3,
        "--models", "KAR", "w/o prefix", "--train.lr", "0.5", "--device", "cpu", "--quiet",
        "--json", tmp_path / "t.json")
    name, setup, seeds, until, workers, models = asked[0]
    assert (name, list(seeds), workers, models) == ("table4", [0, 1], 3, ["KAR", "w/o prefix"])
    assert began + 90 <= until <= time.monotonic() + 90
    assert setup.data == {"data": data} and list(setup.bases) == ["small"] and setup.bases["small"].train.lr == 0.5
    assert setup.out == tmp_path / "out" and setup.device == "cpu" and not setup.progress
    said = capsys.readouterr().out
    assert "w/o prefix" in said and "0.1250" in said and "Scientific 0.2000" in said
    assert "not measured: data, small, w/o stage 2: the budget was used up" in said
    assert json.loads((tmp_path / "t.json").read_text())["machine"]["cores"] >= 1
    assert json.loads((tmp_path / "out" / "table4.json").read_text())["rows"] == json.loads(json.dumps([row]))
    assert "| w/o prefix | 0.2500 |" in (tmp_path / "out" / "table4.md").read_text()


def test_the_papers_statistics(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    run("table1", tmp_path / "out", "--data", data, "--json", tmp_path / "t.json")
    said = capsys.readouterr().out
    assert "11,041" in said and "written:" in said
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["published"] for row in rows] == [False, True, True, True] and rows[0]["items"] == 15


def nothing(name):
    return {"experiment": name, "title": name, "split": "test", "rows": [], "missing": []}


def test_one_budget_serves_all_tables(data, tmp_path, monkeypatch):
    from laserrec.experiments.paper import run as paper
    from laserrec.experiments.paper import transfer

    prepare(*bought(30), tmp_path / "more")
    for counted in ("table3", "check_peft"):
        monkeypatch.setattr(f"laserrec.experiments.paper.counts.{counted}", list)
    ends = []
    monkeypatch.setattr(paper, "reproduce", lambda name, setup, seeds, until, *rest: ends.append(until) or
                        nothing(name))
    monkeypatch.setattr(transfer, "reproduce", lambda *given: ends.append(given[-1]) or nothing("figure3"))
    run("all", tmp_path / "out", "--data", data, tmp_path / "more", "--budget", 5, "--device", "cpu", "--quiet")
    assert len(ends) == 7 and len(set(ends)) == 1 and ends[0] > time.monotonic()


def test_all_tables_go_on_without_what_one_of_them_needs(data, tmp_path, monkeypatch, capsys):
    from laserrec.experiments.paper import run as paper

    asked = []
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(paper, "reproduce", lambda name, *given: asked.append((name, capsys.readouterr().out)) or
                        nothing(name))
    run("all", tmp_path / "out", "--data", data, "--device", "cpu", "--quiet", "--json", tmp_path / "all.json")
    assert [name for name, _ in asked] == ["table2", "table4", "table5", "table6", "table7", "figure4"]
    assert "not measured: table3: counting LoRA and prefix tuning needs peft" in asked[0][1]  # before the long work
    told = {each["experiment"]: each for each in json.loads((tmp_path / "all.json").read_text())}
    assert len(told) == 8 and told["table3"]["rows"] == [] and "needs peft" in told["table3"]["missing"][0]["why"]
    assert not (tmp_path / "out" / "table3.json").exists()


@pytest.mark.parametrize("name", ["table1", "table3", "all"])
def test_rows_that_cannot_be_chosen(name, data, tmp_path):
    with pytest.raises(UserError, match=f"models can't be chosen for {name}"):
        reproduce_app([name, str(tmp_path / "out"), "--data", str(data), "--models", "KAR"], exit_on_error=False)


@pytest.mark.parametrize("words", [("--seeds", 0), ("--workers", 0), ("--budget", 0)])
def test_numbers_that_make_no_sense(data, tmp_path, words):
    with pytest.raises(UserError, match="must be"):
        reproduce_app(["table4", str(tmp_path / "out"), "--data", str(data), *map(str, words)], exit_on_error=False)
