"""The paper's tables: every row can be fitted or says why not, results are found again, counts are right."""

import json
import math
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import tiny

from laserrec.config import Config, load_config, merge
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.evaluation.evaluate import evaluate
from laserrec.experiments.paper import counts, run, show
from laserrec.experiments.paper.run import Setup, reproduce
from laserrec.experiments.paper.spec import EXPERIMENTS, Experiment, published_of, shown_name, table7_rows
from laserrec.experiments.table import Row
from laserrec.methods.all import METHODS
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util.errors import UserError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "paper"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    raw = from_frames(*tiny.planted_tables(15, 40))
    folder = tmp_path_factory.mktemp("data") / "walks"
    config = tiny.config("none", data={"min_user_interactions": 2, "min_item_interactions": 1}).data
    prepare(raw.interactions, raw.items, config, folder)
    return folder


@pytest.fixture
def setup(data, llm_folder, tmp_path):
    base = tiny.config(llm_folder(), prompt=tiny.QUICK | {"template": "paper"},
                       train={"stage_one_epochs": 1, "stage_two_epochs": 1, "batch_size": 32})
    return Setup({"walks": data}, {"tiny": base}, tmp_path / "paper", progress=False)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_is_a_method_and_every_published_figure_a_row(name):
    experiment = EXPERIMENTS[name]()
    rows = experiment.rows or table7_rows(8, 32)
    assert rows and all(row.method in METHODS for row in rows)
    assert len({row.name for row in rows}) == len({row.slug for row in rows}) == len(rows)
    for data, table in experiment.published.items():
        found = [published_of(experiment, row.name).get(data) for row in rows]
        assert {*table.values()} == {*found} - {None}, "a published figure belongs to no row"
        assert len(found) - found.count(None) == len(table)
    for base in experiment.bases:
        possible = [row for row in rows if run._ruled_out(row, load_config(base)) is None]
        assert len(possible) >= 2 and (base != "paper-small" or len(possible) == len(rows))


def test_table_7_keeps_the_papers_proportions():
    assert [row.settings["mformer"] for row in table7_rows(4, 8)] == [
        {"experts": 4, "queries": 8}, {"experts": 2, "queries": 8}, {"experts": 6, "queries": 8},
        {"experts": 4, "queries": 4}, {"experts": 4, "queries": 12}]
    assert published_of(EXPERIMENTS["table7"](), table7_rows(4, 8)[4].name) == {"Scientific": (.0975, .0692, .0644)}


NAMES = {"KAR, item texts": {}, "KAR": {"kar": {"knowledge": "texts"}}, "RecGURU, one domain": {},
         "RecGURU": {"recguru": {"other": "office"}}, "RECFORMER, pre-trained on the same sequences": {},
         "RECFORMER, not pre-trained": {"recformer": {"pretrain_own": False}},
         "RECFORMER": {"recformer": {"pretrain_on": ["office"], "pretrain_own": True}}, "FDSA": {}, "Laser": {}}


@pytest.mark.parametrize(("shown", "settings"), NAMES.items())
def test_names_tell_what_a_row_leaves_out_of_the_published_method(shown, settings):
    experiment = EXPERIMENTS["table2"]()
    row = next(row for row in experiment.rows if row.name == shown.partition(", ")[0])
    config = Config.model_validate(merge(merge(load_config("small").model_dump(), row.settings), settings))
    assert shown_name(row, config) == shown
    figures = {} if shown.endswith("not pre-trained") else experiment.published
    assert published_of(experiment, shown) == {data: table[row.name] for data, table in figures.items()}


def test_results_have_these_names(setup, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "two", lambda: Experiment("two", "Two rows", (
        Row("KAR", "text", "kar"), Row("Laser", "laser", "laser")), {"Paper": {"KAR": (.3, .2, .1)}}))
    nothing = reproduce("two", setup, [0], until=0.0)
    assert [row["model"] for row in nothing["missing"]] == ["KAR, item texts", "Laser"]
    row = reproduce("two", setup, [0], models=["kar"])["rows"][0]
    assert row["model"] == "KAR, item texts" and row["published"] == {"Paper": (.3, .2, .1)}


def test_published_results_are_shown():
    """Those that come with the source tree, whatever rows their files have."""
    for name in (*EXPERIMENTS,):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        text = show.markdown({"missing": [], **result})
        assert all(f"| {row['model']} |" in text for row in result["rows"])


def two_rows() -> Experiment:
    return Experiment("two", "Two rows", (
        Row("popularity", "id", "popularity", seeded=False), Row("Laser", "laser", "laser"),
        Row("impossible", "laser", "laser", {"prompt": {"layout": "none"}})), {"Paper": {"Laser": (.3, .2, .1)}})


def closed_forms() -> Experiment:
    return Experiment("two", "Two rows", (Row("popularity", "id", "popularity", seeded=False),
                                          Row("EASE", "id", "ease")))


def test_rows_are_measured_once_and_a_budget_leaves_the_rest(setup, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "two", two_rows)
    nothing = reproduce("two", setup, range(2), until=0.0)
    assert nothing["rows"] == [] and len(nothing["missing"]) == 4
    result = reproduce("two", setup, range(2))
    assert [(row["model"], row["seed"]) for row in result["rows"]] == [("popularity", None), ("Laser", 0), ("Laser", 1)]
    assert [row["model"] for row in result["missing"]] == ["impossible"]
    assert "needs prompt.item_side mean" in result["missing"][0]["why"]
    written = json.loads((setup.out / "two.json").read_text())
    assert written["rows"] == json.loads(json.dumps(result["rows"]))
    assert result["rows"][1]["published"] == {"Paper": (.3, .2, .1)} and result["rows"][0]["published"] == {}
    dataset = Dataset.load(setup.data["walks"])
    model = LaserRecommender.from_pretrained(setup.out / "walks" / "tiny" / "seed-1" / "laser")
    assert evaluate("m", model, dataset, "test").plain.ndcg == pytest.approx(result["rows"][2]["ndcg@10"])
    monkeypatch.setattr("laserrec.experiments.table.fit", lambda *_: pytest.fail("it fits again"))
    assert reproduce("two", setup, range(2))["rows"] == result["rows"]


def test_some_of_the_rows_are_fitted_and_the_others_kept(setup, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "two", two_rows)
    first = reproduce("two", setup, range(1), models=["Popularity"])
    assert [row["model"] for row in first["rows"]] == ["popularity"]
    both = reproduce("two", setup, range(1), models=["laser"])
    assert [row["model"] for row in both["rows"]] == ["popularity", "Laser"] and both["rows"][0] == first["rows"][0]
    with pytest.raises(UserError, match="there is no 'lasr' in two; there are: popularity, Laser, impossible"):
        reproduce("two", setup, range(1), models=["lasr"])


def test_a_smaller_call_leaves_what_was_measured(setup, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "two", closed_forms)
    bases = {name: setup.bases["tiny"] for name in ("one", "other")}
    more = Setup({"more": setup.data["walks"], **setup.data}, bases, setup.out, progress=False)
    rows = reproduce("two", more, range(2))["rows"]
    assert len(rows) == 2 * 2 * 3
    fewer = Setup(setup.data, {"other": bases["other"]}, setup.out, progress=False)
    again = reproduce("two", fewer, [1], models=["popularity"])
    by_place = {(row["data"], row["base"], row["model"], row["seed"]): row for row in rows}
    assert again["rows"] == json.loads((setup.out / "two.json").read_text())["rows"]
    assert {(row["data"], row["base"], row["model"], row["seed"]): row for row in again["rows"]} == by_place
    assert "| EASE |" in show.markdown(again)


def test_what_has_other_settings_does_not_stay(setup, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "two", closed_forms)
    reproduce("two", setup, range(2))
    base = Config.model_validate(merge(setup.bases["tiny"].model_dump(), {"eval": {"batch_size": 7}}))
    other = Setup(setup.data, {"tiny": base}, setup.out, progress=False)
    rows = reproduce("two", other, [0], models=["EASE"])["rows"]
    assert [(row["model"], row["seed"]) for row in rows] == [("EASE", 0)]


def test_rows_of_the_published_file_stay(setup):
    setup.out.mkdir()
    (setup.out / "table2.json").write_text((RESULTS / "table2.json").read_text())
    published = json.loads((RESULTS / "table2.json").read_text())["rows"]
    result = reproduce("table2", setup, [0], models=["EASE"])
    assert [row["model"] for row in result["rows"] if row["data"] == "walks"] == ["EASE"]
    assert all(row in result["rows"] for row in published) and len(result["rows"]) == len(published) + 1
    (setup.out / "table2.json").write_text("{")
    with pytest.raises(UserError, match=r"table2\.json is damaged.*; delete it and run the same command again"):
        reproduce("table2", setup, [0], models=["EASE"])


def test_a_row_with_a_new_name_stands_there_once(setup, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "two", lambda: Experiment("two", "Row", (Row("KAR", "text", "kar"),)))
    rows = reproduce("two", setup, [0])["rows"]
    (setup.out / "two.json").write_text(json.dumps({"rows": [{**rows[0], "model": "KAR"}]}))
    assert reproduce("two", setup, [1], until=0.0)["rows"] == rows


def test_a_second_data_set_may_come_later(setup, tmp_path, monkeypatch):
    """RecGURU then learns from both, which is another model."""
    monkeypatch.setitem(EXPERIMENTS, "two", lambda: Experiment("two", "One row", (
        Row("RecGURU", "id", "recguru", {"recguru": {"max_epochs": 1}}),)))
    raw = from_frames(*tiny.planted_tables(15, 30))
    prepare(raw.interactions, raw.items, tiny.config("none", data={"min_user_interactions": 2}).data, tmp_path / "more")
    both = Setup({**setup.data, "more": tmp_path / "more"}, setup.bases, setup.out, progress=False)
    one, two = reproduce("two", setup, [0])["rows"], reproduce("two", both, [0])["rows"]
    assert [(row["data"], row["model"]) for row in two] == [
        ("walks", "RecGURU"), ("walks", "RecGURU, one domain"), ("more", "RecGURU")]
    assert [two[1]] == one and reproduce("two", setup, [0])["rows"] == two


def test_processes_give_what_one_gives(setup, tmp_path):
    one = reproduce("table5", setup, range(1))
    other = Setup(setup.data, setup.bases, tmp_path / "other", progress=False)
    several = reproduce("table5", other, range(1), workers=2)
    assert len(one["rows"]) == 3 and one["missing"] == several["missing"] == []
    assert [(row["model"], row["ndcg@10"], row["mrr"]) for row in one["rows"]] == [
        (row["model"], row["ndcg@10"], row["mrr"]) for row in several["rows"]]
    assert len(list((tmp_path / "other").rglob("id-model-*/model.json"))) == 1


def test_processes_share_the_threads_evenly_however_many_jobs_each_has(setup, monkeypatch):
    """Here one process that is this one."""
    class Pool(Executor):
        def __init__(self, workers, mp_context=None, initializer=lambda: None, initargs=()):
            initializer(*initargs)

        def submit(self, work, *given):
            done = Future()
            done.set_result(work(*given))
            return done

    threads = [8]
    monkeypatch.setattr(run.torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(run.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(run, "ProcessPoolExecutor", Pool)
    monkeypatch.setitem(EXPERIMENTS, "two", two_rows)
    bases = {name: setup.bases["tiny"] for name in ("one", "other", "third")}
    several = Setup(setup.data, bases, setup.out, progress=False)
    assert len(reproduce("two", several, range(1), workers=2, models=["popularity"])["rows"]) == 3
    assert threads == [8, 4]


def test_no_process_begins_anything_when_the_time_is_over(setup, monkeypatch):
    """The first thing that is shared ends after the deadline: nothing is made after it."""
    made, over = [], iter([False, *[True] * 99])
    monkeypatch.setattr(run, "late", lambda until: next(over))
    monkeypatch.setattr("laserrec.experiments.table.fit_id_model", lambda *given: made.append(given[2].name))
    monkeypatch.setattr("laserrec.experiments.table.TextFeatures.means", lambda *given: made.append("texts"))
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("it begins processes"))
    result = reproduce("table5", setup, range(2), until=0.0, workers=2)
    assert len(made) == 1 and made[0].startswith("id-model") and len(result["missing"]) == 6 and not result["rows"]


def test_table_7_ranks_the_validation_split(setup):
    setup = Setup(setup.data, {"tiny": setup.bases["tiny"]}, setup.out, progress=False)
    result = reproduce("table7", setup, range(1))
    row, dataset = result["rows"][0], Dataset.load(setup.data["walks"])
    folder = next((setup.out / "walks" / "tiny" / "seed-0").glob("k*/model.json")).parent
    found = {evaluate("m", LaserRecommender.from_pretrained(folder), dataset, "validation").plain.ndcg}
    assert result["split"] == "validation" and len(result["rows"]) == 5
    assert any(each["ndcg@10"] == pytest.approx(value) for each in result["rows"] for value in found)
    assert row["published"]


def test_an_unknown_table(setup):
    with pytest.raises(UserError, match="there is no 'table9'; there are: table2"):
        reproduce("table9", setup, range(1))


def test_means_and_the_papers_figures_stand_apart():
    row = {"data": "d", "base": "b", "model": "m", "train_seconds": 2.0, "published": {"Scientific": (.3, .2, .1)}}
    rows = [{**row, "seed": seed, "recall@10": value, "ndcg@10": value / 2, "mrr": 0.1}
            for seed, value in ((0, 0.2), (1, 0.4))]
    line = show.groups(rows, 10)[0]
    assert line["recall@10"] == pytest.approx(0.3) and line["recall@10_sd"] == pytest.approx(math.sqrt(0.02))
    assert show.cells(line, 10) == ["0.3000 ± 0.1414", "0.1500 ± 0.0707", "0.1000 ± 0.0000", "Scientific 0.2000", "2",
                                    "2"]
    text = show.markdown({"title": "T", "split": "test", "rows": rows, "missing": [
        {"data": "d", "base": "b", "model": "x", "why": "no time"}]})
    assert "| m | 0.3000 ± 0.1414 |" in text and "- d, b: x (no time)" in text


def test_a_plot_and_a_page(tmp_path):
    rows = [{"data": "d", "base": "b", "model": name, "seed": 0, "recall@10": .2, "ndcg@10": .1, "mrr": .1,
             "train_seconds": 1.0, "published": {"Scientific": (.3, .2, .1)}} for name in ("Laser", "w/o prefix")]
    files = show.write({"experiment": "t", "title": "T", "split": "test", "rows": rows, "missing": []}, tmp_path)
    assert [file.name for file in files] == ["t.md", "t.png"] and files[1].stat().st_size > 5_000


def test_statistics_of_the_data(data):
    row, *published = counts.table1({"walks": data})
    dataset = Dataset.load(data)
    assert row == {"data": "walks", "users": dataset.n_users, "items": dataset.n_items,
                   "interactions": dataset.interactions.height, "published": False,
                   "mean_history": round(dataset.interactions.height / dataset.n_users, 2),
                   "density": dataset.interactions.height / (dataset.n_users * dataset.n_items)}
    assert [each["data"] for each in published] == ["Scientific", "Arts", "Pet"]
    assert published[0]["density"] == pytest.approx(1.3e-3, rel=0.01)


def test_counting_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs peft: pip install 'laserrec\[rivals\]'"):
        counts.table3()


def test_trained_parameters_by_formula():
    trained = {(row["llm"], row["tuning"]): row["trained"] for row in counts.table3()}
    llama = {tuning: count for (llm, tuning), count in trained.items() if llm == "Llama2-7B"}
    assert llama["full"] == 6_738_415_616
    assert llama["LoRA, rank 8, query and value"] == 32 * 2 * 8 * (4096 + 4096) == 4_194_304
    assert llama["prefix tuning, 32 tokens in every layer"] == 32 * 32 * 2 * 4096
    assert llama["Bi-Tuning: prefix and suffix as the LLM reads them"] == 33 * 4096 == 135_168
    small = {tuning: count for (llm, tuning), count in trained.items() if llm == "SmolLM2-135M"}
    assert small["full"] == 134_515_008
    assert small["LoRA, rank 8, query and value"] == 30 * 8 * (576 + 576 + 576 + 192)
    whole = [count for (_, tuning), count in trained.items() if tuning.startswith("Bi-Tuning: all")]
    assert all(count > 135_000 for count in whole) and whole[0] > 50_000_000
    assert trained["ChatGLM2-6B", "Laser: Bi-Tuning"] == 135_000  # the paper's own row
