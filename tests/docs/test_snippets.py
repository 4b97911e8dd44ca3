"""What the pages tell a reader to type is run: every console and python block, on small files and a tiny LLM."""

import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import fake_hub
import polars as pl
import pytest
import tiny
from snippets import ROOT, RUN, SECTIONS, SHOWN, Block, Reader, blocks, leaves, parse, starts_with

from laserrec import LaserRecommender, presets
from laserrec.cli.main import app
from laserrec.config import load_config, merge
from laserrec.data import sources
from laserrec.llm import weights
from laserrec.recommender import fitting

PAGES = sorted((ROOT / "docs").rglob("*.md"))
IDS = ["SKU-17", "SKU-4", "SKU-9", *(f"SKU-{i}" for i in range(100, 107)), "B0001", "B0002"]
TINY = {
    "data": {"min_user_interactions": 2, "min_item_interactions": 1},
    "id_model": {"d_id": 16, "blocks": 1, "max_history": 6, "max_epochs": 2, "batch_size": 32},
    "prompt": {"max_items": 3, "max_item_tokens": 8},
    "mformer": {"experts": 3, "queries": 2, "blocks": 2, "d_model": 16, "heads": 2},
    "train": {"batch_size": 32, "stage_one_epochs": 1, "stage_two_epochs": 1},
    "eval": {"batch_size": 32},
}


def small_files(folder: Path) -> None:
    """orders.csv and goods.csv; the same with a shop's own columns; histories for the batch."""
    own = pl.col("item_id").replace({f"i{i}": name for i, name in enumerate(IDS, 1)})
    orders, goods = (table.with_columns(own) for table in tiny.planted_tables(len(IDS), users=14))
    orders.write_csv(folder / "orders.csv")
    goods.write_csv(folder / "goods.csv")
    orders.rename({"user_id": "customer", "item_id": "sku", "timestamp": "date"}).write_csv(folder / "sales.csv")
    goods.rename({"item_id": "sku", "title": "name"}).write_csv(folder / "products.csv")
    orders.group_by("user_id", maintain_order=True).agg(pl.col("item_id").alias("items")).write_parquet(
        folder / "histories.parquet")
    (folder / "bundled").mkdir()
    for name in ("orders.csv", "goods.csv"):
        shutil.copy(folder / name, folder / "bundled" / name.replace("goods", "items"))


@pytest.fixture(scope="module")
def patch(llm_folder):
    """The presets in small: their own choices, sizes of a few neurons, a tiny LLM under every name."""
    with pytest.MonkeyPatch.context() as patch:
        here = {"backbone": {"name": str(llm_folder()), "precision": "fp32", "layers": 1, "mean_layers": (1, 2)}}
        for name, tree in presets.PRESETS.items():
            whiten = {"head": {"whiten_dims": 8}} if tree.get("head", {}).get("whiten_dims") else {}
            patch.setitem(presets.PRESETS, name, merge(merge(merge(tree, TINY), here), whiten))
        for name, tree in presets.METHOD_SETTINGS.items():
            own = {"id_model": TINY["id_model"] | {"max_epochs": 1}} if "id_model" in tree else {}
            patch.setitem(presets.METHOD_SETTINGS, name, merge(tree, own))
        for module in (weights, fitting):
            patch.setattr(module, "fetch_default", llm_folder)
        yield patch


@pytest.fixture(scope="module")
def made(patch, tmp_path_factory):
    """What a reader may have already: folder of a page -> place."""
    base = tmp_path_factory.mktemp("made")
    small_files(base)
    config = load_config("small")
    LaserRecommender.fit(pl.read_csv(base / "orders.csv"), pl.read_csv(base / "goods.csv"), config, base / "runs",
                         progress=False)
    names = ("data", "model")
    return {f"runs/{n}": base / "runs" / n for n in names} | {f"runs/quickstart/{n}": base / "runs" / n for n in names}


@pytest.fixture
def reader(patch, made, tmp_path, monkeypatch):
    """A reader in a folder with the small files; amazon-scientific is one of them, and the hub is on loopback."""
    small_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "bundled", lambda name="": tmp_path / "bundled")
    with ExitStack() as stack:
        hub = stack.enter_context(fake_hub.used(monkeypatch, tmp_path / "cache"))
        for name, value in fake_hub.environment(hub.url, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield Reader(stack, monkeypatch)


def runnable(page: Path):
    return [b for b in blocks(page) if b.shown_only is None]


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language in RUN for b in runnable(p))],
                         ids=lambda p: str(p.relative_to(ROOT / "docs")))
def test_what_a_page_says_runs(page, reader, made):
    for folder in starts_with(page):
        shutil.copytree(made[folder], folder)
    for block in runnable(page):
        try:
            reader.run(block)
        except BaseException as error:
            error.add_note(f"{page.relative_to(ROOT)}, block at line {block.line}")
            raise


def test_a_wrong_snippet_is_noticed(reader):
    for text in ("$ laserrec evaluate runs/nowhere popularity", "$ laserrec fit a b c --train.speed 3",
                 "$ laserrec serv model", "$ rm -rf runs", "$ pip install 'laserrec[unheard-of]'", "$ make coffee",
                 "$ torchrun --nproc-per-node 2 -m laserec fit a b c", "$ hf auth logout"):
        with pytest.raises((AssertionError, KeyError)):
            reader.run(Block("console", text, 1, None))
    with pytest.raises(ImportError):
        reader.run(Block("python", "from laserrec import Maser", 1, None))


def test_blocks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- starts with: runs/a runs/b -->\n# T\n```console\n$ a --b \\\n  'c d'  # e\nout\n```\n\n"
                    "<!-- shown only: no network -->\n```python\nimport x\n```\n```{include} y\n```\n```text\n```\n")
    shell, python, text = blocks(page)
    assert starts_with(page) == ["runs/a", "runs/b"]
    assert shell.commands() == [["a", "--b", "c d"]] and shell.shown_only is None and shell.line == 3
    assert python.shown_only == "no network" and text.language == "text" and text.text == ""


def test_every_block_says_what_it_is():
    for page in PAGES:
        for block in blocks(page):
            where = f"{page.relative_to(ROOT)}, line {block.line}"
            assert block.language in (*RUN, *SHOWN), f"{where}: give the block one of the languages {RUN + SHOWN}"
            if block.language == "console":
                assert block.commands(), f"{where}: a console block's commands begin with `$ `"


def test_commands_that_are_only_shown_parse():
    """Names and flags are right even where nothing is run."""
    for page in PAGES:
        for block in blocks(page):
            for words in block.commands() if block.language == "console" else ():
                if words[0] == "laserrec":
                    parse(words)


def test_flags_and_settings_named_in_the_text_are_there():
    flags = {name for command in leaves(app).values() for argument in command.assemble_argument_collection()
             for name in argument.names} | {"--help"}
    settings = {f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields}
    seen = set()
    for page in (*PAGES, ROOT / "README.md"):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            named = {*re.findall(r"(?<!\S)--[a-z][\w.-]*", code)}
            named |= {*re.findall(rf"^(?:{'|'.join(SECTIONS)})\.[a-z_]+(?![\w.])", code)}
            assert named <= flags | settings, f"{page.relative_to(ROOT)}: {named - flags - settings}"
            seen |= named
    assert {"--preset", "prompt.layout", "--mformer.prefix"} <= seen
