"""Fit any method into a model folder, and open such a folder again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from laserrec.config import BackboneConfig, Config, IdModelKind, ItemTable, Precision
from laserrec.config.rivals import FOLDERS
from laserrec.data.dataset import TEXT_FEATURES, Dataset
from laserrec.data.extras import extra_names
from laserrec.llm.backbone import Backbone
from laserrec.llm.fetch import DEFAULT_NAME, fetch_default
from laserrec.llm.precision import resolve_precision
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.all import METHODS, Given, Method, find_method
from laserrec.methods.laser.build import has_texts, without_texts
from laserrec.methods.sequence import SequenceModel
from laserrec.recommender import folder as folders
from laserrec.recommender.folder import Saved
from laserrec.recommender.id_choice import candidates, choose
from laserrec.training.trainer import Goal, Pace, Trainer
from laserrec.util.distributed import World, join
from laserrec.util.errors import UserError
from laserrec.util.io import locked, plain, recover

_PACE = {"train": ("checkpoint_minutes", "tokens_per_pass"),
         "backbone": ("compiled", "gradient_checkpointing", "shard"), "prompt": ("text_cache_gib",)}
"""Settings that change speed and memory alone."""

@dataclass
class Fitted:
    """A model with all that it was made of."""

    model: Any
    method: str
    config: Config
    items: pl.DataFrame
    n_known: int
    """Items that it was fitted on: the first rows of `items`."""
    features: TextFeatures
    facts: dict[str, Any]
    id_model: tuple[str, Config] | None = None
    """Method and settings of the ID model below."""
    backbone: dict[str, Any] | None = None
    """name, revision and sha256 of the LLM, if the method reads text."""
    log: list[dict[str, Any]] | None = field(default=None, repr=False)

    def saved(self) -> Saved:
        """What goes into a folder."""
        below = None
        if self.id_model is not None:
            below = *self.id_model, self.model.ids.model.state_dict()
        kept = getattr(self.model, "item_tensors", dict)()
        return Saved(self.method, self.config, self.items, self.n_known, self.model.state_dict(), kept, self.backbone,
                     below, self.facts, self.log)


def fit(name: str, dataset: Dataset, config: Config, folder: Path | str, device: torch.device,
        id_model: Path | str | None = None, features: TextFeatures | None = None, progress: bool = True,
        trust_remote_code: bool = False, start: Fitted | None = None, goal: Goal | None = None) -> Fitted:
    """Fit method `name` into a model folder. A finished folder of the same data and settings is loaded, an unfinished
    one is resumed with the result of an uninterrupted run; Ctrl-C and SIGTERM leave a checkpoint.

    id_model: of Laser, the folder of a sequence model fitted on the same data, whose settings replace
    config.id_model; None: one is fitted into FOLDER/id_model first. features: the frozen LLM's, to share them between
    fits. trust_remote_code: let the LLM run Python code that comes with its weights. start: a fitted model of the
    same method, from whose weights training starts. Under torchrun all processes call this with the same arguments, fit
    together and get the same model. goal: stop where the training misses it.

    Where no item has a text, Laser leaves out the parts that read texts (laserrec.methods.laser.build.without_texts).

    Raises UserError for a folder of other settings or data, one that holds something else or that another process
    uses, and where the memory is too small; GoalMissedError where the goal is missed.
    """
    method, folder, world = find_method(name), plain(folder), join()
    method.needs(config, dataset.n_items)
    _check_attributes(method, config, dataset)
    config = config.model_copy(update={"data": dataset.settings or config.data})  # a fit prepares nothing by its own
    if name == "laser" and not has_texts(config, dataset.items):
        reduced = without_texts(config)
        if reduced is not config and progress and world.is_main:
            print("no item has a text: the parts that read texts are left out", file=sys.stderr)
        config = reduced
    if name in set(IdModelKind) - {IdModelKind.NONE}:
        config = config.model_copy(update={"id_model": config.id_model.model_copy(update={"kind": IdModelKind(name)})})
    features = features or _features(config, dataset, device, world, progress, trust_remote_code)
    there = (folder / "model.json").is_file()  # it is only read then, which several processes may do at once
    with locked(folder, "fit") if world.is_main and not there else contextlib.nullcontext():
        if not there:
            recover(folder)
            folders.check_free(folder)
        finished = world.told(lambda: (folder / "model.json").is_file())
        config, below = _id_model(name, dataset, config, folder, device, id_model, features, progress, finished, start)
        below_model = None if below is None else below.model
        fingerprint = fit_fingerprint(name, method, config, dataset, features, below_model, start)
        if world.told(lambda: fingerprint) != fingerprint:
            raise UserError(f"process {world.rank} of {world.size} has other data, settings or another ID model than "
                            "process 0; give every machine the same command and copies of the same folders")
        if finished:
            return _finished(folder, fingerprint, features, world)
        given = Given(config, dataset.items, dataset.n_items, features, below_model, world, progress and world.is_main)
        fitted = _train(name, method, given, dataset, folder, fingerprint, device, start, goal)
        if below is not None:
            fitted.id_model = below.method, below.config
        if world.is_main:
            folders.save(folder, fitted.saved(), finished=True)
    world.wait()  # where the folder is shared, it is complete for all
    return fitted


def _check_attributes(method: Method, config: Config, dataset: Dataset) -> None:
    """Raises UserError where the prompt names a column that the items don't have."""
    missing = [name for name in config.prompt.attributes if name not in dataset.items.columns]
    if missing and method.reads_text(config):
        raise UserError(f"prompt.attributes names {missing[0]!r}, which is no column of the data folder's items; there "
                        f"are: {', '.join(('brand', 'category', *extra_names(dataset.items)))}; prepare the data again "
                        "with data.item_columns")


def _train(name: str, method: Method, given: Given, dataset: Dataset, folder: Path, fingerprint: str,
           device: torch.device, start: Fitted | None, goal: Goal | None) -> Fitted:
    config, world = given.config, given.world
    seed = method.seed(config)
    torch.manual_seed(seed)
    started = time.monotonic()
    model = method.make(given)
    warm = {} if start is None else {"warm_start": start_from(method, model, given, start)}
    phases = method.phases(model, given, dataset)
    if start is not None:
        phases = [phase for phase in phases if phase.validates]  # what the model starts from is pre-trained
        phases[0] = replace(phases[0], keeps_start=True)
    pace = Pace(seed, config.eval.k, config.eval.batch_size, config.eval.validates, config.train.validation_users,
                config.train.checkpoint_minutes, given.progress)
    trainer = Trainer(phases, dataset, folder, fingerprint, pace, world, device, started, goal)
    log = trainer.run()
    training = {**trainer.summary(), **getattr(model, "sizes", dict)()}
    model.eval().requires_grad_(False)
    if method.finish is not None:
        config, parts = method.finish(trainer.phase.task, given.progress)
        training |= {"parts": parts, "seconds": trainer.summary()["seconds"]} if parts else {}
    facts = {"fingerprint": fingerprint, "data": dataset.meta, "training": training, **warm}
    return Fitted(model, name, config, dataset.items, dataset.n_items, given.features, facts,
                  backbone=_named(given.features) if method.reads_text(config) else None, log=log)


def start_from(method: Method, model: Any, given: Given, start: Fitted) -> dict[str, Any]:
    """Give a fresh model the weights of a fitted one of the same method, for what `given` tells; returns what is told
    of it. Raises UserError where the two differ in more than their items, or nothing can be carried over."""
    assert method.carry is not None  # by the caller
    if start.backbone is not None and start.backbone["sha256"] != given.features.sha256:
        raise UserError(f"the model to start from was fitted with another LLM ({start.backbone['name']}) than "
                        f"{given.features.config.name}; its weights mean nothing to other texts' vectors")
    before = Given(start.config, start.items.head(start.n_known), start.n_known, start.features)
    rows = _rows_in(start, given.items)
    carried = int((rows >= 0).sum())
    method.carry(model, start.model, rows.to(given.features.device), given, before)
    return {"fingerprint": start.facts.get("fingerprint"), "carried_items": carried, "new_items": len(rows) - carried,
            "dropped_items": start.n_known - carried}


def _rows_in(fitted: Fitted, items: pl.DataFrame) -> Tensor:
    """The fitted model's row of each item; -1 for those that it was not fitted on."""
    at = {name: row for row, name in enumerate(fitted.items["item_id"].head(fitted.n_known).to_list())}
    return torch.tensor([at.get(name, -1) for name in items["item_id"].to_list()])


def _named(features: TextFeatures) -> dict[str, Any]:
    backbone = features.backbone
    return {"name": backbone.name, "revision": backbone.revision, "sha256": backbone.sha256}


def _features(config: Config, dataset: Dataset, device: torch.device, world: World, progress: bool,
              trust_remote_code: bool) -> TextFeatures:
    """The LLM in the same precision everywhere: machines, and even two processes of one, may measure differently."""
    backbone = config.backbone
    if world.size > 1:
        if backbone.name == DEFAULT_NAME:  # one download per machine, not one per process
            if os.environ.get("LOCAL_RANK", "0") == "0":
                fetch_default()
            world.wait()
        precision = Precision(world.told(lambda: resolve_precision(backbone.precision, device).value))
        backbone = backbone.model_copy(update={"precision": precision})
    return TextFeatures(backbone, config.prompt, device, kept_texts(dataset), progress and world.is_main, world=world,
                        trust_remote_code=trust_remote_code)


def kept_texts(dataset: Dataset) -> Path | None:
    """Where means of the data folder's texts are kept, if it can be written."""
    writable = dataset.folder is not None and os.access(dataset.folder, os.W_OK)
    return dataset.folder / TEXT_FEATURES if dataset.folder is not None and writable else None


def _id_model(name: str, dataset: Dataset, config: Config, folder: Path, device: torch.device,
              given: Path | str | None, features: TextFeatures, progress: bool, finished: bool,
              start: Fitted | None) -> tuple[Config, Fitted | None]:
    """The sequence model below Laser, and the config with its true settings."""
    if given is not None and name != "laser":
        raise UserError(f"method {name} takes no ID model; only laser does")
    if name != "laser" or (given is None and config.id_model.kind == IdModelKind.NONE):
        return config, None
    if given is not None:
        below = open_folder(given, device)
        if not isinstance(below.model, SequenceModel):
            raise UserError(f"{given} holds a model of method {below.method}; Laser's ID model is a sequence model: "
                            "sasrec, bert4rec or gru4rec")
        if below.facts["data"]["sha256"] != dataset.fingerprint:
            raise UserError(f"{given} was fitted on other data (sha256 {below.facts['data']['sha256'][:12]}, the data "
                            f"folder has {dataset.fingerprint[:12]}); fit it on this data folder")
    elif finished:
        below = _nested(dataset, config, folder, features)
    else:
        below = fit_id_model(dataset, config, folder / folders.ID_MODEL, device, features, progress,
                             _below(start, dataset))
    return config.model_copy(update={"id_model": below.config.id_model}), below


def fit_id_model(dataset: Dataset, config: Config, folder: Path, device: torch.device, features: TextFeatures | None,
                 progress: bool = True, start: Fitted | None = None) -> Fitted:
    """Fit the ID model that `config` wants below Laser into `folder`, from the weights of `start` if it is given; the
    best of several where config.blend has further settings (laserrec.recommender.id_choice). Resumes, and raises, as
    `fit` does."""
    def fit_into(place: Path, settings: Config, goal: Goal | None) -> Fitted:
        return fit(config.id_model.kind.value, dataset, settings, place, device, features=features, progress=progress,
                   start=start, goal=goal)

    return choose(fit_into, config, folder, join())


def _below(start: Fitted | None, dataset: Dataset) -> Fitted | None:
    """The ID model of a fitted Laser, if another one can start from it on these data."""
    if start is None or start.id_model is None:
        return None
    facts = {"fingerprint": start.facts.get("fingerprint")}
    below = Fitted(start.model.ids.model, *start.id_model, start.items, start.n_known, start.features, facts)
    by_ids = below.model.config.items == ItemTable.IDS
    return None if by_ids and not (_rows_in(below, dataset.items) >= 0).any() else below


def _nested(dataset: Dataset, config: Config, folder: Path, features: TextFeatures) -> Fitted:
    """The ID model of a finished folder. Raises UserError where it is not the one that these settings would fit."""
    kind, found = config.id_model.kind.value, folders.load(folder).id_model
    if found is None or found[0] != kind:
        raise _other(folder)
    _, settings, weights = found
    if fit_fingerprint(kind, METHODS[kind], settings, dataset, features, None) not in {
            fit_fingerprint(kind, METHODS[kind], tree, dataset, features, None) for tree in candidates(config)}:
        raise _other(folder)
    with folders.fitting(folder):
        model = METHODS[kind].restore(Given(settings, dataset.items, dataset.n_items, features), weights, {})
    return Fitted(model, kind, settings, dataset.items, dataset.n_items, features, {})


def _other(folder: Path) -> UserError:
    return UserError(f"{folder} holds a model of another method, other settings or other data; name another folder or "
                     "delete it")


def fit_fingerprint(name: str, method: Method, config: Config, dataset: Dataset, features: TextFeatures,
                    below: SequenceModel | None, start: Fitted | None = None) -> str:
    """Of all that a fit's result depends on: data, settings, the LLM's weights, the ID model's, and the model that it
    starts from."""
    tree = config.model_dump(mode="json")
    for section, names in (_PACE | FOLDERS).items():
        for setting in names:
            tree[section].pop(setting)
    wanted = {*method.sections, *(("backbone", "prompt") if method.reads_text(config) else ())}
    facts = {"method": name, "data": dataset.fingerprint, "k": config.eval.k, "validates": config.eval.validates,
             "validation_users": config.train.validation_users,
             "llm": features.sha256 if method.reads_text(config) else None,
             **{section: tree[section] for section in sorted(wanted)}}
    facts |= {"reads": read} if (read := method.reads(config)) else {}
    if start is not None:
        facts["warm_start"] = start.facts.get("fingerprint")
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for tensor_name, tensor in sorted(below.state_dict().items()) if below is not None else ():
        digest.update(tensor_name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _finished(folder: Path, fingerprint: str, features: TextFeatures, world: World) -> Fitted:
    if not (folder / "model.json").is_file():
        raise UserError(f"process {world.rank} has no {folder}, which is finished where process 0 is; load it there, "
                        "in one process")
    if folders.read_note(folder).get("fingerprint") != fingerprint:
        raise _other(folder)
    return open_folder(folder, features.device, features=features)


def open_folder(folder: Path | str, device: torch.device, backbone: Backbone | Path | str | None = None,
                features: TextFeatures | None = None, trust_remote_code: bool = False) -> Fitted:
    """Read a model folder. backbone: the LLM, loaded or where to find it, in place of the name in model.json; it is
    loaded only when something has to be read. features: those to share.

    Raises UserError if the folder is no model or unfinished, if a file has changed, if its parts do not fit together,
    or if the LLM's weights are not those it was fitted with.
    """
    folder = Path(folder)
    saved = folders.load(folder)
    if features is None:
        loaded, place = (backbone, None) if isinstance(backbone, Backbone) else (None, backbone)
        settings = _backbone_settings(saved.config.backbone, saved.backbone, place)
        if loaded is not None and saved.backbone is not None:
            _check_settings(loaded, settings, folder)
        features = TextFeatures(settings, saved.config.prompt, device, backbone=loaded,
                                trust_remote_code=trust_remote_code)
    features.expect(None if saved.backbone is None else saved.backbone["sha256"], str(folder))
    method, below, given_id = find_method(saved.method), None, None
    with folders.fitting(folder):
        if saved.id_model is not None:
            own, settings, weights = saved.id_model
            below = own, settings
            given_id = find_method(own).restore(Given(settings, saved.items, saved.n_known, features), weights, {})
        model = method.restore(Given(saved.config, saved.items, saved.n_known, features, given_id), saved.weights,
                               saved.kept)
    return Fitted(model, saved.method, saved.config, saved.items, saved.n_known, features, saved.facts, below,
                  saved.backbone, folders.read_log(folder) or None)


def _check_settings(loaded: Backbone, wanted: BackboneConfig, folder: Path) -> None:
    """Weights alone do not tell what an LLM makes of a text."""
    for name in ("layers", "mean_layers", "item_vectors", "quantization"):
        own, there = getattr(wanted, name), getattr(loaded.config, name)
        if own != there:
            raise UserError(f"{folder} was fitted with backbone.{name} {own}, and the LLM that was handed over was "
                            f"loaded with {there}; load it with the settings of the model, or hand over its name")


def _backbone_settings(config: BackboneConfig, named: dict[str, Any] | None, place: Path | str | None
                       ) -> BackboneConfig:
    if place is not None:
        return config.model_copy(update={"name": str(place), "revision": None})
    # The commit that was trained with: the branch may have gone on.
    return config.model_copy(update={"revision": (named or {}).get("revision") or config.revision})


def weights_of(fitted: Fitted) -> dict[str, Tensor]:
    """All tensors of a model, for fingerprints."""
    return {**fitted.model.state_dict(), **getattr(fitted.model, "item_tensors", dict)()}
