"""What callers give in Python, as the recommender works with it; or a UserError that says what to give instead."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config
from laserrec.data.clean import short
from laserrec.data.dataset import Dataset
from laserrec.util.errors import UserError


def config_of(given: Any) -> Config:
    """A Config."""
    if not isinstance(given, Config):
        raise UserError(f"config is a {type(given).__name__}; make a Config with laserrec.config.load_config")
    return given


def dataset_of(given: Any) -> Dataset:
    """A Dataset, or the one in a data folder."""
    if isinstance(given, Dataset):
        return given
    return Dataset.load(path_of(given, "dataset", "a data folder, or what Dataset.load makes of one"))


def path_of(given: Any, name: str, wanted: str) -> Path | str:
    """A path. name, wanted: for the message."""
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise UserError(f"{name} is {short(given)}; give {wanted}")
    return given if isinstance(given, str) else Path(given)


def count_of(given: Any, name: str) -> int:
    """A whole number of at least 1."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < 1:
        raise UserError(f"{name} is {short(given)}; it must be a whole number of at least 1")
    return int(given)


def row_of(given: Any, n_items: int) -> int:
    """The row of an item."""
    whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
    if not whole or not 0 <= given < n_items:
        raise UserError(f"row is {short(given)}; give an item's row in items, from 0 to {n_items - 1}; dense_items "
                        "tells those of ids")
    return int(given)


def vectors_of(given: Any, item_ids: Sequence[str], like: Float[Tensor, "n_items d_out"]) -> Float[Tensor, "new d_out"]:
    """A finite vector for each item, as the model's own (`like`) are."""
    try:
        found = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given, dtype=np.float32))
        found = found.detach().to(like.dtype)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"embeddings are {short(given)}; give numbers, a row for each item, as encode_items does"
                        ) from None
    if found.shape != (len(item_ids), like.shape[1]):
        raise UserError(f"embeddings of shape {tuple(found.shape)} are not those of {len(item_ids)} items with "
                        f"{like.shape[1]} numbers each")
    whole = torch.isfinite(found).all(dim=1)
    if not bool(whole.all()):
        row = int((~whole).int().argmax())
        raise UserError(f"embeddings: row {row + 1}, of item {item_ids[row]!r}, holds numbers that are not finite; "
                        "leave embeddings out, and the items are encoded")
    return found


def changes_of(given: Any) -> dict[str, dict[str, Any]]:
    """Settings by section; None: none."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(values, Mapping) for values in given.values()):
        raise UserError(f'changes are settings by section, as {{"train": {{"stage_one_epochs": 2}}}}, not '
                        f"{short(given)}")
    return {str(section): dict(values) for section, values in given.items()}
