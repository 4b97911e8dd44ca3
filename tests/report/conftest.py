"""A tiny run laid out as quickstart does, whose texts try to become markup."""

import polars as pl
import pytest
import tiny
from evil import EVIL, EVIL_BRAND, EVIL_CATEGORY

from laserrec import LaserRecommender
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.evaluation.evaluate import evaluate
from laserrec.util.io import write_json, write_parquet

N = 14


@pytest.fixture(scope="session")
def fit(llm_folder):
    """(data folder, model folder, method, folder of the ID model, settings) -> the fitted model."""

    def fit(data, folder, method="laser", below=None, **sections):
        sections = {"head": {"seen_offset": True, "id_share": 0.3}, "prompt": {
            "layout": "text_first", "item_side": "plain", "max_items": 4, "max_item_tokens": 8}} | sections
        return LaserRecommender.fit_dataset(Dataset.load(data), tiny.config(llm_folder(), **sections), folder, method,
                                            below, device="cpu", progress=False)

    return fit


@pytest.fixture(scope="session")
def run_folder(fit, llm_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("reported") / "run"
    orders, goods = tiny.planted_tables(N, users=24)
    orders = orders.with_columns(pl.col("user_id").replace({"u1": "<u>1&"}))
    config = tiny.config(llm_folder(), data={"min_user_interactions": 2, "min_item_interactions": 1})
    raw = from_frames(orders, goods)
    prepare(raw.interactions, raw.items, config.data, run / "data", notes=raw.notes)
    # Preparing would clean these; a page must not count on it.
    items = pl.read_parquet(run / "data" / "items.parquet").with_columns(
        title=pl.when(pl.col("item") % 2 == 1).then(pl.lit(EVIL)).otherwise("title"),
        brand=pl.when(pl.col("item") < 8).then(pl.lit(EVIL_BRAND)).otherwise("brand"),
        category=pl.when(pl.col("item") % 3 == 2).then(pl.lit(EVIL_CATEGORY)).otherwise("category"))
    write_parquet(run / "data" / "items.parquet", items)
    id_model = fit(run / "data", run / "sasrec", "sasrec")
    model = fit(run / "data", run / "model", below=run / "sasrec")
    rows = [evaluate(name, scored, Dataset.load(run / "data"), "test").row()
            for name, scored in (("Laser", model), ("<i>SASRec", id_model))]
    write_json(run / "results.json", rows)
    return run
