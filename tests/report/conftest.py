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
from laserrec.methods.id_store import load_id_model
from laserrec.training.pretrain import pretrain_id_model
from laserrec.util.io import write_json, write_parquet

N = 14


@pytest.fixture(scope="session")
def run_folder(llm, llm_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("reported") / "run"
    orders, goods = tiny.planted_tables(N, users=24)
    orders = orders.with_columns(pl.col("user_id").replace({"u1": "<u>1&"}))
    config = tiny.config(llm_folder(), data={"min_user_interactions": 2, "min_item_interactions": 1},
                         head={"seen_offset": True, "id_share": 0.3},
                         prompt={"layout": "text_first", "item_side": "plain", "max_items": 4, "max_item_tokens": 8})
    raw = from_frames(orders, goods)
    prepare(raw.interactions, raw.items, config.data, run / "data", notes=raw.notes)
    # Preparing would clean these; a page must not count on it.
    items = pl.read_parquet(run / "data" / "items.parquet").with_columns(
        title=pl.when(pl.col("item") % 2 == 0).then(pl.lit(EVIL)).otherwise("title"),
        brand=pl.when(pl.col("item") < 9).then(pl.lit(EVIL_BRAND)).otherwise("brand"),
        category=pl.when(pl.col("item") % 3 == 0).then(pl.lit(EVIL_CATEGORY)).otherwise("category"))
    write_parquet(run / "data" / "items.parquet", items)
    dataset = Dataset.load(run / "data")
    pretrain_id_model(dataset, config.id_model, run / "sasrec", progress=False)
    id_model = load_id_model(run / "sasrec", dataset).model
    model = LaserRecommender.fit_dataset(dataset, id_model, config, run / "model", False, llm())
    rows = [evaluate(name, score, dataset, "test").row() for name, score in (("Laser", model.score),
                                                                            ("<i>SASRec", id_model.score))]
    write_json(run / "results.json", rows)
    return run
