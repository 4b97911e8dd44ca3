"""What the report collects: the right folders, and numbers that agree with the model's and the evaluator's."""

import json
import shutil
import sys

import numpy as np
import polars as pl
import pytest
import torch

from laserrec import LaserRecommender
from laserrec.cli import main as cli
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.report import item_map
from laserrec.report.categories import groups, short_names
from laserrec.report.collect import collect
from laserrec.report.experts import profile
from laserrec.report.places import find
from laserrec.report.results import read_results
from laserrec.util.errors import UserError


@pytest.fixture(scope="module")
def report(run_folder):
    return collect(find(run_folder))


# -- where things lie -------------------------------------------------------------------------------------------------


def test_quickstart_layout_is_found_from_both_folders(run_folder):
    places = find(run_folder)
    assert (places.model, places.data) == (run_folder / "model", run_folder / "data")
    assert (places.id_model, places.results) == (run_folder / "sasrec", run_folder / "results.json")
    assert find(run_folder / "model") == places


def test_reproduce_layout(run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "seed-0" / "laser")
    shutil.copytree(run_folder / "data", tmp_path / "data")
    (tmp_path / "quality.json").write_text("{}")
    places = find(tmp_path / "seed-0" / "laser")
    assert (places.data, places.id_model, places.results) == (tmp_path / "data", None, tmp_path / "quality.json")


def test_an_id_model_within_the_model_and_a_model_without_one(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    model, sibling = tmp_path / "run" / "model", tmp_path / "run" / "sasrec"
    assert find(model).id_model == sibling and find(sibling).id_model is None
    shutil.copy(sibling / "log.jsonl", model / "id_model")
    assert find(model).id_model == model / "id_model"
    (model / "id_model" / "log.jsonl").unlink()
    with (sibling / "weights.safetensors").open("ab") as file:
        file.write(b" ")
    assert find(model).id_model is None


def test_what_is_not_beside_the_model_is_named(run_folder, tmp_path):
    model = tmp_path / "far" / "away" / "model"
    shutil.copytree(run_folder / "model", model)
    with pytest.raises(UserError, match="name its data folder: laserrec report RUN --data DATA"):
        find(model)
    other = tmp_path / "other"
    shutil.copytree(run_folder / "data", other)
    assert find(model, data=other).data == other
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="not the data folder that"):
        find(model, data=other)
    shutil.copytree(other, model.parent / "data")  # another's data beside the model are not taken
    with pytest.raises(UserError, match="name its data folder: laserrec report RUN --data DATA"):
        find(model)
    with pytest.raises(UserError, match="no such file"):
        find(model, data=run_folder / "data", results=tmp_path / "none.json")


def test_folders_that_are_no_runs(run_folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find(tmp_path / "nowhere")
    for folder in (tmp_path, run_folder / "data"):
        with pytest.raises(UserError, match="is no run"):
            find(folder)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "checkpoint.safetensors").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "model"):
        with pytest.raises(UserError, match="unfinished training"):
            find(folder)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_examples_are_what_the_model_recommends_and_the_evaluator_ranks(report, run_folder):
    model, dataset = LaserRecommender.from_pretrained(run_folder / "model"), Dataset.load(run_folder / "data")
    cases, ranks = dataset.cases("test"), evaluate("x", model, dataset, "test").ranks
    names = dict(dataset.users.iter_rows())
    row_of = {names[u]: row for row, u in enumerate(cases.users.tolist())}
    titles = dataset.items["title"].to_list()
    ids = dataset.items["item_id"].to_list()
    assert len({e.user_id for e in report.examples}) == 5
    for example in report.examples:
        row = row_of[example.user_id]
        history = cases.histories[row].tolist()
        assert list(example.history) == [titles[i] for i in history[-8:]]
        assert example.earlier == max(0, len(history) - 8)
        assert example.next.rank == ranks.plain[row] and example.next.title == titles[cases.targets[row]]
        frame = model.recommend([[ids[i] for i in history]], k=5)
        assert [s.title for s in example.top] == [titles[ids.index(i)] for i in frame["item_id"]]
        assert [s.score for s in example.top] == pytest.approx(frame["score"].to_list(), abs=1e-5)
        assert [s.seen for s in example.top] == [ids.index(i) in history for i in frame["item_id"]]
        hits = [s.rank for s in example.top if s.is_next]
        assert hits == ([example.next.rank] if example.next.rank <= 5 else [])


def test_equal_scores_share_their_mean_rank(run_folder, fit):
    """Popularity scores many items alike."""
    dataset = Dataset.load(run_folder / "data")
    model = fit(run_folder / "data", run_folder / "popularity", "popularity")
    report, ranks = collect(find(run_folder / "popularity")), evaluate("x", model, dataset, "test").ranks.plain
    names = dict(dataset.users.iter_rows())
    row_of = {names[u]: row for row, u in enumerate(dataset.cases("test").users.tolist())}
    assert any(rank != int(rank) for rank in ranks)
    assert [e.next.rank for e in report.examples] == [ranks[row_of[e.user_id]] for e in report.examples]


def test_experts_are_the_routers_choices(report, run_folder):
    model, dataset = LaserRecommender.from_pretrained(run_folder / "model"), Dataset.load(run_folder / "data")
    cases = dataset.cases("test")
    chosen = model.model.read(cases.histories)[1].expert
    assert [e.users for e in report.experts.experts] == torch.bincount(chosen, minlength=3).tolist()
    names = dict(dataset.users.iter_rows())
    by_user = {names[u]: int(e) + 1 for u, e in zip(cases.users.tolist(), chosen, strict=True)}
    for expert in report.experts.experts:
        assert all(by_user[user.user_id] == expert.number for user in expert.examples)
        own = [n for n, e in zip(cases.histories.lengths.tolist(), chosen.tolist(), strict=True)
               if e + 1 == expert.number]
        assert expert.mean_history == pytest.approx(np.mean(own) if own else 0)
    assert all(e.expert == by_user[e.user_id] for e in report.examples)


def test_lift_by_hand():
    """Twelve users, two experts: six buy paint, all buy nails; one of the second expert's buys paint too."""
    paint, nail, saw = 0, 1, 2
    histories = [[paint, nail, paint]] * 6 + [[nail, saw]] * 5 + [[nail, paint, saw, saw]]
    scores = np.array([[0.9 - i / 100, 0.1 + i / 100] for i in range(6)] + [[0.2, 0.8]] * 6)
    found = profile(scores, [f"u{i}" for i in range(12)], histories, ["red paint", "nails", "saw"],
                    ["paint", "nails", "saws"], [None, "acme", None])
    first, second = found.experts
    assert (first.users, second.users, first.mean_history) == (6, 6, 3)
    assert [(t.name, t.share, t.lift, t.users) for t in first.categories] == [("paint", 1.0, pytest.approx(12 / 7), 6)]
    assert [(t.name, t.share, t.average, t.lift) for t in second.categories] == [("saws", 1.0, 0.5, 2.0)]
    assert first.brands == second.brands == ()  # all buy acme: nothing sets an expert apart
    assert [u.user_id for u in first.examples] == ["u0", "u1", "u2"]
    assert first.examples[0].titles == ("red paint", "nails", "red paint")
    assert [u.user_id for u in second.examples] == ["u6", "u7", "u8"]  # equals in their order
    assert found.effective == pytest.approx(2)
    lonely = profile(scores[:6], list("abcdef"), histories[:6], ["", "", ""], [None] * 3, [None] * 3)
    assert lonely.effective == pytest.approx(1) and lonely.experts[1].users == 0 and not lonely.experts[1].examples


def test_curves_are_those_of_the_folders(report, run_folder):
    fit, pretraining = report.trainings
    assert [(e["phase"], e["epoch"]) for e in fit.epochs] == [
        ("stage 1", 0), ("stage 1", 1), ("stage 1", 2), ("stage 2", 1)]
    assert fit.kept.keys() == {"phase", "epoch"} and fit.steps[-1]["step"] > 3
    assert sum(fit.is_kept(e) for e in fit.epochs) == 1
    assert pretraining.kept["epoch"] in (1, 2, 3) and len(pretraining.epochs) == 3


def test_a_model_without_router_and_items_added_later(run_folder, fit, tmp_path):
    dataset = Dataset.load(run_folder / "data")
    model = fit(run_folder / "data", tmp_path / "plain", below=run_folder / "sasrec", mformer={"prefix": "none"},
                head={"seen_offset": True, "seen_offset_start": 3.0},
                train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    model.add_items(pl.DataFrame({"item_id": ["new"], "title": ["A new drill"]}))
    model.remove_items([dataset.items["item_id"][0]])
    model.save_pretrained(tmp_path / "saved" / "model")
    report = collect(find(tmp_path / "saved", data=run_folder / "data"), "pca")
    assert report.experts is None and all(e.expert is None for e in report.examples)
    suggested = [(s, e) for e in report.examples for s in e.top]
    assert any(s.seen for s, _ in suggested) and all(s.title in e.history for s, e in suggested if s.seen)
    assert report.items.n_items == report.n_items == dataset.n_items and "A new drill" in report.items.titles
    gone = dataset.items["title"][0]
    assert gone not in {s.title for s, _ in suggested}
    assert all((e.next is None) == (t == gone) for e, t in zip(report.examples, _targets(report, dataset), strict=True))
    assert [(t.name, len(t.epochs), t.steps) for t in report.trainings] == [("laser", 2, [])] and report.results is None


def _targets(report, dataset):
    """The titles of the examples' true next items."""
    last = dataset.interactions.filter(pl.col("split") == "test").join(dataset.users, "user")
    title = dict(last.join(dataset.items, "item").select("user_id", "title").iter_rows())
    return [title[e.user_id] for e in report.examples]


# -- the map ----------------------------------------------------------------------------------------------------------


def clusters(n=60):
    torch.manual_seed(0)
    centres = torch.eye(3).repeat_interleave(8, dim=1)
    return torch.cat([centres[i % 3] + 0.05 * torch.randn(24) for i in range(n)]).view(n, 24).numpy()


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_neighbours_stay_neighbours(method):
    x = clusters()
    a, b = (item_map.draw(x, [f"t{i}" for i in range(60)], ["abc"[i % 3] for i in range(60)], [None] * 60, method)
            for _ in range(2))
    assert np.array_equal(a.x, b.x) and np.array_equal(a.y, b.y)
    points = np.stack([a.x, a.y], axis=1)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(60)
    assert (distance.argmin(axis=1) % 3 == np.arange(60) % 3).all()
    assert a.counts() == {"a": 20, "b": 20, "c": 20} and a.kind == "category"


def test_pca_is_the_direction_of_most_variance():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 1)) * np.array([[0.6, 0.8, 0.0]]) * 5 + rng.normal(size=(200, 3)) * 0.1
    flat = item_map._pca(points)
    assert abs(np.corrcoef(flat[:, 0], points @ [0.6, 0.8, 0.0])[0, 1]) > 0.999
    assert flat.shape == (200, 2) and flat[:, 0].var() > 100 * flat[:, 1].var()
    assert item_map._pca(points[:1]).shape == (1, 2)


def test_groups_and_a_large_catalogue(monkeypatch):
    monkeypatch.setattr(item_map, "MOST", 30)
    names = [f"kind{min(i % 12, 9)}" for i in range(59)]
    found = item_map.draw(clusters(), [str(i).rjust(200, "0") for i in range(60)], [None] * 60, [*names, None], "pca")
    assert found.kind == "brand" and found.n_items == 60 and len(found.titles) == len(found.x) == 30
    assert sum(found.counts().values()) == 30 and {len(t) for t in found.titles} == {120}
    assert len(found.groups) <= 10 and set(found.groups) - {item_map.OTHER, item_map.UNKNOWN} <= set(names)
    assert found.groups[0] == "kind9"  # three in twelve


def test_small_catalogues():
    few = clusters(6), ["t"] * 6, [None] * 6, [None] * 6
    assert item_map.draw(*few).method == "pca" and item_map.draw(*few).counts() == {"unknown": 6}
    with pytest.raises(UserError, match="too few"):
        item_map.draw(*few, "tsne")


@pytest.mark.parametrize(("module", "library"), [("jinja2", "jinja2"), ("matplotlib", "matplotlib"),
                                                 ("sklearn", "scikit-learn")])
def test_a_missing_library_is_told_before_any_work(run_folder, monkeypatch, module, library):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(LaserRecommender, "from_pretrained", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=rf"needs {library}: pip install 'laserrec\[report\]'"):
        collect(find(run_folder))


def test_departments_of_categories():
    shop = "Shop Floor"
    paths = [f"{shop} Pro Dental Care Brushes", f"{shop} Pro Dental Care Paste", f"{shop} Pro Medical Gloves", None,
             f"{shop} Tapes & Glue Duct Tape", f"{shop} Tapes & Glue", f"{shop} Hardware", f"{shop} Hardware Hinges"]
    assert short_names(paths)[:4] == ["Pro Dental Care Brushes", "Pro Dental Care Paste", "Pro Medical Gloves", None]
    assert groups(paths) == ["Pro Dental Care", "Pro Dental Care", "Pro Medical Gloves", None, "Tapes & Glue",
                             "Tapes & Glue", "Hardware", "Hardware"]
    assert groups(["Comedy Drama", "Drama", "Comedy", "Drama War"]) == ["Comedy", "Drama", "Comedy", "Drama"]
    assert groups([None, ""]) == [None, None] and groups([]) == [] and groups(["tools"] * 3) == ["tools"] * 3


# -- results ----------------------------------------------------------------------------------------------------------


def test_results_of_evaluate_and_of_reproduce(run_folder, tmp_path):
    own = read_results(run_folder / "results.json")
    assert own.metrics == ("recall@10", "ndcg@10", "mrr") and [r["model"] for r in own.rows] == ["Laser", "<i>SASRec"]
    assert own.columns("users", "seeds") == ["users"] and own.rows[0]["exclude_seen"].keys() >= set(own.metrics)
    assert own.best["mrr"] == max(r["mrr"] for r in own.rows)
    entry = {"model": "A", "seeds": 3, "recall@5": 0.2, "recall@5_sd": 0.01, "ndcg@5": 0.1, "ndcg@5_sd": 0.02,
             "mrr": 0.1, "mrr_sd": 0.0, "ndcg@5_difference": 0.01, "low": 0.0, "high": 0.02}
    (tmp_path / "quality.json").write_text(json.dumps({"rows": [], "summary": [entry, {**entry, "seeds": 1}]}))
    many = read_results(tmp_path / "quality.json")
    assert many.metrics == ("recall@5", "ndcg@5", "mrr") and many.split == "test"
    assert many.columns("seeds", "users", "exclude_seen") == ["seeds"]


@pytest.mark.parametrize("text", ["{}", "[]", "[1]", '[{"model": "x", "mrr": 1}]', '{"summary": "x"}',
                                  '[{"model": "x", "recall@10": "a", "ndcg@10": 0.1, "mrr": 1}]', "not json",
                                  '[{"model": "x", "recall@1": 0, "ndcg@1": 0, "mrr": 1, "exclude_seen": {"mrr": 1}}]'])
def test_other_files_are_no_results(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=r"r\.json is (no table of results|damaged)"):
        read_results(tmp_path / "r.json")


# -- the command ------------------------------------------------------------------------------------------------------


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["laserrec", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_command(run_folder, tmp_path, monkeypatch, capsys):
    out, numbers = tmp_path / "deep" / "page.html", tmp_path / "numbers.json"
    assert call(monkeypatch, "report", run_folder, "--out", out, "--json", numbers, "--map", "pca") == 0
    assert str(out) in capsys.readouterr().out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    facts = json.loads(numbers.read_text(encoding="utf-8"))
    assert sum(e["users"] for e in facts["experts"]["experts"]) == 24 and len(facts["examples"]) == 5
    assert facts["map"]["method"] == "pca" and sum(facts["map"]["groups"].values()) == 14
    assert call(monkeypatch, "report", tmp_path) == 2 and "is no run" in capsys.readouterr().err
    assert call(monkeypatch, "report", run_folder, "--results", run_folder / "data" / "meta.json") == 2
    assert "no table of results" in capsys.readouterr().err
