"""Clean, number and split (paper, 4.1.1 and 4.1.3): raw frames -> a data folder (schema in `data.dataset`).

Time order: by timestamp where there is one; equal timestamps by the source's order (its position column, else the
rows' order); what is still equal by item_id. Without timestamps by the source's order alone.
The same input gives the same folder byte for byte: nothing in it depends on clock, path, seed or thread. With
timestamps that never tie within a user, the rows' order does not matter either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from laserrec.config import DataConfig, Split
from laserrec.data.dataset import FORMAT, NEW_ITEMS, TEXT_FEATURES
from laserrec.data.extras import VECTOR, extra_names
from laserrec.data.files import FileOptions, read_table
from laserrec.data.ids import Ids, ranks
from laserrec.data.losses import LOUD, mismatch, two_of
from laserrec.data.raw import INTERACTION_SCHEMA, ITEM_SCHEMA, Raw, join_vectors
from laserrec.data.sources import Source, read_source
from laserrec.data.summary import warn_of_losses
from laserrec.util.errors import UserError, option
from laserrec.util.io import check_folder, json_text, new_folder, parquet_bytes, plain, write_bytes

_TABLES = ("items", "users", "interactions")
_NEEDED = ("meta.json", "interactions.parquet")


def prepare_source(source: Source, out: Path | str, config: DataConfig | None = None, *, format: str = "auto",
                   columns: Mapping[str, str] | None = None, on_error: str = "raise", separator: str | None = None,
                   encoding: str = "utf-8", overwrite: bool = False, vectors: Path | str | None = None) -> dict:
    """`read_source`, then `prepare`: files of any known format -> the data folder `out`; returns `prepare`'s report.
    on_error, separator, encoding: see `files.FileOptions`. vectors: a file of item vectors, see
    `extras.with_vectors`."""
    out = plain(out)
    _check_free(out)
    config, options = config or DataConfig(), FileOptions(on_error, separator, encoding)

    def read() -> Raw:
        raw = read_source(source, format, columns, options, config.item_columns)
        return raw if vectors is None else join_vectors(raw, read_table(vectors, options), columns)

    return _prepare(_Numbered.of(read()), config, out, overwrite)  # nothing holds the raw frames by then


def prepare(interactions: pl.DataFrame, items: pl.DataFrame, config: DataConfig, out: Path | str, *,
            overwrite: bool = False, notes: Mapping[str, Any] | None = None) -> dict:
    """Write the data folder `out` and return its report (also report.json) with "sha256", "folder" and "reused";
    `summary.summary_lines` puts it in sentences. Warns (LossWarning) where more than a tenth was left out, or where
    there is nothing to validate on.

    interactions: user_id, item_id String, timestamp, order Int64; items: item_id, title, brand, category String, and
    further columns (the frames of `raw.Raw`). `notes`: the reader's, copied into the report.
    A folder that holds this very result already is left untouched and "reused" is True. An interrupted call leaves
    `out` as it was.
    Titled items that are left without interactions, since nobody bought them or too few did, go to new_items.parquet.
    Where no item has a title, none is dropped for that. Raises UserError when nothing is left after cleaning, when a
    temporal split lacks timestamps or a part would be empty, when `out` holds something else (without `overwrite`
    always, with it unless that is a data folder), and when it can't be written.
    """
    return _prepare(_Numbered.of(Raw(interactions, items, dict(notes or {}))), config, plain(out), overwrite)


@dataclass(frozen=True)
class _Numbered:
    """Raw frames with numbers in place of ids."""

    ids: Ids
    acts: pl.DataFrame
    """Sorted by user and time, so that "the first of several duplicates" does not depend on the rows' order."""
    items: pl.DataFrame
    notes: dict[str, Any]

    @staticmethod
    def of(raw: Raw) -> _Numbered:
        _check_frames(raw.interactions, raw.items)
        ids = Ids.of(raw.interactions, raw.items)
        acts = ids.numbered(raw.interactions).sort("user_id", "timestamp", "order", "item_id")
        return _Numbered(ids, acts, ids.numbered(raw.items), raw.notes)

    @cached_property
    def bought(self) -> pl.DataFrame:
        """item_id of all interactions, ascending."""
        return self.acts.select(pl.col("item_id").unique().sort())

    @cached_property
    def unmatched(self) -> pl.DataFrame:
        """Those that are not among the items."""
        return self.bought.join(self.items, "item_id", "anti", maintain_order="left")

    def why_unmatched(self) -> str:
        """As far as it can be guessed, with examples."""
        theirs, ours = (self.ids.named(side.select("item_id").sort("item_id"))["item_id"]
                        for side in (self.unmatched, self.items))
        return mismatch(theirs, ours)


def _prepare(given: _Numbered, config: DataConfig, out: Path, overwrite: bool) -> dict:
    acts, goods, steps = _clean(given, config)
    new, counts = _new_items(given, goods)
    acts, facts = _split(_with_positions(acts), config)
    tables = _number(acts, goods, given.ids)
    _check_vectors(tables[0], given)
    report = {**given.notes, "steps": steps, "split": facts, **_statistics(*tables), **counts}
    files = {f"{name}.parquet": parquet_bytes(table) for name, table in zip(_TABLES, tables, strict=True)}
    sha256 = _sha256(*files.values())
    told = config.model_dump(mode="json", exclude=None if config.item_columns else {"item_columns"})
    meta = {"format": FORMAT, "sha256": sha256, "settings": told,
            "table1": report["table1"]}
    if new.height:
        files[NEW_ITEMS] = parquet_bytes(new)
        meta["new_items_sha256"] = _sha256(files[NEW_ITEMS])
    files["meta.json"] = json_text(meta).encode("utf-8")
    files["report.json"] = json_text(report).encode("utf-8")
    reused = _holds(out, files, overwrite)
    if not reused:
        with new_folder(out, replace=("meta.json",), own=(*files, NEW_ITEMS, TEXT_FEATURES)) as folder:
            for name, data in files.items():
                write_bytes(folder / name, data)
    warn_of_losses(report)
    return {**report, "sha256": sha256, "folder": str(out), "reused": reused}


def _check_vectors(kept: pl.DataFrame, given: _Numbered) -> None:
    """Raises UserError where vectors were given, and none is of an item that is kept."""
    if VECTOR in kept.columns and kept[VECTOR].null_count() == kept.height:
        theirs = given.ids.named(given.items.filter(pl.col(VECTOR).is_not_null()).sort("item_id"))["item_id"]
        raise UserError("vectors: none is of an item that is kept. Items that have one are left out for too few "
                        f"interactions or no title: {two_of(theirs)}; give vectors of those that are kept, such as "
                        f"{two_of(kept['item_id'])}")


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _holds(out: Path, files: dict[str, bytes], overwrite: bool) -> bool:
    """True when `out` holds exactly these files; UserError when it holds something that may not be replaced."""
    _check_free(out)
    if not out.is_dir() or not any(out.iterdir()):
        return False
    same = all((out / name).is_file() and (out / name).read_bytes() == data for name, data in files.items())
    if same and (NEW_ITEMS in files or not (out / NEW_ITEMS).exists()):
        return True
    if not overwrite:
        raise UserError(f"{out} is a data folder made from other input or settings, or changed since; name another "
                        f"folder, or replace it: {option('overwrite')}")
    return False


def _check_free(out: Path) -> None:
    """Raises UserError for a folder that can't be written, or that holds something else than data."""
    check_folder(out)
    if out.is_dir() and any(out.iterdir()) and not all((out / name).is_file() for name in _NEEDED):
        raise UserError(f"{out} is there already and is no data folder; it is never overwritten, name another folder")


def _check_frames(interactions: pl.DataFrame, items: pl.DataFrame) -> None:
    more = {VECTOR: items.schema.get(VECTOR), **dict.fromkeys(extra_names(items), pl.String)}
    wanted = {**ITEM_SCHEMA, **{name: kind for name, kind in more.items() if name in items.columns}}
    for name, frame, schema in (("interactions", interactions, INTERACTION_SCHEMA), ("items", items, wanted)):
        if dict(frame.schema) != schema:
            raise UserError(f"{name}: columns are {dict(frame.schema)}, not {schema}; bring frames of your own into "
                            "this form with laserrec.data.raw.from_frames")
    if interactions.is_empty():
        raise UserError("there are no interactions at all; look at the source files")
    if interactions["timestamp"].null_count() not in (0, interactions.height):
        row = int(interactions["timestamp"].is_null().arg_max() or 0) + 1
        raise UserError(f"interactions: row {row} has no timestamp while others have one; give all of them or none")
    if items["item_id"].is_duplicated().any():
        twice = items.filter(items["item_id"].is_duplicated())["item_id"][0]
        raise UserError(f"items: item_id {twice!r} stands in more than one row; keep one")


# -- cleaning -----------------------------------------------------------------------------------------------------


def _clean(given: _Numbered, config: DataConfig) -> tuple[pl.DataFrame, pl.DataFrame, list[dict]]:
    """Interactions and items that are kept, and one record per step: what was dropped and why."""
    acts, items = given.acts, given.items
    steps = [{"step": "read", **_sizes(acts), "items_in_metadata": items.height}]

    def drop(why: str, kept: pl.DataFrame) -> pl.DataFrame:
        before, after = _sizes(acts), _sizes(kept)
        steps.append({"step": why, **after, "dropped": {key: before[key] - after[key] for key in after}})
        return kept

    if config.drop_untitled and (items.is_empty() or items["title"].is_not_null().any()):
        acts = drop("item has no row in the metadata (untitled)", acts.join(items, "item_id", "semi",
                                                                            maintain_order="left"))
        titled = items.filter(pl.col("title").is_not_null())
        acts = drop("item has no title", acts.join(titled, "item_id", "semi", maintain_order="left"))
    if config.drop_duplicates:
        # Without timestamps the source's place takes their part, else a repeat purchase would count as a duplicate.
        when = "order" if acts["timestamp"].null_count() else "timestamp"
        acts = drop(f"same user, item and {when.replace('order', 'position')} as another interaction",
                    _without_repeats(acts, when))
    acts = drop(f"k-core (user >= {config.min_user_interactions}, item >= {config.min_item_interactions})",
                k_core(acts, config.min_user_interactions, config.min_item_interactions))
    if acts.is_empty():
        raise UserError(f"nothing is left after cleaning: {_why_nothing(steps, given)}")
    # A left join: an item without metadata (kept when drop_untitled is off) has null texts.
    return acts, acts.select(pl.col("item_id").unique()).join(items, "item_id", "left"), steps


def _without_repeats(acts: pl.DataFrame, when: str) -> pl.DataFrame:
    """The first of rows with the same user, item and `when`. acts: sorted by user and `when`, so that only neighbours
    can be alike; to look at those alone saves most of the memory."""
    same = pl.all_horizontal(pl.col(name) == pl.col(name).shift() for name in ("user_id", when)).fill_null(False)
    tied = acts.select(same | same.shift(-1, fill_value=False)).to_series()
    first = acts.filter(tied).select(pl.struct("user_id", "item_id", when).is_first_distinct()).to_series()
    kept = np.ones(acts.height, dtype=bool)
    kept[tied.to_numpy()] = first.to_numpy()
    return acts.filter(kept)


def _why_nothing(steps: list[dict], given: _Numbered) -> str:
    """The step that took the most, and what to do."""
    worst = max(steps[1:], key=lambda step: step["dropped"]["interactions"])
    share = f"{worst['dropped']['interactions']:,} of {steps[0]['interactions']:,} interactions"
    if worst["step"].startswith("k-core"):
        return (f"{worst['step']} took the last {share}; lower data.min_user_interactions and "
                "data.min_item_interactions, or bring more data")
    if given.unmatched.height:
        return f"{share} have an item that is not among the items: {given.why_unmatched()}"
    return f"{share} went: {worst['step']}"


def _new_items(given: _Numbered, kept: pl.DataFrame) -> tuple[pl.DataFrame, dict]:
    """Titled items that are not kept with their interactions, and the report's counts of items."""
    left = given.items.join(kept, "item_id", "anti").sort("item_id")
    new = left.filter(pl.col("title").is_not_null())
    rare = new.join(given.bought, "item_id", "semi").height
    lost: dict[str, Any] = {"items": given.unmatched.height}
    if given.unmatched.height > LOUD * given.bought.height:
        lost["why"] = given.why_unmatched()
    counts = {"new_items": {"never_bought": new.height - rare, "too_few_interactions": rare},
              "untitled_items": given.items["title"].null_count(), "unmatched": lost}
    return given.ids.named(new), counts


def _sizes(acts: pl.DataFrame) -> dict[str, int]:
    return {"interactions": acts.height, "users": acts["user_id"].n_unique(), "items": acts["item_id"].n_unique()}


def k_core(acts: pl.DataFrame, min_user: int, min_item: int) -> pl.DataFrame:
    """The largest part of `acts` (user_id, item_id, ...) in which every user has min_user rows and every item
    min_item; rows keep their order. Repeats until nothing changes, since each removal can undercut others."""
    while True:
        kept = acts.filter((pl.len().over("user_id") >= min_user) & (pl.len().over("item_id") >= min_item))
        if kept.height == acts.height:
            return kept
        acts = kept


def _with_positions(acts: pl.DataFrame) -> pl.DataFrame:
    return acts.with_columns(pl.int_range(pl.len()).over("user_id").cast(pl.Int32).alias("position"))


# -- splits -------------------------------------------------------------------------------------------------------


def _split(acts: pl.DataFrame, config: DataConfig) -> tuple[pl.DataFrame, dict]:
    if config.split == Split.LEAVE_ONE_OUT:
        return _leave_one_out(acts)
    return _temporal(acts, config)


def _leave_one_out(acts: pl.DataFrame) -> tuple[pl.DataFrame, dict]:
    """Last = test, one before = validation (paper, 4.1.3). Who has fewer than three stays in training whole."""
    count, place = pl.len().over("user_id"), pl.col("position")
    part = (pl.when((count >= 3) & (place == count - 1)).then(pl.lit("test"))
            .when((count >= 3) & (place == count - 2)).then(pl.lit("validation")).otherwise(pl.lit("train")))
    short = acts.group_by("user_id").len().filter(pl.col("len") < 3).height
    return acts.with_columns(part.alias("split")), {"kind": "leave_one_out", "users_too_short_to_split": short}


def _temporal(acts: pl.DataFrame, config: DataConfig) -> tuple[pl.DataFrame, dict]:
    """Two global points in time, quantiles over all interactions. What happens at a point itself belongs to the
    later part, so equal times never straddle a border (the shares then differ a little from those asked for)."""
    if acts["timestamp"].null_count():
        raise UserError("data.split temporal needs a timestamp for every interaction and this source has order alone; "
                        "use leave_one_out, or map a timestamp column")
    times, total = acts["timestamp"].sort(), acts.height
    test = max(1, round(total * config.test_fraction))
    held_out = test + max(1, round(total * config.validation_fraction))
    if held_out >= total:
        raise UserError(f"data.validation_fraction {config.validation_fraction} and data.test_fraction "
                        f"{config.test_fraction} leave no training data of {total} interactions; lower them")
    validation_from, test_from = int(times[total - held_out]), int(times[total - test])
    part = (pl.when(pl.col("timestamp") >= test_from).then(pl.lit("test"))
            .when(pl.col("timestamp") >= validation_from).then(pl.lit("validation")).otherwise(pl.lit("train")))
    acts = acts.with_columns(part.alias("split"))
    parts = {name: acts.filter(pl.col("split") == name) for name in ("train", "validation", "test")}
    empty = [name for name, rows in parts.items() if rows.is_empty()]
    if empty:
        raise UserError(f"data.split temporal: {' and '.join(empty)} would be empty, too many interactions share one "
                        f"time (validation from {validation_from}, test from {test_from}); change the fractions")
    unseen = acts.filter(pl.col("split") != "train").join(parts["train"], "item_id", "anti")
    no_history = int(((acts["split"] != "train") & (acts["position"] == 0)).sum())
    return acts, {"kind": "temporal", "validation_from": validation_from, "test_from": test_from,
                  "held_out_without_history": no_history,
                  "held_out_of_items_unseen_in_train": unseen.height,
                  "items_unseen_in_train": unseen["item_id"].n_unique()}


# -- numbering and statistics ---------------------------------------------------------------------------------------


def _number(acts: pl.DataFrame, items: pl.DataFrame, ids: Ids) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """items, users, interactions of the folder. Rows from 0 in the order of the sorted ids (by bytes)."""
    items = items.sort("item_id").with_row_index("item").with_columns(pl.col("item").cast(pl.Int32))
    users = acts.select(pl.col("user_id").unique().sort()).with_row_index("user")
    users = users.with_columns(pl.col("user").cast(pl.Int32))
    user, item = (ranks(acts[name], kept[name]) for name, kept in (("user_id", users), ("item_id", items)))
    numbered = acts.select(user.alias("user"), item.alias("item"), "position", "timestamp", "split")
    return ids.named(items), ids.named(users), numbered


def _statistics(items: pl.DataFrame, users: pl.DataFrame, acts: pl.DataFrame) -> dict:
    """Table 1's columns (paper) and what else helps to judge a data set."""
    lengths = acts.group_by("user").len()["len"]
    last = acts.filter(pl.col("position") == pl.len().over("user") - 1).select("user", "item", last="position")
    repeats = acts.join(last, on=["user", "item"]).filter(pl.col("position") < pl.col("last"))["user"].n_unique()
    table1 = {"users": users.height, "items": items.height, "interactions": acts.height,
              "avg_history_length": round(acts.height / users.height, 4),
              "density": float(f"{acts.height / (users.height * items.height):.6g}")}
    quantiles = {str(q): int(lengths.quantile(q, "nearest") or 0) for q in (0.0, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)}
    counts = {name: int((acts["split"] == name).sum()) for name in ("train", "validation", "test")}
    return {"table1": table1, "interactions_per_split": counts, "history_length_quantiles": quantiles,
            "users_whose_last_item_is_a_repeat": repeats,
            "share_of_items_without": {c: round(items[c].null_count() / items.height, 6)
                                       for c in ("title", "brand", "category")}}
