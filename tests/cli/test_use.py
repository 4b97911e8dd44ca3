"""Evaluating and recommending from the command line."""

import json
import shutil

import polars as pl
import pytest

from laserrec.cli.use import _file_names

METRICS = ("recall@10", "ndcg@10", "mrr")


@pytest.fixture(scope="session")
def models(settings, data, tmp_path_factory):
    """Two folders called model, one of Laser and one of SASRec; tests do not change them."""
    from laserrec.config import load_config
    from laserrec.data.dataset import Dataset
    from laserrec.recommender.recommender import LaserRecommender

    out, config = tmp_path_factory.mktemp("models"), load_config("small", settings)
    for method in ("laser", "sasrec"):
        LaserRecommender.fit_dataset(Dataset.load(data), config, out / method / "model", method, progress=False)
    return out / "laser" / "model", out / "sasrec" / "model"


def test_one_table_of_folders_and_names(run, data, models, tmp_path):
    numbers = tmp_path / "numbers.json"
    code, out, err = run("evaluate", data, *models, "popularity", "ease", "--quiet", "--json", numbers)
    assert code == 0 and "Recall@10" in out and "all 10 items ranked" in out, err
    rows = json.loads(numbers.read_text())
    assert [row["model"] for row in rows] == [*map(str, models), "popularity", "ease"]
    assert all(row["users"] == 12 and 0 <= row["ndcg@10"] <= row["recall@10"] <= 1 for row in rows)


def test_ranks_of_folders_of_one_name_lie_side_by_side(run, data, models, tmp_path):
    numbers, ranks = tmp_path / "numbers.json", tmp_path / "ranks"
    code, _, err = run("evaluate", data, *models, models[0], "--quiet", "--ranks", ranks, "--json", numbers)
    assert code == 0, err
    rows = json.loads(numbers.read_text())
    assert len({row["ranks"] for row in rows}) == len(list(ranks.iterdir())) == 3
    for row in rows:
        table = pl.read_parquet(row["ranks"])
        assert table.height == row["users"] and (1 / table["rank"]).mean() == pytest.approx(row["mrr"])
    assert rows[0]["mrr"] != rows[1]["mrr"]
    code, *_ = run("evaluate", data, models[0], "--split", "validation", "--quiet", "--ranks", ranks)
    assert code == 0 and len(list(ranks.iterdir())) == 4


def test_what_was_measured_is_told_where_a_later_model_can_not_be_loaded(run, data, models, tmp_path):
    code, out, err = run("evaluate", data, "popularity", tmp_path, "--quiet")
    assert code == 2 and out == "" and "is not a model folder" in err  # before any work
    damaged, numbers = shutil.copytree(models[1], tmp_path / "damaged"), tmp_path / "numbers.json"
    (damaged / "weights.safetensors").write_bytes(b"")
    code, out, err = run("evaluate", data, "popularity", damaged, "--quiet", "--json", numbers)
    assert code == 2 and "is cut short" in err and "popularity" in out
    assert [row["model"] for row in json.loads(numbers.read_text())] == ["popularity"]


def test_file_names_are_distinct():
    names = ["a/model", "b/model", "a-model", "org/x@v2", ".", "..", "a/model"]
    assert _file_names(names) == ["a-model", "b-model", "a-model-2", "org-x@v2", "model", "model-2", "a-model-3"]


def test_the_users_at_once_are_the_models_own(run, data, models, tmp_path, monkeypatch):
    from laserrec.evaluation import evaluate

    seen, rank_cases = [], evaluate.rank_cases
    monkeypatch.setattr(evaluate, "rank_cases", lambda model, cases, size, *rest: (
        seen.append(size), rank_cases(model, cases, size, *rest))[1])
    own = shutil.copytree(models[1], tmp_path / "own")
    note = json.loads((own / "model.json").read_text())
    note["config"]["eval"]["batch_size"] = 3
    (own / "model.json").write_text(json.dumps(note))
    code, _, err = run("evaluate", data, own, models[0], "--quiet")
    assert code == 0 and seen == [3, 64], err


def test_recorded_results_stand_on_the_card(run, data, models, tmp_path):
    own, numbers = shutil.copytree(models[0], tmp_path / "own"), tmp_path / "numbers.json"
    code, _, err = run("evaluate", data, own, "popularity", "--quiet", "--record", "--json", numbers)
    row = json.loads(numbers.read_text())[0]
    card = (own / "README.md").read_text()
    assert code == 0 and f"| test | {row['recall@10']:.4f} | {row['ndcg@10']:.4f} |" in card, err
    assert "not stated" in card
    code, out, err = run("card", own, "--license", "MIT", "--data-name", "planted tools")
    assert code == 0 and "README.md" in out, err
    card = (own / "README.md").read_text()
    assert "license: mit" in card and "| data set | planted tools |" in card and "| test |" in card
    (own / "README.md").write_text("mine")
    code, out, err = run("card", own)
    assert code == 0 and "a person's; left as it is" in out and (own / "README.md").read_text() == "mine"


def test_one_history_and_a_file_of_histories(run, models, tmp_path):
    model, numbers = models[0], tmp_path / "numbers.json"
    code, out, err = run("recommend", model, "--history", "i1, i2", "--k", "3", "--json", numbers)
    rows = json.loads(numbers.read_text())
    assert code == 0 and [r["rank"] for r in rows] == [1, 2, 3] and rows[0]["item_id"] in out, err
    (tmp_path / "users.csv").write_text("user_id,item_id\n007,i1\n007,i2\nanna,i3\n", encoding="utf-8")
    code, *_ = run("recommend", model, "--histories", tmp_path / "users.csv", "--out", tmp_path / "rec.csv", "--k", 2)
    table = pl.read_csv(tmp_path / "rec.csv", infer_schema=False)
    assert code == 0 and table["user_id"].to_list() == ["007", "007", "anna", "anna"]
    assert table["item_id"].to_list()[:2] == [r["item_id"] for r in rows[:2]]
    (tmp_path / "users.txt").write_text("user_id;item_id\nBär;i1\nBär;gone\n", encoding="cp1252")
    shutil.move(tmp_path / "users.txt", tmp_path / "users.csv")
    code, out, err = run("recommend", model, "--histories", tmp_path / "users.csv", "--separator", ";", "--encoding",
                         "cp1252", "--unknown", "drop")
    assert code == 0 and "Bär" in out and err.startswith("warning: 1 of 2 items of the histories are not in"), err
    code, _, err = run("recommend", model, "--history", "i1, i2", "--k", "3", "--json", numbers,
                       "--exclude", rows[0]["item_id"] + ", i3")
    found = [row["item_id"] for row in json.loads(numbers.read_text())]
    assert code == 0 and len(found) == 3 and not {*found} & {rows[0]["item_id"], "i3"}, err
    code, _, err = run("recommend", model, "--history", "i1,nope")
    assert code == 2 and err.startswith("error: ") and "nope" in err and "Traceback" not in err


@pytest.mark.parametrize(("text", "message"), [
    ("user_id,item_id\na,i1\na,i2,x\n", "users.csv:3: 3 fields, the header has 2. Mend the line"),
    ("user_id,item_id,timestamp\na,i1,1\na,i2,yesterday\n",
     "users.csv:3, column timestamp: neither a number nor an ISO 8601 date (found 'yesterday'); mend it"),
    ("user_id,item_id\na,i1\n ,i2\n", "users.csv:3, column user_id: empty id (found ' '); mend it"),
    ("user_id;item_id\na;i1\n", "users.csv: histories: no column for user_id, item_id; there are: user_id;item_id. The "
     "header looks separated by ';'; set --separator \";\" (Python: separator=\";\")"),
])
def test_mistakes_in_a_file_of_histories(run, tmp_path, text, message):
    """Told before the model is opened, with the file and without advice that the command can't take."""
    (tmp_path / "users.csv").write_text(text, encoding="utf-8")
    code, _, err = run("recommend", tmp_path / "none", "--histories", tmp_path / "users.csv", "--unknown", "drop")
    assert code == 2 and err.strip().endswith(message), err


def test_small_losses_are_told_unless_a_level_is_asked_for(run, models, tmp_path, monkeypatch):
    users = "user_id,item_id\n" + "a,i1\n" * 29 + "a,zz\n"
    (tmp_path / "users.csv").write_text(users, encoding="utf-8")
    ask = ("recommend", models[0], "--histories", tmp_path / "users.csv", "--unknown", "drop")
    told = "1 of 30 items of the histories are not in the catalogue and were left out."
    assert run(*ask)[2].strip() == told
    monkeypatch.setenv("LASERREC_LOG", "error")
    assert run(*ask)[2].strip() == ""


def test_an_llm_folder_that_has_moved(run, llm_folder, data, models, tmp_path):
    """model.json names a folder that is not there any more."""
    own = shutil.copytree(models[0], tmp_path / "own")
    note = json.loads((own / "model.json").read_text())
    note["config"]["backbone"]["name"] = note["backbone"]["name"] = str(tmp_path / "gone")
    (own / "model.json").write_text(json.dumps(note))
    code, _, err = run("recommend", own, "--history", "i1")
    assert code == 2 and "gone' could not be loaded: there is no such folder" in err and "its new one: backbone" in err
    moved = shutil.copytree(llm_folder(), tmp_path / "moved")
    numbers = tmp_path / "numbers.json"
    for command in (["recommend", own, "--history", "i1", "--json", numbers], ["evaluate", data, own, "--quiet"],
                    ["distil", data, own, tmp_path / "fast", "--epochs", 1, "--hidden", 8, "--quiet"]):
        code, _, err = run(*command, "--backbone", moved)
        assert code == 0, err
    before = run("recommend", models[0], "--history", "i1", "--json", tmp_path / "before.json")
    assert before[0] == 0 and json.loads(numbers.read_text()) == json.loads((tmp_path / "before.json").read_text())


@pytest.mark.parametrize("command", [["evaluate", "{data}", "{model}"], ["recommend", "{model}", "--history", "i1"],
                                     ["distil", "{data}", "{model}", "{out}"]])
def test_a_device_that_is_not_there(run, data, models, tmp_path, monkeypatch, command):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"{data}": data, "{model}": models[0], "{out}": tmp_path / "out"}
    code, _, err = run(*(places.get(word, word) for word in command), "--device", "cuda")
    assert code == 2 and err.startswith("error: device 'cuda' is not there; this machine has cpu"), err


def test_an_old_folder_is_named_as_one(run, data, models, tmp_path):
    own = shutil.copytree(models[0], tmp_path / "own")
    note = json.loads((own / "model.json").read_text())
    (own / "model.json").write_text(json.dumps({**note, "format": 2}))
    for command in (["evaluate", data, own], ["recommend", own, "--history", "i1"], ["fit", data, own]):
        code, _, err = run(*command)
        assert code == 2 and "it was made by an older version: fit again" in err
    old = shutil.copytree(data, tmp_path / "data")
    (old / "meta.json").write_text(json.dumps({**json.loads((old / "meta.json").read_text()), "format": 1}))
    code, _, err = run("fit", old, tmp_path / "model")
    assert code == 2 and "written by another version of laserrec" in err and "prepare the data again" in err


def test_a_model_of_another_catalogue(run, data, models, tmp_path):
    other = shutil.copytree(data, tmp_path / "data")
    items = pl.read_parquet(other / "items.parquet")
    items.with_columns(item_id="x" + pl.col("item_id")).write_parquet(other / "items.parquet")
    assert run("fit", data, tmp_path / "ease", "--method", "ease", "--quiet")[0] == 0
    code, _, err = run("evaluate", other, tmp_path / "ease", "--quiet")
    assert code == 2 and "has another catalogue than the data folder" in err
    code, out, err = run("evaluate", other, models[0], "--quiet")
    assert code == 0 and "all 10 items ranked" in out and "scores these items by their texts" in err


@pytest.mark.parametrize("trusted", [False, True])
def test_only_a_flag_lets_an_llm_run_code(run, data, models, settings, tmp_path, monkeypatch, trusted):
    from laserrec.llm import text_features

    asked = []

    def load(config, device, trust_remote_code):
        asked.append(trust_remote_code)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_features, "load_backbone", load)
    fresh = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("text_features"))
    for command in (["recommend", models[0], "--history", "i1"], ["evaluate", data, models[0], "--quiet"],
                    ["fit", fresh, tmp_path / "out", "--method", "ease-text", "--config", settings, "--quiet"],
                    ["distil", data, models[0], tmp_path / "fast", "--quiet"]):
        code, *_ = run(*command, *(["--trust-remote-code"] if trusted else []))
        assert code == 130
    assert asked == [trusted] * 4


def test_a_file_that_could_not_be_written_is_told_before_the_work(run, tmp_path):
    code, _, err = run("recommend", tmp_path / "none", "--history", "i1", "--out", "rec.xlsx")
    assert code == 2 and "rec.xlsx: ending '.xlsx' is not one of" in err


def test_inspecting_a_model(run, data, models, tmp_path):
    numbers, laser = tmp_path / "parts.json", tmp_path / "model"
    shutil.copytree(models[0], laser)
    code, out, err = run("inspect", data, laser, "--users", 8, "--record", "--quiet", "--json", numbers)
    assert code == 0 and "validation split, 8 users, all 10 items ranked" in out and "shuffled" in out, err
    told = json.loads(numbers.read_text())
    assert told["rows"][0]["part"] == "as fitted" and -1 <= told["shuffle_cosine"] <= 1
    note = json.loads((laser / "model.json").read_text())
    assert [row["part"] for row in note["parts"]] == [row["part"] for row in told["rows"][1:]]
    assert run("evaluate", data, laser, "--quiet")[0] == 0
    code, out, _ = run("report", laser, "--data", data, "--out", tmp_path / "page.html")
    assert code == 0 and "history shuffled" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("arguments", "told"), [
    (("--users", 0), "users is 0; it must be at least 1"), (("--k", 0), "k is 0; it must be at least 1")])
def test_inspecting_with_numbers_that_make_no_sense(run, data, models, arguments, told):
    code, _, err = run("inspect", data, models[0], *arguments)
    assert code == 2 and told in err
