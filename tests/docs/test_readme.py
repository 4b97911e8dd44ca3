"""README's own-data blocks run as they stand, on small files and a tiny LLM."""

import re
import shlex
from contextlib import ExitStack
from pathlib import Path

import fake_hub
import polars as pl
import pytest
import tiny
from snippets import Reader

from laserrec import LaserRecommender, presets

ROOT = Path(__file__).parents[2]
IDS = ["SKU-17", "SKU-4", "SKU-9", *(f"SKU-{i}" for i in range(100, 107))]


def block(language: str, heading: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {heading}")[1]
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL).group(1)


def run(commands: str, monkeypatch) -> None:
    """A block without a language: a command a line."""
    with ExitStack() as stack:
        reader = Reader(stack, monkeypatch)
        for line in commands.splitlines():
            reader.command(shlex.split(line, comments=True))


@pytest.fixture
def shop(tmp_path, monkeypatch, llm_folder):
    monkeypatch.chdir(tmp_path)
    own_id = pl.col("item_id").replace({f"i{i}": sku for i, sku in enumerate(IDS, 1)})
    config = tiny.config(llm_folder(), data={"min_user_interactions": 2, "min_item_interactions": 1})
    monkeypatch.setitem(presets.PRESETS, "small", config.model_dump())
    return tuple(table.with_columns(own_id) for table in tiny.planted_tables(len(IDS), users=30))


def test_python_in_ten_lines(shop):
    orders, goods = shop
    orders.write_csv("orders.csv")
    goods.write_csv("goods.csv")
    names: dict = {}
    exec(block("python", "Python in ten lines"), names)
    assert names["users"].shape[1] == names["items"].shape[1]
    assert "SKU-NEW" in names["model"].items["item_id"].to_list()


def test_own_data_in_ten_lines(shop, monkeypatch):
    orders, goods = shop
    orders.rename({"user_id": "customer", "item_id": "sku", "timestamp": "date"}).write_csv("orders.csv")
    goods.rename({"item_id": "sku", "title": "name"}).write_csv("goods.csv")
    orders.select("user_id", "item_id").write_csv("users.csv")
    run(block("", "Your own data in ten lines"), monkeypatch)
    assert pl.read_parquet("recommendations.parquet")["user_id"].n_unique() == 30
    assert Path("results.json").is_file()


def test_in_production(shop, tmp_path, monkeypatch):
    orders, goods = shop
    LaserRecommender.fit(orders, goods, folder="runs", progress=False)
    orders.group_by("user_id").agg(pl.col("item_id").alias("items")).write_parquet("histories.parquet")
    with fake_hub.used(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        run(block("", "In production"), monkeypatch)
    assert hub.repos["my-shop/laser-tools"].private
    assert pl.read_parquet("recommendations/part-*.parquet")["user_id"].n_unique() == 30


def test_what_to_make_is_in_the_makefile(monkeypatch):
    run(re.search(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1], monkeypatch)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
