"""A data folder in memory: items' text, users, training sequences, evaluation cases.

Data folder (written by `laserrec prepare`, read by everything else):
  items.parquet         item Int32 (dense, 1..n_items; 0 is padding), item_id String, then text columns
                        title, brand, category String (null where unknown)
  users.parquet         user Int32 (dense, 1..n_users), user_id String
  interactions.parquet  user Int32, item Int32, position Int32 (0 = the user's oldest), timestamp Int64 or null,
                        split String: "train" | "validation" | "test"; sorted by (user, position)
  meta.json             format, settings, sha256 of the three files, Table 1's columns
  report.json           what was dropped and why
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from laserrec.util.errors import UserError
from laserrec.util.io import read_json

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Cases:
    """Evaluation cases: predict `targets[i]` from `histories[i]` (everything before it, oldest first)."""

    users: np.ndarray
    """Int32[cases], dense users."""
    histories: list[np.ndarray]
    """Int32[history] each, dense items, never empty."""
    targets: np.ndarray
    """Int32[cases], dense items."""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: np.ndarray) -> Cases:
        """The cases at `index`, in that order."""
        return Cases(self.users[index], [self.histories[i] for i in index], self.targets[index])


@dataclass(frozen=True)
class Dataset:
    """One data folder."""

    items: pl.DataFrame
    users: pl.DataFrame
    interactions: pl.DataFrame
    meta: dict

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

    @staticmethod
    def load(folder: Path | str) -> Dataset:
        """Read a data folder; UserError if it is not one."""
        folder = Path(folder)
        missing = [f for f in ("meta.json", "items.parquet", "users.parquet", "interactions.parquet")
                   if not (folder / f).is_file()]
        if missing:
            raise UserError(f"{folder} is not a data folder ({', '.join(missing)} missing); make one: laserrec prepare")
        tables = [pl.read_parquet(folder / f"{name}.parquet") for name in ("items", "users", "interactions")]
        return Dataset(*tables, meta=read_json(folder / "meta.json", "prepare again"))

    @cached_property
    def train_sequences(self) -> dict[int, np.ndarray]:
        """user -> Int32[seq] items of split "train", oldest first. Nothing of validation or test is in it."""
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
        full = _by_user(self.interactions)
        rows = self.interactions.filter((pl.col("split") == split) & (pl.col("position") > 0))
        users, positions = rows["user"].to_numpy(), rows["position"].to_numpy()
        histories = [full[u][:p] for u, p in zip(users.tolist(), positions.tolist(), strict=True)]
        return Cases(users, histories, rows["item"].to_numpy())


def _by_user(interactions: pl.DataFrame) -> dict[int, np.ndarray]:
    users, items = interactions["user"].to_numpy(), interactions["item"].to_numpy().astype(np.int32)
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.zeros(0, int)
    parts = np.split(items, starts[1:]) if len(users) else []
    return dict(zip(users[starts].tolist(), parts, strict=True))
