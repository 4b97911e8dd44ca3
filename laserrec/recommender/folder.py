"""The model folder, one layout for all methods: weights, catalogue, and where it came from. The LLM is named and
checked, never copied.

  model.json           format, method, config, backbone {name, revision, sha256} or null, n_known, n_items, files {name:
                       bytes, sha256}, fingerprint, data, training; results, card, removed, if there are any
  weights.safetensors  the model's state_dict
  items.parquet        item (row), item_id, title, brand, category; rows from n_known on came later
  items.safetensors    what the method keeps of items: Laser's vectors [n_items d_out] and, if used, means [n_items
                       d_means] of the LLM's outputs over the texts
  id_model/            of Laser: model.json {method, config} and weights.safetensors of the frozen ID model, which is
                       read like a folder of its own, with the catalogue of the one around it
  log.jsonl            a line an epoch
  training.jsonl, tensorboard/   the curves, written while it trained
  README.md            the model card, for people

Weights, catalogue and log are under a checksum. A folder is written as a whole and swapped in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laserrec import __version__
from laserrec.config import Config
from laserrec.methods.all import find_method
from laserrec.recommender.card import write_card
from laserrec.util import checkpoint, manifest
from laserrec.util.errors import UserError, reading
from laserrec.util.io import (
    check_folder,
    locked,
    new_folder,
    read_json,
    recover,
    write_json,
    write_parquet,
    write_text,
)

FORMAT = 3
_MODEL, _WEIGHTS, _ITEMS, _KEPT, _LOG, ID_MODEL = ("model.json", "weights.safetensors", "items.parquet",
                                              "items.safetensors", "log.jsonl", "id_model")
SERVED = "served"
"""Where a server of the folder keeps its changes, unless it is told otherwise."""
_NEEDED = (_WEIGHTS, _ITEMS, _KEPT)
_NESTED = (f"{ID_MODEL}/{_MODEL}", f"{ID_MODEL}/{_WEIGHTS}")
_CHECKED = (*_NEEDED, *_NESTED, _LOG)
KNOWN_FILES = (*_CHECKED, _MODEL, "README.md")
"""All that a model consists of."""
_CURVES = ("training.jsonl", "tensorboard")
_TRIALS = f"{ID_MODEL}_trials"
"""ID models of other settings, until the fit is finished."""
_CHECKPOINT = "checkpoint.safetensors"
_UNFINISHED = (*_CURVES, _CHECKPOINT, ID_MODEL, _TRIALS)
"""What stands in the folder of a fit that is not finished."""
_OWN = (*_NEEDED, _MODEL, ID_MODEL, _CHECKPOINT, _TRIALS)
"""What a save makes anew or removes."""
_NO_FACTS = ("format", "laserrec", "method", "config", "backbone", "n_known", "n_items", "files")
"""What a save works out anew; the rest of model.json are the model's facts."""
_ADVICE = "fit again or copy the folder anew"


@dataclass
class Saved:
    """What a folder holds, as it is written and as it is read."""

    method: str
    config: Config
    items: pl.DataFrame
    n_known: int
    weights: dict[str, Tensor]
    kept: dict[str, Tensor]
    """Tensors with a row per item."""
    backbone: dict[str, Any] | None
    """name, revision and sha256 of the LLM, if the method reads text."""
    id_model: tuple[str, Config, dict[str, Tensor]] | None
    """Method, config and weights of the ID model below Laser."""
    facts: dict[str, Any]
    log: list[dict[str, Any]] | None = None


def save(folder: Path, saved: Saved, finished: bool = False) -> None:
    """Write the folder and swap it in; whatever was in the folder that it replaces and is not of the model stays there:
    curves, a server's state, a card that a person wrote, other files. finished: it ends the fit in this folder. Raises
    UserError where it can't be written, would replace something that is no model, or while a server keeps its state
    there, whose next changes would be lost."""
    _check_replaced(folder)
    serving = locked(folder / SERVED, "a save") if (folder / f".{SERVED}.lock").is_file() else contextlib.nullcontext()
    replaced = (_MODEL, _CHECKPOINT, _CURVES[0]) if finished else (_MODEL,)
    with serving, new_folder(folder, replace=replaced, own=_OWN) as new:
        _take_over(folder, new)
        checkpoint.save(new / _WEIGHTS, saved.weights)
        checkpoint.save(new / _KEPT, saved.kept)
        write_parquet(new / _ITEMS, saved.items)
        files = list(_NEEDED)
        if saved.log is not None:
            write_text(new / _LOG, "".join(json.dumps(entry) + "\n" for entry in saved.log))
        if (new / _LOG).is_file():
            files.append(_LOG)
        if saved.id_model is not None:
            method, config, weights = saved.id_model
            write_json(new / ID_MODEL / _MODEL, {"method": method, "config": config.model_dump(mode="json")})
            checkpoint.save(new / ID_MODEL / _WEIGHTS, weights)
            files += _NESTED
        note = {"format": FORMAT, "laserrec": __version__, "method": saved.method,
                "config": saved.config.model_dump(mode="json"), "backbone": saved.backbone, "n_known": saved.n_known,
                "n_items": saved.items.height, "files": manifest.describe(new, files), **saved.facts}
        write_card(new, note, name=folder.resolve().name)
        write_json(new / _MODEL, note)


def _check_replaced(folder: Path) -> None:
    """Other programs' files have such names too."""
    if (folder / _MODEL).is_file():
        note = read_json(folder / _MODEL, "name another folder")
        if not (isinstance(note, dict) and "laserrec" in note):
            raise UserError(f"{folder / _MODEL} is not laserrec's; name another folder")


def _take_over(old: Path, new: Path) -> None:
    """What is copied before the rest is written: the card is made from the old one."""
    below = [f"{ID_MODEL}/{name}" for name in (*_CURVES, _LOG)]
    for name in (_LOG, *below, "README.md"):
        if (old / name).is_dir():
            shutil.copytree(old / name, new / name, symlinks=True)
        elif (old / name).is_file():
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copy2(old / name, new / name)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """An entry an epoch, as a fit wrote them into its folder; a missing log is empty. Raises UserError for a damaged
    one."""
    file = folder / _LOG
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [{**json.loads(line)} for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}; fit again or delete it") from None


def check_free(folder: Path) -> None:
    """Raises UserError for a folder that a fit may not use or can't write: the finished model takes the place of all
    that is in it."""
    if (folder / _MODEL).is_file():
        return
    check_folder(folder)
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry.name not in _UNFINISHED and not entry.name.endswith((".lock", ".tmp", ".old")):
            raise UserError(f"{folder} holds {entry.name}, which is no part of a fit; name another folder")


def read_note(folder: Path) -> dict[str, Any]:
    """model.json. Raises UserError if the folder is no model or unfinished, if model.json is damaged, or if another
    version of laserrec wrote it whose models this one can't read."""
    recover(folder)
    if (owner := owner_of(folder)) is not None:
        return _nested_note(owner)
    file = folder / _MODEL
    with reading(folder):
        there = file.is_file()
    if not there:
        unfinished = (folder / _CHECKPOINT).is_file()
        hint = "start the same fit again to go on with it" if unfinished else "make one with fit"
        raise UserError(f"{folder} is {'an unfinished fit' if unfinished else 'not a model folder'}; {hint}")
    note = read_json(file, _ADVICE)
    found = note.get("format") if isinstance(note, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{file} is not a model's: its format is {repr(found)[:80]}; {_ADVICE}")
    if found != FORMAT:
        older = found < FORMAT
        advice = "fit again, or load it with the version that made it" if older else "pip install --upgrade laserrec"
        raise UserError(f"{folder} has format {found} and laserrec {__version__} reads format {FORMAT}; it was made by "
                        f"{'an older' if older else 'a newer'} version: {advice}")
    _check_note(file, note)
    _check_inputs(folder, note)
    return note


def owner_of(folder: Path) -> Path | None:
    """The finished Laser's folder whose ID model this is; None for a folder of its own."""
    place = folder.resolve()
    if place.name != ID_MODEL or not (place.parent / _MODEL).is_file():
        return None
    return place.parent if _NESTED[0] in read_note(place.parent)["files"] else None


def _nested_note(owner: Path) -> dict[str, Any]:
    note = read_note(owner)
    own = read_json(owner / _NESTED[0], _ADVICE)
    return {**own, **{name: note[name] for name in ("format", "laserrec", "backbone", "n_known") if name in note},
            "n_items": note["n_known"], "files": {name.removeprefix(f"{ID_MODEL}/"): note["files"][name]
                                                  for name in _NESTED}, "data": note.get("data", {})}


def _check_note(file: Path, note: dict[str, Any]) -> None:
    kinds = {"method": str, "config": dict, "n_known": int, "n_items": int, "files": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(note.get(name), kind)]
    backbone = note.get("backbone")
    if backbone is not None and not (isinstance(backbone, dict) and {"name", "revision", "sha256"} <= backbone.keys()):
        wrong.append("backbone")
    files = note["files"] if isinstance(note.get("files"), dict) else {}
    wrong += [f"files of {name}" for name in _NEEDED if name not in files]
    wrong += [f"files of {name}" for name, entry in files.items()
              if name not in _CHECKED or not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys()]
    if not wrong and not 0 <= note["n_known"] <= note["n_items"]:
        wrong = ["n_known, n_items"]
    if wrong:
        raise UserError(f"{file} is damaged: {', '.join(wrong)} missing or not as a model has it; {_ADVICE}")


def _check_inputs(folder: Path, note: dict[str, Any]) -> None:
    """Raises UserError for a part of the model that in another version of laserrec reads more or less than in this one.
    A folder without such a part is as good as ever, so that its format is the same."""
    wanted = find_method(note["method"]).inputs
    try:
        found = _shapes(folder / _WEIGHTS, wanted)
    except (SafetensorError, OSError):  # `check_files` tells
        return
    for name, shape in found.items():
        inputs = shape[-1] if shape else 0
        if inputs != wanted[name]:
            older = inputs < wanted[name]
            advice = ("fit it again into another folder, or load it with the version that made it" if older
                      else "pip install --upgrade laserrec")
            raise UserError(f"{folder} was fitted with {'an earlier' if older else 'a later'} version of laserrec, in "
                            f"which {name} has {inputs} inputs, not {wanted[name]}; {advice}")


def check_files(folder: Path, note: dict[str, Any], links: bool = True) -> None:
    """Raises UserError, which names the file, if one is missing, cut short or changed, or a link where links = False;
    the hub's cache is made of links."""
    manifest.check(folder, note["files"], "copy or download the folder anew, or fit again", links)


def load(folder: Path) -> Saved:
    """Raises UserError if the folder is no model or unfinished, if a file has changed, or if its parts do not fit
    together."""
    if (owner := owner_of(folder)) is not None:
        return _nested(load(owner))
    note = read_note(folder)
    check_files(folder, note)
    config = checked_config(note["config"], folder / _MODEL)
    method = find_method(note["method"])
    items = _read_items(folder / _ITEMS, note["n_items"])
    _check_shapes(folder / _WEIGHTS, method.shapes(config, note["n_known"]))
    id_model = None
    if _NESTED[0] in note["files"]:
        own = read_json(folder / _NESTED[0], _ADVICE)
        below = checked_config(own["config"], folder / _NESTED[0])
        _check_shapes(folder / _NESTED[1], find_method(own["method"]).shapes(below, note["n_known"]))
        id_model = own["method"], below, checkpoint.load(folder / _NESTED[1])[0]
    facts = {k: v for k, v in note.items() if k not in _NO_FACTS}
    return Saved(note["method"], config, items, note["n_known"], checkpoint.load(folder / _WEIGHTS)[0],
                 checkpoint.load(folder / _KEPT)[0], note["backbone"], id_model, facts)


def _nested(whole: Saved) -> Saved:
    """The ID model of a Laser, over the items that it was fitted on."""
    assert whole.id_model is not None
    method, config, weights = whole.id_model
    return Saved(method, config, whole.items.head(whole.n_known), whole.n_known, weights, {}, whole.backbone, None,
                 {"data": whole.facts.get("data", {})})


def _check_shapes(file: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    """Before anything is allocated by what settings claim."""
    try:
        found = _shapes(file, wanted)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}; {_ADVICE}") from None
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise UserError(f"{file} does not fit the settings beside it: {name} has shape {found.get(name)}, not "
                            f"{shape}; {_ADVICE}")


def _shapes(file: Path, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Of those of the tensors that are there, from the file's head alone."""
    with safe_open(file, framework="pt") as weights:
        there = set(weights.keys())
        return {name: tuple(weights.get_slice(name).get_shape()) for name in names if name in there}


@contextlib.contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Weights that don't fit the settings are a UserError."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the weights in {folder} don't fit its settings (edited?): {first}; {_ADVICE}") from None


def checked_config(tree: Any, file: Path) -> Config:
    """Raises UserError for settings that this version does not know."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        names = ", ".join(".".join(map(str, e["loc"])) for e in error.errors(include_input=False, include_url=False))
        names = names if len(names) <= 300 else f"{names[:300]}..."
        raise UserError(f"{file}: this version of laserrec does not know these settings or values: {names}; "
                        "load the folder with the version that made it, or fit again") from None


def _read_items(file: Path, count: int) -> pl.DataFrame:
    try:
        items = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}; {_ADVICE}") from None
    if items.height != count or not {"item", "item_id", "title"} <= set(items.columns):
        raise UserError(f"{file} is not this model's catalogue: it has {items.height:,} rows of {count:,}; {_ADVICE}")
    return items


def known_items(folder: Path) -> dict[str, int]:
    """Item id -> row, of the items that can be recommended. Raises UserError for what is no model, and for a damaged
    catalogue."""
    note, whole = read_note(folder), owner_of(folder) or folder
    names = _read_items(whole / _ITEMS, read_note(whole)["n_items"])["item_id"].head(note["n_items"])
    removed = set(note.get("removed", ()))
    return {name: row for row, name in enumerate(names.to_list()) if row not in removed}


# -- what is recorded of a model ------------------------------------------------------------------------------------


def update_note(folder: Path, **changes: Any) -> bool:
    """Lay `changes` on model.json and write the card anew; False where a person's card was left alone. Of a Laser's ID
    model nothing is recorded: its files are under the Laser's checksums."""
    if owner_of(folder) is not None:
        return False
    note = {**read_note(folder), **changes}
    written = write_card(folder, note)
    write_json(folder / _MODEL, note)
    return written


def tell_card(folder: Path, licence: str | None = None, data_name: str | None = None) -> bool:
    """Keep what the card can't know by itself, and write it anew; False where a person's card was left alone."""
    told = {k: v for k, v in (("licence", licence), ("data_name", data_name)) if v is not None}
    return update_note(folder, card={**read_note(folder).get("card", {}), **told})


def shared_files(folder: Path) -> list[str]:
    """What of a folder goes to others: the model's own files and a licence's text; no links, nothing that a server
    keeps. Raises UserError for a Laser's ID model, which has no catalogue of its own."""
    if (owner := owner_of(folder)) is not None:
        raise UserError(f"{folder} is a part of {owner}; load it and save it as a folder of its own first")
    names = (*KNOWN_FILES, "LICENSE")
    return [name for name in names if (folder / name).is_file() and not (folder / name).is_symlink()]


def model_identity(folder: Path) -> str:
    """Tells one model with its catalogue from another; what was recorded about it doesn't count."""
    note = read_note(folder)
    weights = {name: entry for name, entry in sorted(note["files"].items()) if name != _LOG}
    parts = [weights, note["method"], note["config"], (note["backbone"] or {}).get("sha256"), note["n_known"],
             note.get("removed", [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
