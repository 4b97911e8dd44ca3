"""Go on from a fitted model with new interactions, users and items, by a short training from its weights; where a
method can't carry them over, by a fit from nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from laserrec.config import Config, merge, valid
from laserrec.data.dataset import Dataset
from laserrec.data.extras import VECTOR
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.all import find_method
from laserrec.recommender import folder as folders
from laserrec.recommender.fitting import Fitted, fit, kept_texts
from laserrec.util.errors import UserError

_EPOCHS, _PATIENCE, _EXAMPLES, _TRIALS = 10, 2, 15_000, 100
"""At most: epochs of a sequence model, validations without a better one, examples of Laser's epoch, and blends that are
tried."""
_OPTIMISER = ("lr", "weight_decay", "dropout", "batch_size", "max_epochs", "patience", "eval_every", "seed")
_MAY_CHANGE: dict[str, tuple[str, ...] | None] = {
    "train": None, "blend": None, "eval": None, "neighbours": None,
    "id_model": (*_OPTIMISER, "shuffle", "mask_probability"),
    "zesrec": (*_OPTIMISER, "shuffle"),
    "recformer": (*_OPTIMISER, "warmup_fraction", "stage_two_epochs", "stage_two_patience"),
}
"""Settings that the carried weights do not depend on, by section; None: all of it."""


def refit(old: Fitted, dataset: Dataset, folder: Path | str, changes: dict[str, Any] | None = None,
          progress: bool = True) -> Fitted:
    """See `LaserRecommender.refit`."""
    if old.config.student is not None:
        raise UserError("a distilled model can't be refitted; refit the model that it was distilled from, and distil "
                        "that again")
    warm, features = find_method(old.method).carry is not None, _features(old, dataset)
    config = settings(old.config, changes or {}) if warm else merged(old.config, changes or {})
    start = replace(old, features=features.kept_in(features.folder))  # so that each keeps its own catalogue's means
    if progress and not warm and not (Path(folder) / "model.json").is_file():
        print(f"{old.method} can't go on from its weights: it is fitted from nothing, as fit does", file=sys.stderr)
    return _with_card(fit(old.method, dataset, config, folder, old.features.device, features=features,
                          progress=progress, start=start if warm else None), old, Path(folder))


def _with_card(made: Fitted, old: Fitted, folder: Path) -> Fitted:
    """With what the older model's card was told, where it was told nothing else."""
    own = made.facts.get("card", {})
    card = {**old.facts.get("card", {}), **own}
    if card != own:
        folders.update_note(folder, card=card)
        made.facts["card"] = card
    return made


def settings(config: Config, changes: dict[str, Any]) -> Config:
    """The model's own, with a short training and search; then `changes`. Raises UserError for changes of what the
    weights depend on."""
    for section, values in changes.items():
        allowed = _MAY_CHANGE.get(section, ())
        wrong = [name for name in values if allowed is not None and name not in allowed]
        if wrong:
            raise UserError(f"{section}.{wrong[0]} can't change in a refit, which goes on with the model's weights; "
                            "fit from nothing to change it")
    train = config.train
    trained = {name: getattr(config, name) for name in ("id_model", "zesrec", "recformer")}
    short = {
        **{name: {"max_epochs": min(own.max_epochs, _EPOCHS), "patience": min(own.patience, _PATIENCE)}
           for name, own in trained.items()},
        "train": {"stage_one_epochs": min(train.stage_one_epochs, 1),
                  "stage_two_epochs": 0 if train.stage_one_epochs else min(train.stage_two_epochs, 1),
                  "epoch_examples": min(train.epoch_examples or _EXAMPLES, _EXAMPLES)},
        "blend": {"trials": min(config.blend.trials, _TRIALS), "regressions": 0, "shuffles": (),
                  "light_dropout": None},
    }
    return merged(config, merge(short, changes))


def merged(config: Config, changes: dict[str, Any]) -> Config:
    """`changes` laid on the settings. Raises UserError for unknown names and values."""
    return valid(Config, merge(config.model_dump(mode="json"), changes), "the model's settings with changes")


def _features(old: Fitted, dataset: Dataset) -> TextFeatures:
    """The model's own LLM. Texts that the model has read are not read again."""
    means = getattr(old.model, "item_tensors", dict)().get("means")
    if means is None or VECTOR in old.items.columns:  # with vectors beside them they are not the LLM's alone
        return old.features.kept_in(kept_texts(dataset))
    return old.features.knowing(old.items, means)
