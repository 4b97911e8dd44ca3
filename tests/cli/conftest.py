"""The command line in this process, and a data folder for it."""

import re
import sys

import pytest
from shop import TINY, write_raw

from laserrec.cli import main as cli
from laserrec.config import load_config
from laserrec.data.prepare import prepare_source


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


@pytest.fixture(scope="session")
def data(settings, tmp_path_factory):
    """A data folder of 12 users; tests do not change it."""
    folder = tmp_path_factory.mktemp("shop")
    write_raw(folder)
    prepare_source([str(folder / "orders.csv"), str(folder / "goods.csv")], folder / "data",
                   load_config("small", settings).data, columns={"user_id": "customer", "item_id": "sku"})
    return folder / "data"
