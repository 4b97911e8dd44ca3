"""A data folder in memory: items' text, users, training sequences, evaluation cases.

Data folder (written by `laserrec prepare`, read by everything else):
  items.parquet         item Int32 (rows 0..n_items - 1), item_id String, then text columns
                        title, brand, category String (null where unknown)
  users.parquet         user Int32 (rows 0..n_users - 1), user_id String
  interactions.parquet  user Int32, item Int32, position Int32 (0 = the user's oldest), timestamp Int64 or null,
                        split String: "train" | "validation" | "test"; sorted by (user, position)
  new_items.parquet     item_id, title, brand, category String: titled items without interactions, if there are any
  meta.json             format, settings, sha256 of the first three files, Table 1's columns
  report.json           what was dropped and why
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor

from laserrec.config.data import DataConfig
from laserrec.data.files import POLARS_ERRORS, reason
from laserrec.data.histories import Histories
from laserrec.data.raw import ITEM_SCHEMA
from laserrec.util.errors import UserError, reading
from laserrec.util.io import read_json

FORMAT = 2
"""Of data folders; in format 1 items and users were numbered from 1."""
NEW_ITEMS = "new_items.parquet"
TEXT_FEATURES = "text_features"
"""What an LLM read of the items' texts, kept by fits."""
_COLUMNS = {"items": ("item", *ITEM_SCHEMA), "users": ("user", "user_id"),
            "interactions": ("user", "item", "position", "timestamp", "split")}
"""Each table's, at least."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Cases:
    """Evaluation cases: predict `targets[i]` from `histories[i]` (everything before it, oldest first)."""

    users: Int[np.ndarray, "cases"]
    """Rows of `Dataset.users`."""
    histories: Histories
    """Never empty."""
    targets: Int[Tensor, "cases"]
    """Item rows."""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: np.ndarray) -> Cases:
        """The cases at `index`, in that order."""
        return Cases(self.users[index], self.histories.take(index), self.targets[torch.as_tensor(index)])

    def sample(self, count: int) -> Cases:
        """At most `count` of them, drawn at random, in their order; the same in each call, so that seeds and trials can
        be compared."""
        if count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(0).choice(len(self), count, replace=False)))


@dataclass(frozen=True)
class Dataset:
    """One data folder."""

    items: pl.DataFrame
    users: pl.DataFrame
    interactions: pl.DataFrame
    meta: dict
    folder: Path | None = None
    """Where it was read from."""

    @property
    def n_items(self) -> int:
        return self.items.height

    @property
    def n_users(self) -> int:
        return self.users.height

    @property
    def fingerprint(self) -> str:
        """sha256 over the folder's three tables."""
        return self.meta["sha256"]

    @property
    def settings(self) -> DataConfig | None:
        """With which it was prepared, where it tells; settings that this version does not know are left out."""
        told = self.meta.get("settings")
        return told and DataConfig(**{name: told[name] for name in DataConfig.model_fields if name in told})

    @cached_property
    def new_items(self) -> pl.DataFrame:
        """item_id, title, brand, category of titled items without interactions, to add behind the trained ones."""
        file = self.folder / NEW_ITEMS if self.folder else None
        return _read(file) if file and file.is_file() else pl.DataFrame(schema=ITEM_SCHEMA)

    @staticmethod
    def load(folder: Path | str) -> Dataset:
        """Read a data folder; UserError if it is not one."""
        folder = Path(folder)
        with reading(folder):
            missing = [f for f in ("meta.json", "items.parquet", "users.parquet", "interactions.parquet")
                       if not (folder / f).is_file()]
        if missing:
            raise UserError(f"{folder} is not a data folder ({', '.join(missing)} missing); make one: laserrec prepare")
        meta = read_json(folder / "meta.json", "prepare again")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UserError(f"{folder} was written by another version of laserrec (its format is not {FORMAT}); "
                            "prepare the data again")
        tables = [_read(folder / f"{name}.parquet", columns) for name, columns in _COLUMNS.items()]
        return Dataset(*tables, meta=meta, folder=folder)

    @cached_property
    def train_sequences(self) -> Histories:
        """Items of split "train" per user who has any, oldest first. Nothing of validation or test is in it."""
        return self._train[1]

    @property
    def train_users(self) -> Int[np.ndarray, "sequences"]:
        """The user of each training sequence."""
        return self._train[0]

    @cached_property
    def _train(self) -> tuple[np.ndarray, Histories]:
        return _by_user(self.interactions.filter(pl.col("split") == "train"))

    def cases(self, split: str) -> Cases:
        """One case per interaction of `split` that has a history. The history is everything before the target:
        for test it includes the validation item (paper, 4.1.3)."""
        if split not in SPLITS[1:]:
            raise UserError(f"split is 'validation' or 'test', not {split!r}")
        if split not in self._cases:
            self._cases[split] = self._make_cases(split)
        return self._cases[split]

    @cached_property
    def _cases(self) -> dict[str, Cases]:
        return {}

    def _make_cases(self, split: str) -> Cases:
        users, full = _by_user(self.interactions)
        rows = self.interactions.filter((pl.col("split") == split) & (pl.col("position") > 0))
        of, before = rows["user"].to_numpy(), torch.tensor(rows["position"].to_list(), dtype=torch.long)
        whole = full.take(np.searchsorted(users, of))
        histories = whole.where(torch.arange(len(whole.items)) - whole.starts[whole.users] < before[whole.users])
        return Cases(of, histories, torch.tensor(rows["item"].to_list(), dtype=torch.long))


def _by_user(interactions: pl.DataFrame) -> tuple[np.ndarray, Histories]:
    """Users that have any, ascending, and their items in the rows' order."""
    users, counts = np.unique(interactions["user"].to_numpy(), return_counts=True)
    items = torch.as_tensor(interactions["item"].to_numpy().astype(np.int64))
    return users, Histories(items, torch.as_tensor(counts.cumsum(), dtype=torch.long))


def _read(file: Path, columns: Collection[str] = ()) -> pl.DataFrame:
    try:
        with reading(file):
            frame = pl.read_parquet(file)
    except (*POLARS_ERRORS, OSError) as error:
        raise UserError(f"{file} is damaged: {reason(error)}; prepare the data again") from None
    if missing := [name for name in columns if name not in frame.columns]:
        raise UserError(f"{file} is another table: it has no column {missing[0]}; prepare the data again")
    return frame
