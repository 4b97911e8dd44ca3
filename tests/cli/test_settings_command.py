"""`laserrec settings`, and the help of the commands that take settings."""

import json

import pytest
from snippets import leaves

from laserrec.cli.main import app
from laserrec.cli.reflow import reflowed
from laserrec.config import Config, load_config
from laserrec.config.described import described


def test_defaults_are_the_default_presets(run):
    code, out, _ = run("settings", "train", "prompt", "id_model", "blend")
    assert code == 0 and "(default:" not in out
    usual, paper = load_config().prompt.max_item_tokens, load_config("paper").prompt.max_item_tokens
    _, out, _ = run("settings", "max_item_tokens", "--preset", "paper")
    assert f"--prompt.max-item-tokens {paper} (default: {usual})" in out and paper != usual


def test_the_sections_are_listed(run):
    code, out, err = run("settings")
    assert code == 0 and not err
    assert all(name in out for name in ("id_model", "The frozen decoder LLM", "blend", "recguru"))


def test_values_come_from_preset_and_file(run, tmp_path):
    file, numbers = tmp_path / "my.toml", tmp_path / "settings.json"
    file.write_text("[train]\nlr = 0.25\n", encoding="utf-8")
    code, out, _ = run("settings", "train.lr", "id-model.seen_offset", "--preset", "quickstart", "--config", file,
                       "--json", numbers)
    usual = load_config("quickstart").id_model.seen_offset
    assert code == 0 and usual
    assert "--train.lr 0.25 (default: 1e-3) Peak learning rate. Number, above 0." in out
    assert "--id-model.seen-offset, --id-model.no-seen-offset true Learn one number" in out
    assert [(one["name"], one["value"]) for one in json.loads(numbers.read_text())] == [
        ("id_model.seen_offset", "true"), ("train.lr", "0.25")]


@pytest.mark.parametrize(("word", "some", "none"), [
    ("eval", ["--eval.k ", "--eval.batch-size "], ["--id-model.eval-every"]),  # a section, and no name of others
    ("dropout", ["--id-model.dropout ", "--mformer.state-dropout "], ["--train.lr"]),
    ("state_drop", ["--mformer.state-dropout "], ["--mformer.dropout"])])
def test_words_are_sections_or_parts_of_names(run, word, some, none):
    code, out, _ = run("settings", word)
    assert code == 0 and all(one in out for one in some) and not any(one in out for one in none)


def test_a_word_that_is_in_no_name(run):
    code, out, err = run("settings", "lr", "learning-rate")
    assert code == 2 and not out and "no setting has 'learning-rate' in its name" in err and "id_model" in err


def test_every_setting_is_told_with_type_and_meaning():
    everything = [*described(Config(), Config())]
    assert len({one.name for one in everything}) == len(everything) > 200
    assert all(one.description and one.kind and one.value == one.default for one in everything)
    kinds = {one.name: one.kind for one in everything}
    assert kinds["id_model.kind"] == "one of sasrec, bert4rec, gru4rec, none"
    assert kinds["blend.light_dropout"] == "number or none, at least 0, below 1"
    assert kinds["blend.shuffles"] == "list of number (repeat the flag)"


@pytest.mark.parametrize("command", [["fit"], ["pretrain"], ["refit"], ["reproduce", "table2"]])
def test_help_is_read_in_one_screen(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0 and "laserrec settings" in out and "--id-model.dropout" not in out and len(out) < 5000


def test_prepare_tells_its_own_settings_and_takes_no_others(run, tmp_path):
    _, out, _ = run("prepare", "--help")
    assert "--data.split" in out and "--train" not in out
    code, _, err = run("prepare", "x.csv", tmp_path / "d", "--train.lr", 1)
    assert code == 2 and "--train.lr" in err


def test_every_parameter_is_explained():
    for words, command in leaves(app).items():
        for argument in command.assemble_argument_collection(default_parameter=app.default_parameter,
                                                             parse_docstring=True):
            assert argument.children or not argument.show or argument.parameter.help, (words, argument.name)


def test_help_keeps_the_breaks_of_examples_alone():
    assert reflowed("""One
    line. And

    Examples:
      laserrec a
      laserrec b

    Parameters
    ----------
    name
        What it
        is.
    other
        This.
    """) == """One line. And

Examples:
  laserrec a
  laserrec b

Parameters
----------
name
    What it is.
other
    This."""
