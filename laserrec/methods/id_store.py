"""The ID-model folder: written by `laserrec pretrain`, read by `laserrec fit`.

  config.json          settings, number of items, fingerprint of the data folder, sha256 of the item ids
  model.safetensors    the best epoch's weights
  states.safetensors   states [total d_id] of all training sequences, offsets [users + 1], users [users],
                       item_embeddings [n_items d_id]
  metrics.json         validation metrics of the best epoch, epochs, seconds
  log.jsonl            a line an epoch
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from laserrec.config import IdModelConfig
from laserrec.data.dataset import Dataset
from laserrec.methods.sequence import IdModel, load_weights, pad_histories
from laserrec.util import checkpoint
from laserrec.util.errors import UserError
from laserrec.util.io import read_json, write_json


@dataclass(frozen=True)
class IdModelFolder:
    """A loaded folder."""

    model: IdModel
    fingerprint: str
    """Of the data folder it was trained on."""
    metrics: dict


def item_ids_sha256(dataset: Dataset) -> str:
    """Over the item ids in dense order: tells whether row j means the same item."""
    return hashlib.sha256("\n".join(dataset.items["item_id"].to_list()).encode()).hexdigest()


def save_id_model(folder: Path, model: IdModel, dataset: Dataset, metrics: dict) -> None:
    """Write all but the log."""
    checkpoint.save(folder / "model.safetensors", model.state_dict())
    checkpoint.save(folder / "states.safetensors", _all_states(model, dataset))
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "config.json", {
        "id_model": model.config.model_dump(mode="json"), "n_items": model.n_items,
        "data_sha256": dataset.fingerprint, "item_ids_sha256": item_ids_sha256(dataset)})


def load_id_model(folder: Path | str, dataset: Dataset | None = None) -> IdModelFolder:
    """Raises UserError if the folder is not one, is unfinished, or (with `dataset`) belongs to other data."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        state = "is unfinished; run the same laserrec pretrain again to resume" if folder.is_dir() else "does not exist"
        raise UserError(f"ID-model folder {folder} {state}")
    facts, config = _read_config(folder / "config.json")
    if dataset is not None and facts["data_sha256"] != dataset.fingerprint:
        raise UserError(f"{folder} was trained on other data (sha256 {facts['data_sha256'][:12]}, the data folder has "
                        f"{dataset.fingerprint[:12]}); pretrain on this data folder")
    try:
        model = load_weights(config, facts["n_items"], checkpoint.load(folder / "model.safetensors")[0])
    except RuntimeError as error:
        raise UserError(f"{folder / 'model.safetensors'} doesn't fit its config.json (edited, or written by another "
                        f"version of laserrec): {error}; pretrain again") from None
    metrics_file = folder / "metrics.json"
    metrics = read_json(metrics_file, "pretrain again") if metrics_file.is_file() else {}
    return IdModelFolder(model, facts["data_sha256"], metrics)


def _read_config(file: Path) -> tuple[dict, IdModelConfig]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        missing = {"id_model", "n_items", "data_sha256"} - facts.keys()
        if missing:
            raise UserError(f"{file} lacks {', '.join(sorted(missing))}; it is not an ID model's: pretrain again")
        return facts, IdModelConfig.model_validate(facts["id_model"])
    except ValueError as error:  # bad JSON, bad UTF-8 and pydantic's errors alike
        raise UserError(f"{file} is not an ID model's settings: {error}; pretrain again") from None


@torch.no_grad()
def _all_states(model: IdModel, dataset: Dataset) -> dict[str, torch.Tensor]:
    model.eval()
    users, rows = list(dataset.train_sequences), []
    for at in range(0, len(users), 256):
        items = pad_histories([dataset.train_sequences[u] for u in users[at : at + 256]], model.max_history)
        rows.append(model.states(items)[items > 0])
    lengths = [min(len(dataset.train_sequences[u]), model.max_history) for u in users]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return {"states": torch.cat(rows), "offsets": offsets, "users": torch.tensor(users),
            "item_embeddings": model.item_embeddings()}
