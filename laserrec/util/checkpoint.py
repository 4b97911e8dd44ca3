"""Tensors and JSON metadata ("facts") in one safetensors file, written whole or not at all. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laserrec.util.errors import UserError, reading
from laserrec.util.io import new_file

_FACTS = "laserrec"


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
    """Write one file atomically, flushed to disk, with the permissions of the umask. An interrupted save leaves the
    previous file as it was. Raises UserError if the disk is full or cannot be written."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with new_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata={_FACTS: json.dumps(facts or {})})
        except SafetensorError as error:
            raise UserError(f"{path} can't be written: {error}; make room on the disk or name another place") from None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and facts. Raises UserError if the file is missing or damaged."""
    try:
        with reading(path), safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (SafetensorError, ValueError, RecursionError) as error:  # the last two: its facts are no JSON
        raise UserError(f"{path} is damaged or not a safetensors file: {error}; make it again") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `PARAMETER_INDEX.KEY`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`. Hyperparameters stay as they are in `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors named `prefix.*` and remove the prefix from their names."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
