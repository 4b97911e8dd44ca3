"""The messages that docs/troubleshooting.md shows are those that these mistakes give."""

import re
from pathlib import Path

import pytest

from laserrec.config import DataConfig
from laserrec.data.door import read_histories
from laserrec.data.prepare import prepare_source
from laserrec.data.summary import summary_lines
from laserrec.util.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
GOODS = "item_id,title\n" + "".join(f"{i},Drill {i}\n" for i in "abc")
CATALOGUE = {"SKU-17": 0, "SKU-4": 1}


def orders(header, *rows):
    return "\n".join((header, *rows)) + "\n"


def prepared(text, encoding="utf-8", **options):
    """What `prepare` of these orders tells, in a folder of its own."""
    Path("orders.csv").write_text(text, encoding=encoding)
    Path("items.csv").write_text(GOODS)
    return summary_lines(prepare_source(["orders.csv", "items.csv"], "data", **options))


def twice():
    text = orders("user_id,item_id", *[f"u,{i}" for i in "abc"])
    prepared(text, config=DataConfig(min_user_interactions=1, min_item_interactions=1))
    prepared(text, config=DataConfig(min_user_interactions=2, min_item_interactions=1))


LOOSE = DataConfig(min_user_interactions=1, min_item_interactions=1)
MISTAKES = [
    lambda: read_histories([["17", "4"]], {"0017": 0, "0004": 1}, unknown="drop"),
    lambda: prepared(orders("user_id,item_id", *[f"u{n},{i}" for n in range(4) for i in "abc"])),
    lambda: prepared(orders("user_id,item_id", "u,a", "u,b"), config=LOOSE)[-1],
    lambda: prepared(orders("customer,sku,date", "u,a,1")),
    lambda: prepared(orders("user_id;item_id;date", "u;a;1")),
    lambda: prepared(orders("user_id,item_id", "u,Bär"), encoding="cp1252"),
    lambda: prepared(orders("user_id,item_id,timestamp", "u,a,12/1/2010 8:26")),
    lambda: read_histories(["SKU-17", "SKU-4"], CATALOGUE),
    lambda: read_histories({"ann": ["SKU-17", "SKU-999"]}, CATALOGUE),
    twice,
]


@pytest.mark.filterwarnings("ignore::laserrec.data.losses.LossWarning")
@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_page_shows_what_the_mistake_gives(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = re.split(r"^## \d+\. ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) == len(MISTAKES)
    shown = re.search(r"```text\n(.*?)\n```", sections[number], re.DOTALL)[1]
    try:
        told = MISTAKES[number]()
    except UserError as error:
        told = str(error)
    assert re.fullmatch(re.escape(shown).replace(r"it:\ \.\.\.", ".*"), told), told
