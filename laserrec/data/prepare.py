"""Clean, number and split (paper, 4.1.1 and 4.1.3): raw frames -> a data folder.

Time order: by timestamp where there is one, ties by the source's order, then by item_id. Without timestamps the
source's order alone. The same input gives the same folder byte for byte, so nothing in it depends on clock or path.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import polars as pl

from laserrec.config import DataConfig, Split
from laserrec.data.readers import Raw
from laserrec.errors import UserError
from laserrec.io import new_folder, write_json, write_parquet

_FORMAT = 1
_TABLES = ("items", "users", "interactions")


def prepare(raw: Raw, config: DataConfig, out: Path, overwrite: bool = False) -> dict:
    """Write the data folder `out` and return its report (also report.json). A folder that already holds the same
    result is left as it is ("reused": true in what is returned).

    Raises UserError when nothing is left after cleaning, when a temporal split lacks timestamps, or when `out` is
    something else and overwrite is False.
    """
    out = Path(out)
    acts, items, steps = _clean(raw, config)
    acts, split_facts = _split(_in_order(acts), config)
    tables = _number(acts, items)
    report = {"steps": steps, "skipped_lines": raw.skipped_lines, "split": split_facts, **_statistics(tables)}
    with new_folder(out.with_name(f".{out.name}.new")) as folder:
        for name, table in zip(_TABLES, tables, strict=True):
            write_parquet(folder / f"{name}.parquet", table)
        digest = hashlib.sha256()
        for name in _TABLES:
            digest.update((folder / f"{name}.parquet").read_bytes())
        write_json(folder / "meta.json", {"format": _FORMAT, "sha256": digest.hexdigest(),
                                          "settings": config.model_dump(mode="json"), "table1": report["table1"]})
        write_json(folder / "report.json", report)
    return {**report, **_take_place(out, overwrite), "sha256": digest.hexdigest()}


def _take_place(out: Path, overwrite: bool) -> dict:
    import shutil

    new = out.with_name(f".{out.name}.new")
    if out.exists():
        same = (out / "meta.json").is_file() and (out / "meta.json").read_bytes() == (new / "meta.json").read_bytes()
        if same:
            shutil.rmtree(new)
            return {"reused": True}
        if not overwrite:
            shutil.rmtree(new)
            known = (out / "meta.json").is_file()
            what = "a data folder made from other input or settings" if known else "not a data folder"
            raise UserError(f"{out} is there already and is {what}; name another folder or say --overwrite")
        if not (out / "meta.json").is_file() and any(out.iterdir()):
            shutil.rmtree(new)
            raise UserError(f"{out} holds files that are no data folder; they are not overwritten, name another folder")
        shutil.rmtree(out)
    new.rename(out)
    return {"reused": False}


# -- cleaning ---------------------------------------------------------------------------------------------------


def _clean(raw: Raw, config: DataConfig) -> tuple[pl.DataFrame, pl.DataFrame, list[dict]]:
    acts, items, steps = raw.interactions, raw.items, []

    def note(reason: str, before: pl.DataFrame, after: pl.DataFrame) -> None:
        steps.append({"dropped": reason, "interactions": before.height - after.height,
                      "users": before["user_id"].n_unique() - after["user_id"].n_unique(),
                      "items": before["item_id"].n_unique() - after["item_id"].n_unique()})

    if acts.height == 0:
        raise UserError("there are no interactions at all; look at the source files")
    known = acts.join(items.select("item_id"), on="item_id", how="semi", maintain_order="left")
    note("item has no metadata row", acts, known)
    acts = known
    if config.drop_untitled:
        titled = items.filter(pl.col("title").is_not_null())
        kept = acts.join(titled.select("item_id"), on="item_id", how="semi", maintain_order="left")
        note("item has no title", acts, kept)
        acts = kept
    if config.drop_duplicates and acts["timestamp"].null_count() == 0:
        kept = acts.unique(["user_id", "item_id", "timestamp"], keep="first", maintain_order=True)
        note("same user, item and timestamp as another interaction", acts, kept)
        acts = kept
    kept = k_core(acts, config.min_user_interactions, config.min_item_interactions)
    note(f"k-core (user >= {config.min_user_interactions}, item >= {config.min_item_interactions})", acts, kept)
    if kept.height == 0:
        raise UserError(f"nothing is left after cleaning: {json.dumps(steps)}. Lower data.min_user_interactions and "
                        "data.min_item_interactions, or check that item ids of both files match")
    return kept, items.join(kept.select("item_id").unique(), on="item_id", how="semi"), steps


def k_core(acts: pl.DataFrame, min_user: int, min_item: int) -> pl.DataFrame:
    """The largest part in which every user and item has enough interactions; order kept."""
    while True:
        kept = acts.filter((pl.len().over("user_id") >= min_user) & (pl.len().over("item_id") >= min_item))
        if kept.height == acts.height:
            return kept
        acts = kept


def _in_order(acts: pl.DataFrame) -> pl.DataFrame:
    acts = acts.sort(["user_id", "timestamp", "order", "item_id"], nulls_last=True)
    return acts.with_columns(pl.int_range(pl.len()).over("user_id").cast(pl.Int32).alias("position"))


# -- splits -----------------------------------------------------------------------------------------------------


def _split(acts: pl.DataFrame, config: DataConfig) -> tuple[pl.DataFrame, dict]:
    split = _leave_one_out if config.split == Split.LEAVE_ONE_OUT else _temporal
    return split(acts, config)


def _leave_one_out(acts: pl.DataFrame, config: DataConfig) -> tuple[pl.DataFrame, dict]:
    """Users with fewer than three interactions can't give up two; they stay in training whole."""
    count, place = pl.len().over("user_id"), pl.col("position")
    name = (pl.when(count < 3).then(pl.lit("train")).when(place == count - 1).then(pl.lit("test"))
            .when(place == count - 2).then(pl.lit("validation")).otherwise(pl.lit("train")))
    short = acts.group_by("user_id").len().filter(pl.col("len") < 3).height
    return acts.with_columns(name.alias("split")), {"kind": "leave_one_out", "users_too_short_to_split": short}


def _temporal(acts: pl.DataFrame, config: DataConfig) -> tuple[pl.DataFrame, dict]:
    """Two global points in time; everything at or after a point belongs to the later part, so ties don't straddle."""
    if acts["timestamp"].null_count():
        raise UserError("data.split temporal needs a timestamp for every interaction; this source has order alone, "
                        "use leave_one_out")
    times = acts["timestamp"].sort()
    held = config.validation_fraction + config.test_fraction
    if held >= 1:
        raise UserError(f"data.validation_fraction + data.test_fraction is {held}, which leaves no training data")
    validation_from = int(times[int(len(times) * (1 - held))])
    test_from = int(times[int(len(times) * (1 - config.test_fraction))])
    name = (pl.when(pl.col("timestamp") >= test_from).then(pl.lit("test"))
            .when(pl.col("timestamp") >= validation_from).then(pl.lit("validation")).otherwise(pl.lit("train")))
    acts = acts.with_columns(name.alias("split"))
    cold = acts.filter((pl.col("split") != "train") & (pl.col("position") == 0)).height
    return acts, {"kind": "temporal", "validation_from": validation_from, "test_from": test_from,
                  "held_out_without_history": cold}


# -- numbering and report ---------------------------------------------------------------------------------------


def _number(acts: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Dense integers from 1, in the order of the sorted ids."""
    items = items.sort("item_id").with_row_index("item", 1).with_columns(pl.col("item").cast(pl.Int32))
    users = acts.select("user_id").unique().sort("user_id").with_row_index("user", 1)
    users = users.with_columns(pl.col("user").cast(pl.Int32))
    numbered = acts.join(items.select("item_id", "item"), on="item_id").join(users, on="user_id")
    numbered = numbered.select("user", "item", "position", "timestamp", "split").sort("user", "position")
    return items, users, numbered


def _statistics(tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]) -> dict:
    items, users, acts = tables
    lengths = acts.group_by("user").len()["len"]
    last = acts.filter(pl.col("position") == pl.len().over("user") - 1).select("user", "item", last="position")
    repeats = acts.join(last, on=["user", "item"]).filter(pl.col("position") < pl.col("last"))["user"].n_unique()
    table1 = {"users": users.height, "items": items.height, "interactions": acts.height,
              "avg_n": round(acts.height / users.height, 4), "density": acts.height / (users.height * items.height)}
    quantiles = {str(q): int(lengths.quantile(q, "nearest")) for q in (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)}
    return {"table1": table1, "history_length_quantiles": quantiles, "users_whose_last_item_is_a_repeat": repeats,
            "items_without": {c: items[c].null_count() for c in ("title", "brand", "category")},
            "interactions_per_split": dict(sorted(acts["split"].value_counts().iter_rows()))}
