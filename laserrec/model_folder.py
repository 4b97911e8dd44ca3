"""The model folder: the adapter and what it needs beside the LLM, which is named and checked, never copied.

  model.json           format, config, backbone {name, revision, sha256}, fingerprint, data, training summary
  adapter.safetensors  what Laser trains (prefix maker, suffix, head)
  id_model/            config.json, model.safetensors of the frozen ID model
  items.parquet        item, item_id, title, brand, category; items behind the first n_known came later
  items.safetensors    embeddings [n_items d_out]
  log.jsonl            a line an epoch
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import polars as pl
from pydantic import BaseModel, ValidationError
from torch import Tensor

from laserrec import checkpoint
from laserrec.config import Config, IdModelConfig
from laserrec.encoder import Catalogue, Encoder
from laserrec.errors import UserError
from laserrec.io import read_json, write_json, write_parquet, write_text
from laserrec.models.backbone import Backbone, load_backbone
from laserrec.models.id_models import load_weights
from laserrec.models.laser import Laser

_FORMAT = 1
_ADVICE = "fit again or copy the folder anew"
_Settings = TypeVar("_Settings", bound=BaseModel)


def save_model(folder: Path, encoder: Encoder, items: pl.DataFrame, embeddings: Tensor, facts: dict,
               log: list[dict] | None) -> None:
    """Every file whole or not at all; model.json comes last, so that a folder with it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    laser, id_model, backbone = encoder.laser, encoder.id_model, encoder.laser.backbone
    checkpoint.save(folder / "adapter.safetensors", laser.state_dict())
    checkpoint.save(folder / "id_model" / "model.safetensors", id_model.state_dict())
    write_json(folder / "id_model" / "config.json",
               {"id_model": id_model.config.model_dump(mode="json"), "n_items": id_model.n_items})
    checkpoint.save(folder / "items.safetensors", {"embeddings": embeddings})
    write_parquet(folder / "items.parquet", items)
    if log is not None:
        write_text(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    write_json(folder / "model.json", {
        "format": _FORMAT,
        "config": laser.config.model_dump(mode="json"),
        "backbone": {"name": backbone.name, "revision": backbone.revision, "sha256": backbone.sha256},
        "n_known": encoder.catalogue.n_known,
        **facts,
    })


def load_model(folder: Path, backbone: Backbone | None = None) -> tuple[Encoder, pl.DataFrame, Tensor, dict]:
    """Raises UserError if the folder is none or unfinished, or the backbone's weights have changed."""
    if not (folder / "model.json").is_file():
        unfinished = (folder / "checkpoint.safetensors").is_file()
        hint = "run the same laserrec fit again to resume" if unfinished else "make one with laserrec fit"
        raise UserError(f"{folder} is {'an unfinished fit' if unfinished else 'not a model folder'}; {hint}")
    note = read_json(folder / "model.json", _ADVICE)
    if note.get("format") != _FORMAT:
        raise UserError(f"{folder}: format {note.get('format')} is not {_FORMAT}; it was made by another version")
    config = _checked(Config, note["config"], folder / "model.json")
    backbone = backbone or load_backbone(config.backbone)
    expected = note["backbone"]["sha256"]
    if backbone.sha256 != expected:
        raise UserError(
            f"{folder} was trained with backbone {note['backbone']['name']} of sha256 {expected[:12]}..., but "
            f"{backbone.name} here has {backbone.sha256[:12]}...; the adapter means nothing to other weights"
        )
    id_file = folder / "id_model" / "config.json"
    id_facts = read_json(id_file, _ADVICE)
    id_model = load_weights(_checked(IdModelConfig, id_facts["id_model"], id_file), id_facts["n_items"],
                            checkpoint.load(folder / "id_model" / "model.safetensors")[0])
    laser = Laser(config, backbone, id_model.d_id)
    laser.load_state_dict(checkpoint.load(folder / "adapter.safetensors")[0])
    laser.eval()
    items = _read_items(folder / "items.parquet")
    embeddings = checkpoint.load(folder / "items.safetensors")[0]["embeddings"]
    catalogue = Catalogue(laser, items, note["n_known"])
    facts = {k: v for k, v in note.items() if k not in ("format", "config", "backbone", "n_known")}
    return Encoder(laser, id_model, catalogue), items, embeddings, facts


def _checked(kind: type[_Settings], tree: dict, file: Path) -> _Settings:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        names = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise UserError(f"{file}: this version of laserrec does not know these settings or values: {names}; "
                        "load the folder with the version that made it, or fit again") from None


def _read_items(file: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(file)
    except FileNotFoundError:
        raise UserError(f"no such file: {file}") from None
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{file} is damaged: {error}; {_ADVICE}") from None
