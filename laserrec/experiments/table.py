"""One table of models: fit each row, rank the test split once, keep the result under a fingerprint.

Everything lies in one folder: NAME/ is a row's model, NAME.json its result and NAME.parquet the users' ranks; those of
seed n are in seed-n/. Where calls may want one row with other settings, they stand apart as NAME-DIGEST. A table can be
stopped anywhere; the same call goes on. A result is used again only if its fingerprint is the same: that of data,
settings, language model, fitted weights and way of measuring.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int

from laserrec.config import Config, IdModelKind, merge, seeds
from laserrec.config.rivals import FOLDERS
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import Scorer, evaluate, save_ranks
from laserrec.evaluation.significance import bootstrap_interval, read_ranks, read_users, user_ndcg
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.all import find_method
from laserrec.recommender.fitting import Fitted, fit, fit_fingerprint, fit_id_model
from laserrec.recommender.folder import model_identity, read_note
from laserrec.recommender.id_choice import candidates
from laserrec.recommender.results import record_result
from laserrec.util.errors import UserError
from laserrec.util.io import read_json, write_json
from laserrec.util.progress import Progress

Measured = dict[str, Any]
"""{model, split, recall@k, ndcg@k, mrr, users, seconds, exclude_seen} and what the table adds: kind, seed,
train_seconds, ranks (a file, relative to the table's folder), fingerprint."""


@dataclass(frozen=True)
class Place:
    """What a row that is made of other rows may use."""

    dataset: Dataset
    config: Config
    """The table's with the row's settings and seed."""
    folder: Path
    """The row's own."""
    progress: bool


@dataclass(frozen=True)
class Row:
    """One line of a table: a method with settings, or something made of other rows' models."""

    name: str
    kind: str
    """What it knows of items: id, text or laser (both)."""
    method: str = ""
    """In laserrec.methods.all.METHODS; "": no model of its own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Laid over the table's config."""
    seeded: bool = True
    """False: nothing in it is random, and it is fitted once for all seeds."""
    of: tuple[str, ...] = ()
    """Rows whose models `make` takes, after the row's own."""
    make: Callable[..., tuple[Scorer, float]] = lambda place, fitted: (fitted.model, 0.0)
    """(place, *fitted models) -> what is measured, and the seconds that it took to make beyond their training."""
    folder: str = ""
    """Name of its folder, if not made from `name`."""
    tuned: bool = False
    """Its settings were searched for, and a longer search may find others."""

    @property
    def slug(self) -> str:
        """Name of its folder and files."""
        return self.folder or _slug(self.name)


def _slug(name: str) -> str:
    return "-".join(re.findall(r"\w+", name.lower()))


def chosen(known: Sequence[str], asked: Sequence[str] | None, where: str) -> list[str]:
    """The names in `known` that are asked for, in its order; None: all. Neither case nor the signs between words count:
    "text-sasrec" is "text SASRec". Raises UserError for others, and tells the names that `where`, a table, has."""
    if asked is None:
        return list(known)
    wanted, slugs = {_slug(name): name for name in asked}, {_slug(name) for name in known}
    if unknown := [name for slug, name in wanted.items() if slug not in slugs]:
        raise UserError(f"there is no {unknown[0]!r} in {where}; there are: {', '.join(known)}")
    return [name for name in known if _slug(name) in wanted]


class Table:
    """Rows over one data set in one folder. `features`: the frozen LLM's of the table's config, shared by all rows."""

    def __init__(self, rows: Iterable[Row], dataset: Dataset, config: Config, out: Path, device: torch.device,
                 progress: bool = True, features: TextFeatures | None = None,
                 measure: Callable[[Table, str, Scorer, Path], Measured] | None = None, measured_by: Any = "test",
                 starts: Table | None = None):
        """measure: (table, name, scorer, the result's file) -> what is kept; None: `rank`. measured_by: all that
        `measure` depends on beside the table; it is part of every fingerprint. starts: the same rows on other data,
        from whose models training starts."""
        self.rows = {row.name: row for row in rows}
        self.dataset, self.config, self.out, self.device, self.progress = dataset, config, out, device, progress
        kept = dataset.folder / "text_features" if dataset.folder is not None else None
        self.features = features or TextFeatures(config.backbone, config.prompt, device, kept, progress)
        self.measure, self.measured_by, self.starts = measure or rank, measured_by, starts
        self._fitted: dict[Path, Fitted] = {}

    def results(self, seeds: Sequence[int]) -> list[Measured]:
        """All rows of all seeds; rows without a seed come first. Models stay in memory for one seed."""
        found = [self.result(name) for name, row in self.rows.items() if not row.seeded]
        for seed in seeds:
            found += [self.result(name, seed) for name, row in self.rows.items() if row.seeded]
            self._fitted.clear()
        return found

    def result(self, name: str, seed: int | None = None) -> Measured:
        """One row, measured now or found again. seed: None leaves the config's own."""
        if (kept := self.kept(name, seed)) is not None:
            return kept
        row, folder = self.rows[name], self.folder(name, seed)
        file = folder.with_name(folder.name + ".json")
        parts = ((name,) if row.method else ()) + row.of
        models = [self.fitted(part, seed) for part in parts]
        file.parent.mkdir(parents=True, exist_ok=True)
        scorer, seconds = row.make(Place(self.dataset, self.settings(name, seed), folder, self.progress), *models)
        used = {place for part in parts for place in (self.folder(part, seed), self._below(part, seed)) if place}
        seconds += sum(self._fitted[place].facts["training"]["seconds"] for place in used)
        kept = {**self.measure(self, name, scorer, file), "kind": row.kind, "seed": seed if row.seeded else None,
                "train_seconds": round(seconds, 1), "fingerprint": self.fingerprint(name, seed)}
        write_json(file, kept)
        return kept

    def kept(self, name: str, seed: int | None = None) -> Measured | None:
        """What was measured of a row before, if data, settings and weights are the same; else None."""
        folder = self.folder(name, seed)
        file = folder.with_name(folder.name + ".json")
        if not file.is_file():
            return None
        kept = read_json(file, "delete it to measure again")
        same = isinstance(kept, dict) and kept.get("fingerprint") == self.fingerprint(name, seed)
        return kept if same else None

    # -- models -------------------------------------------------------------------------------------------------

    def prepare(self, asked: Iterable[tuple[str, int | None]], late: Callable[[], bool] = lambda: False) -> None:
        """Make what several rows share: the reading of the items' texts, and the ID models below Laser. Afterwards
        several processes can fit these rows side by side. Nothing is begun once `late` is true."""
        for name, seed in asked:
            row, config, below = self.rows[name], self.settings(name, seed), self._below(name, seed)
            if below is not None and not late():
                self._fit_below(config, below)
                self._fitted.clear()
            reads = row.method and find_method(row.method).reads_text(config) and self._same_texts(config)
            if reads and not late():
                self.features.means(self.dataset.items)

    def take(self, name: str, seed: int | None, key: str, folder: Path) -> None:
        """Move a model of a row that was fitted elsewhere to its place, if there is none yet and `key`, its fit's
        fingerprint, is that of the row's."""
        own = self.folder(name, seed)
        if not own.exists() and key == self._fit_fingerprint(name, seed):
            own.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(own)

    def fitted(self, name: str, seed: int | None = None) -> Fitted:
        """A row's model, fitted now or read from its folder. Raises UserError where the folder holds another one."""
        start = None if self.starts is None else self.starts.fitted(name, seed)
        return self._fit(self.rows[name].method, self.settings(name, seed), self.folder(name, seed),
                         self._below(name, seed), start)

    def _fit(self, method: str, config: Config, folder: Path, below: Path | None = None,
             start: Fitted | None = None) -> Fitted:
        if folder not in self._fitted:
            if below is not None:
                self._fit_below(config, below)
            same = self._same_texts(config)
            if same and find_method(method).reads_text(config):
                self.features.means(self.dataset.items)  # so that no row's time holds the reading
            self._fitted[folder] = fit(method, self.dataset, config, folder, self.device, below,
                                       self.features if same else None, self.progress, False, start)
        return self._fitted[folder]

    def _fit_below(self, config: Config, folder: Path) -> None:
        if folder not in self._fitted:
            features = None
            if self._same_texts(config):  # an ID model reads item texts as they are, whatever stands around them
                features, config = self.features, config.model_copy(update={"prompt": self.config.prompt})
            self._fitted[folder] = fit_id_model(self.dataset, config, folder, self.device, features, self.progress)

    def _same_texts(self, config: Config) -> bool:
        """Whether the table's own text features are these settings'."""
        return _texts_of(config) == _texts_of(self.config)

    def _below(self, name: str, seed: int | None) -> Path | None:
        """The folder of the ID model below a Laser. Often that is a row of the table too, and is trained once."""
        config = self.settings(name, seed)
        if self.rows[name].method != "laser" or config.id_model.kind == IdModelKind.NONE:
            return None
        if self.starts is not None:
            return None  # it starts from the one below another Laser
        for other, row in self.rows.items() if len(candidates(config)) == 1 else ():
            if row.method == config.id_model.kind.value and self.settings(other, seed).id_model == config.id_model:
                return self.folder(other, seed)
        return self._shared_id_model(config, seed)

    def _shared_id_model(self, config: Config, seed: int | None) -> Path:
        """Rows with the same settings of the ID model share it."""
        blend = config.blend
        wanted: list[Any] = [config.id_model.model_dump_json(), blend.shuffles, blend.shuffle_epochs]
        if blend.light_dropout is not None:
            wanted += [blend.light_dropout, blend.light_weight_decay]
        if not self._same_texts(config):
            wanted += _texts_of(config)
        digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]
        return (self.out if seed is None else self.out / f"seed-{seed}") / f"id-model-{config.id_model.kind}-{digest}"

    def folder(self, name: str, seed: int | None = None) -> Path:
        """Of a row's model. A digest of data and settings ends its name where another call may want others: tuned ones,
        and what a method reads in other folders. A model of these very settings is found without the digest too."""
        row = self.rows[name]
        plain = (self.out / f"seed-{seed}" if row.seeded and seed is not None else self.out) / row.slug
        if not row.tuned and row.method not in FOLDERS:
            return plain
        key = self._fit_fingerprint(name, seed)
        there = (plain / "model.json").is_file() and read_note(plain).get("fingerprint") == key
        return plain if there else plain.with_name(f"{plain.name}-{key[:8]}")

    def _fit_fingerprint(self, name: str, seed: int | None) -> str:
        """Of the fit of a row that has no ID model below."""
        method, settings = self.rows[name].method, self.settings(name, seed)
        return fit_fingerprint(method, find_method(method), settings, self.dataset, self.features, None)

    # -- what tells one result from another ---------------------------------------------------------------------

    def fingerprint(self, name: str, seed: int | None = None) -> str:
        """Of all that a row's result depends on: data, method, settings, the LLM, what the method reads beside these,
        the weights in its folder, the rows it is made of, and the way of measuring."""
        row, config, folder = self.rows[name], self.settings(name, seed), self.folder(name, seed)
        method = find_method(row.method) if row.method else None
        reads_text = method is not None and method.reads_text(config)
        parts = {"data": self.dataset.fingerprint, "row": [row.name, row.method], "measured": self.measured_by,
                 "settings": _without_folders(config), "llm": self.features.sha256 if reads_text else None,
                 "weights": model_identity(folder) if (folder / "model.json").is_file() else None,
                 "of": [self.fingerprint(part, seed) for part in row.of]}
        if method is not None and (read := method.reads(config)):
            parts["reads"] = read
        if self.starts is not None:
            parts["start"] = self.starts.fingerprint(name, seed)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def settings(self, name: str, seed: int | None = None) -> Config:
        """A row's, with this seed."""
        row = self.rows[name]
        own = {} if seed is None or not row.seeded else seeds(seed)
        return Config.model_validate(merge(merge(self.config.model_dump(), row.settings), own))


def _without_folders(config: Config) -> dict[str, Any]:
    """As JSON, as if no folder were named: what folders hold is told apart, and where they are changes nothing."""
    tree, default = config.model_dump(mode="json"), Config().model_dump(mode="json")
    for section, names in FOLDERS.items():
        tree[section] |= {name: default[section][name] for name in names}
    return tree


def _texts_of(config: Config) -> tuple[str, tuple[str, ...]]:
    """All that what the LLM makes of item texts depends on: its settings, and the columns that are read."""
    return config.backbone.model_dump_json(), config.prompt.attributes


def rank(table: Table, name: str, scorer: Scorer, file: Path, split: str = "test", other: Dataset | None = None
         ) -> Measured:
    """Rank the targets of a split of the table's data set, or of another one. Of its own test split the users' ranks go
    beside `file`, and the numbers into the model's card too."""
    dataset, settings = other or table.dataset, table.config.eval
    with Progress(f"{name}: {split}", len(dataset.cases(split)), table.progress) as bar:
        result = evaluate(name, scorer, dataset, split, settings.k, settings.batch_size, bar.advance)
    if split != "test" or other is not None:
        return result.row()
    ranks, folder = file.with_suffix(".parquet"), file.with_suffix("")
    save_ranks(ranks, dataset, "test", result.ranks)
    if (folder / "model.json").is_file():
        record_result(folder, result, dataset)
    return {**result.row(), "ranks": ranks.relative_to(table.out).as_posix()}


def earlier(file: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a result file, or of {"rows": [...]}, that have these keys; none where there is no file. Raises UserError
    for a damaged one."""
    found = read_json(file, "delete it and run the same command again") if file.is_file() else []
    rows = found.get("rows") if isinstance(found, dict) else found
    return [row for row in rows if isinstance(row, dict) and row.keys() >= {*keys}] if isinstance(rows, list) else []


# -- several seeds ------------------------------------------------------------------------------------------------

def over_seeds(rows: Sequence[Mapping[str, Any]], by: Sequence[str], numbers: Sequence[str]) -> list[dict[str, Any]]:
    """Of rows that are alike in `by`: how many seeds, and of the numbers mean and standard deviation, zero for one."""
    frame = pl.DataFrame({name: [row[name] for row in rows] for name in (*by, *numbers)})
    return frame.group_by(by, maintain_order=True).agg(
        pl.len().alias("seeds"), *(pl.mean(name) for name in numbers),
        *(pl.std(name).fill_null(0.0).alias(f"{name}_sd") for name in numbers)).to_dicts()


def summarise(rows: Sequence[Measured], out: Path, k: int = 10) -> list[dict[str, Any]]:
    """Per model: mean and standard deviation over seeds, and the paired difference of the cases' NDCG to the best model
    of kind id with its 95% bootstrap interval (users resampled, seeds averaged first)."""
    users = read_users(out / rows[0]["ranks"])
    gains, table = _gains(rows, out, k), over_seeds(rows, ("model", "kind"), (f"recall@{k}", f"ndcg@{k}", "mrr"))
    best = _best(table, "id", k)["model"]
    return [{**row, "against": best, **_difference(gains[row["model"]] - gains[best], users, k)} for row in table]


def compare(name: str, rows: Sequence[Measured], out: Path, k: int = 10) -> list[dict[str, Any]]:
    """One model beside the best model of kind id and the best of kind text, by NDCG: how many times as high its means
    over seeds are, and the paired difference of the cases' NDCG with its 95% bootstrap interval (users resampled)."""
    users = read_users(out / rows[0]["ranks"])
    gains, table = _gains(rows, out, k), summarise(rows, out, k)
    own = next(row for row in table if row["model"] == name)
    bests = {kind: _best(table, kind, k) for kind in ("id", "text")}
    return [{"kind": kind, "best": best["model"],
             **{f"{metric}_ratio": own[metric] / best[metric] for metric in (f"recall@{k}", f"ndcg@{k}")},
             **_difference(gains[name] - gains[best["model"]], users, k)} for kind, best in bests.items()]


def _best(table: Sequence[dict[str, Any]], kind: str, k: int) -> dict[str, Any]:
    return max((row for row in table if row["kind"] == kind), key=lambda row: row[f"ndcg@{k}"])


def _difference(difference: Float[np.ndarray, "cases"], users: Int[np.ndarray, "cases"], k: int) -> dict[str, float]:
    low, high = bootstrap_interval(difference, users)
    return {f"ndcg@{k}_difference": float(difference.mean()), "low": low, "high": high}


def _gains(rows: Sequence[Measured], out: Path, k: int) -> dict[str, Float[np.ndarray, "cases"]]:
    """NDCG@k of each case, averaged over seeds."""
    files = {row["model"]: [] for row in rows}
    for row in rows:
        files[row["model"]].append(user_ndcg(read_ranks(out / row["ranks"]), k))
    return {name: np.mean(own, axis=0) for name, own in files.items()}
