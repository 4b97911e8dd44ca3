"""The model folder: the adapter and what it needs beside the LLM, which is named and checked, never copied.

  model.json           format, config, backbone {name, revision, sha256}, n_known, n_items, files {name: bytes, sha256},
                       fingerprint, data, training summary; results and card, if any were recorded; of a distilled
                       model student {config, seconds, ...}
  adapter.safetensors  what Laser trains (prefix maker, suffix, head)
  id_model/            config.json, model.safetensors of the frozen ID model
  items.parquet        item, item_id, title, brand, category; items behind the first n_known came later
  items.safetensors    embeddings [n_items d_out]; if used, means [n_items d_means] of the LLM's outputs over the texts
  student.safetensors  of a distilled model: the network that reads histories in the LLM's place
  log.jsonl            a line an epoch
  README.md            the model card, for people

Everything but model.json and README.md is under a checksum. Format 1 had no checksums and no card.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from laserrec import __version__
from laserrec.config import BackboneConfig, Config, IdModelConfig, StudentConfig
from laserrec.llm.backbone import Backbone, load_backbone
from laserrec.methods.laser.encoder import Catalogue, Encoder
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.student import Student
from laserrec.methods.sequence import load_weights
from laserrec.recommender.card import write_card
from laserrec.util import checkpoint, manifest
from laserrec.util.errors import UserError
from laserrec.util.io import read_json, write_json, write_parquet, write_text

_FORMAT = 2
_NEEDED = ("adapter.safetensors", "id_model/config.json", "id_model/model.safetensors", "items.parquet",
           "items.safetensors")
_LOG, _STUDENT = "log.jsonl", "student.safetensors"
KNOWN_FILES = (*_NEEDED, _LOG, _STUDENT, "model.json", "README.md")
"""All that a model folder consists of."""
_NO_FACTS = ("format", "laserrec", "config", "backbone", "n_known", "n_items", "files")
"""What `save_model` works out anew; the rest of model.json are the model's facts."""
_ADVICE = "fit again or copy the folder anew"
_Settings = TypeVar("_Settings", bound=BaseModel)


def save_model(folder: Path, encoder: Encoder, items: pl.DataFrame, embeddings: Tensor, facts: dict,
               log: list[dict] | None, student: Student | None = None) -> None:
    """Every file whole or not at all; model.json comes last, so that a folder with it is complete. A model card that
    a person wrote is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    laser, id_model, backbone = encoder.laser, encoder.id_model, encoder.laser.backbone
    checkpoint.save(folder / "adapter.safetensors", laser.state_dict())
    checkpoint.save(folder / "id_model" / "model.safetensors", id_model.state_dict())
    write_json(folder / "id_model" / "config.json",
               {"id_model": id_model.config.model_dump(mode="json"), "n_items": id_model.n_items})
    means = {"means": encoder.catalogue.means} if len(encoder.catalogue.means) else {}
    checkpoint.save(folder / "items.safetensors", {"embeddings": embeddings, **means})
    write_parquet(folder / "items.parquet", items)
    files = list(_NEEDED)
    if log is not None:
        write_text(folder / _LOG, "".join(json.dumps(entry) + "\n" for entry in log))
        files.append(_LOG)
    if student is not None:
        checkpoint.save(folder / _STUDENT, student.state_dict())
        files.append(_STUDENT)
    note = {
        "format": _FORMAT,
        "laserrec": __version__,
        "config": laser.config.model_dump(mode="json"),
        "backbone": {"name": backbone.name, "revision": backbone.revision, "sha256": backbone.sha256},
        "n_known": encoder.catalogue.n_known,
        "n_items": items.height,
        "files": manifest.describe(folder, files),
        **facts,
    }
    write_card(folder, note)
    write_json(folder / "model.json", note)


def read_note(folder: Path) -> dict[str, Any]:
    """model.json of a folder of any known format. Raises UserError if the folder is none or unfinished, if model.json
    is damaged, or if its format is newer than this version knows."""
    if not (folder / "model.json").is_file():
        unfinished = (folder / "checkpoint.safetensors").is_file()
        hint = "run the same laserrec fit again to resume" if unfinished else "make one with laserrec fit"
        raise UserError(f"{folder} is {'an unfinished fit' if unfinished else 'not a model folder'}; {hint}")
    note = read_json(folder / "model.json", _ADVICE)
    found = note.get("format") if isinstance(note, dict) else None
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{folder / 'model.json'} is not a model's: its format is {found!r}; {_ADVICE}")
    if found > _FORMAT:
        raise UserError(f"{folder} has format {found} and laserrec {__version__} knows formats up to {_FORMAT}; it was "
                        "made by a newer version: pip install --upgrade laserrec")
    missing = [key for key in ("config", "backbone", "n_known") if key not in note]
    if found > 1:
        files = note.get("files", {})
        known = [n for n, f in files.items() if n in (*_NEEDED, _LOG, _STUDENT) and {"bytes", "sha256"} <= set(f)]
        needed = (*_NEEDED, _STUDENT) if "student" in note else _NEEDED
        missing += [f"files of {name}" for name in needed if name not in known]
        if not missing and len(known) < len(files):
            strange = sorted(set(files) - set(known))
            raise UserError(f"{folder / 'model.json'} names files that no model has, first {strange[0]!r}; {_ADVICE}")
    if missing:
        raise UserError(f"{folder / 'model.json'} is damaged: it lacks {', '.join(missing)}; {_ADVICE}")
    return note


def check_files(folder: Path, note: dict[str, Any]) -> None:
    """Raises UserError, which names the file, if one is missing, cut short or changed. Of format 1 nothing is known."""
    manifest.check(folder, note.get("files", {}), "copy or download the folder anew, or fit again")


def update_note(folder: Path, **changes: Any) -> bool:
    """Lay `changes` on model.json and write the card anew; False where a person's card was left alone."""
    note = {**read_note(folder), **changes}
    written = write_card(folder, note)
    write_json(folder / "model.json", note)
    return written


def tell_card(folder: Path, licence: str | None = None, data_name: str | None = None) -> bool:
    """Keep what the card can't know by itself, and write it anew; False where a person's card was left alone."""
    told = {k: v for k, v in (("licence", licence), ("data_name", data_name)) if v is not None}
    return update_note(folder, card={**read_note(folder).get("card", {}), **told})


def shared_files(folder: Path) -> list[str]:
    """What of a folder goes to others: the model's own files and a licence's text; nothing that a server keeps."""
    return [name for name in (*KNOWN_FILES, "LICENSE") if (folder / name).is_file()]


def model_identity(folder: Path) -> str:
    """Tells one model with its catalogue from another; what was recorded about it doesn't count."""
    note = read_note(folder)
    files = note.get("files") or manifest.describe(folder, _NEEDED)
    weights = {name: files[name] for name in (*_NEEDED, _STUDENT) if name in files}
    parts = [weights, note["config"], note["backbone"]["sha256"], note["n_known"], note.get("removed", [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_model(
    folder: Path, backbone: Backbone | Path | str | None = None
) -> tuple[Encoder, pl.DataFrame, Tensor, dict, Student | None]:
    """backbone: a loaded one, or where to find it in place of the name in model.json. Raises UserError if the folder is
    none or unfinished, if a file has changed, or if the backbone's weights have."""
    note = read_note(folder)
    check_files(folder, note)
    config = _checked(Config, note["config"], folder / "model.json")
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(_backbone_settings(config.backbone, note["backbone"], backbone))
    _check_backbone(folder, note["backbone"], backbone)
    id_file = folder / "id_model" / "config.json"
    id_facts = read_json(id_file, _ADVICE)
    id_model = load_weights(_checked(IdModelConfig, id_facts["id_model"], id_file), id_facts["n_items"],
                            checkpoint.load(folder / "id_model" / "model.safetensors")[0])
    laser = Laser(config, backbone, id_model.d_id, note["n_known"])
    _fill(laser, folder / "adapter.safetensors")
    items = _read_items(folder / "items.parquet")
    kept = checkpoint.load(folder / "items.safetensors")[0]
    student = None
    if "student" in note:
        settings = _checked(StudentConfig, note["student"].get("config", {}), folder / "model.json")
        student = Student(settings, laser.head.d_text(kept["embeddings"].shape[1], id_model.d_id), id_model.d_id)
        _fill(student, folder / _STUDENT)
    catalogue = Catalogue(laser, items, note["n_known"], means=kept.get("means"), later=student is not None)
    facts = {k: v for k, v in note.items() if k not in _NO_FACTS}
    return Encoder(laser, id_model, catalogue), items, kept["embeddings"], facts, student


def _fill(module: nn.Module, file: Path) -> None:
    """Weights from a file; the module is then for use, not for training."""
    try:
        module.load_state_dict(checkpoint.load(file)[0])
    except RuntimeError as error:
        raise UserError(f"{file} doesn't fit the settings in model.json (edited?): {error}; {_ADVICE}") from None
    module.eval()


def _backbone_settings(config: BackboneConfig, named: dict, place: Path | str | None) -> BackboneConfig:
    if place is not None:
        return config.model_copy(update={"name": str(place), "revision": None})
    # The commit that was trained with: the branch may have gone on.
    return config.model_copy(update={"revision": named["revision"] or config.revision})


def _check_backbone(folder: Path, named: dict, backbone: Backbone) -> None:
    expected = named["sha256"]
    if expected and backbone.sha256 != expected:  # unknown where a backbone's files were not found
        found = f"{backbone.sha256[:12]}..." if backbone.sha256 else "no weight files that could be checked"
        at = f" at revision {named['revision']}" if named["revision"] else ""
        raise UserError(
            f"{folder} was trained with backbone {named['name']}{at} of sha256 {expected[:12]}..., but {backbone.name} "
            f"here has {found}; the adapter means nothing to other weights. Get the weights it was trained with, or "
            "fit again on these"
        )


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
