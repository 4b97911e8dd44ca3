"""The command line in this process, and a small shop for it."""

import re
import sys

import pytest
import tiny

from laserrec.cli import main as cli
from laserrec.config import load_config
from laserrec.data.prepare import prepare_source

N = 10
"""Items of the shop."""
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
item_side = "trained"
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


@pytest.fixture(scope="session")
def settings(llm_folder, tmp_path_factory):
    """A settings file of a few neurons."""
    file = tmp_path_factory.mktemp("settings") / "tiny.toml"
    file.write_text(TINY.replace("{folder}", str(llm_folder())), encoding="utf-8")
    return file


def write_raw(folder):
    """orders.csv (customer, sku, timestamp) and goods.csv (sku, title, ...)."""
    orders, goods = tiny.planted_tables(N, users=12)
    orders.rename({"user_id": "customer", "item_id": "sku"}).write_csv(folder / "orders.csv")
    goods.rename({"item_id": "sku"}).write_csv(folder / "goods.csv")


@pytest.fixture(scope="session")
def data(settings, tmp_path_factory):
    """A data folder of 12 users; tests do not change it."""
    folder = tmp_path_factory.mktemp("shop")
    write_raw(folder)
    prepare_source([str(folder / "orders.csv"), str(folder / "goods.csv")], folder / "data",
                   load_config("small", settings).data, columns={"user_id": "customer", "item_id": "sku"})
    return folder / "data"
