"""A model's name -> what the evaluator calls: a model folder of any method, a model on the hub, or a closed form."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.config import ItemTable, load_config
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import Scorer
from laserrec.llm.backbone import Backbone
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.all import Given, find_method
from laserrec.methods.protocol import Growing, Transferable, TwoTower
from laserrec.methods.sequence import SequenceModel
from laserrec.recommender.fitting import Fitted, start_from
from laserrec.recommender.folder import read_note
from laserrec.recommender.hub import is_repo
from laserrec.recommender.recommender import LaserRecommender
from laserrec.recommender.validated import trained_on_validation
from laserrec.util.errors import UserError

IN_MEMORY = ("popularity", "ease")
"""Methods that are fitted in seconds, by name instead of a folder."""


@dataclass(frozen=True)
class FirstItems:
    """A model's scores of the first items of its catalogue; those that were added later are left out."""

    model: Scorer
    n_items: int

    def score(self, histories: Histories) -> Float[Tensor, "users items"]:
        """Of the first `n_items` items."""
        return self.model.score(histories)[:, : self.n_items]


@dataclass(frozen=True)
class SomeItems:
    """A model's scores of some items of its catalogue, in an order of their own, for histories of these items."""

    model: Scorer
    rows: Int[Tensor, "items"]
    """Of the model's catalogue, on the CPU."""

    def score(self, histories: Histories) -> Float[Tensor, "users items"]:
        """A column for each of `rows`, by whose place the histories name items."""
        own = Histories(self.rows[histories.items], histories.ends)
        scores = self.model.score(own)
        return scores[:, self.rows.to(scores.device)]


def check_scorer(name: str) -> None:
    """Raises UserError for a name that `load_scorer` can't know, and for a folder that is no model; it reads little, to
    tell before long work. What is on the hub is not asked for."""
    if _is_in_memory(name) or is_repo(name):
        return
    if not Path(name).exists():
        raise UserError(f"there is no model folder {name!r}; give a folder, ORG/NAME on the hub, or one of the methods "
                        f"that need no folder: {', '.join(IN_MEMORY)}")
    read_note(Path(name))


def _is_in_memory(name: str) -> bool:
    return name in IN_MEMORY and not (Path(name) / "model.json").is_file()


def load_scorer(name: str, dataset: Dataset, device: torch.device, backbone: Backbone | Path | str | None = None,
                trust_remote_code: bool = False) -> tuple[Scorer, int]:
    """The model called `name`, over the items of a data folder, and how many users it scores at once.

    name: a model folder, ORG/NAME[@REVISION] on the Hugging Face Hub, or popularity or ease, which are fitted here.
    backbone, trust_remote_code: see `LaserRecommender.from_pretrained`. Raises UserError for anything else, and for a
    model of another catalogue, unless it can tell items by their texts (`zero_shot`): that one reads them, with a
    warning. Warns of one that was fitted on other data, too.
    """
    check_scorer(name)
    if _is_in_memory(name):
        return _fitted(name, dataset, device)
    model = LaserRecommender.from_pretrained(name, backbone, device=str(device), trust_remote_code=trust_remote_code)
    if not model.items["item_id"].head(dataset.n_items).equals(dataset.items["item_id"]):
        known = dataset.n_items - len(model.unknown_items(dataset.items["item_id"].to_list()))
        scorer = zero_shot(model.fitted, dataset.items, name)
        how = (f"it knows {known:,} of these {dataset.n_items:,} items from its training, and reads the texts of the "
               "others. What is asked here may have been in its training, and its numbers then tell too much"
               ) if known else "it scores these items by their texts, with nothing learnt from these data (zero-shot)"
        warnings.warn(f"{name} was fitted on another catalogue; {how}", UserWarning, stacklevel=2)
        return scorer, model.batch_size
    if model.facts.get("data", {}).get("sha256", dataset.fingerprint) != dataset.fingerprint:
        warnings.warn(f"{name} was fitted on other data, which have the same items: what is asked here may have been "
                      "in its training, and its numbers then tell too much", UserWarning, stacklevel=2)
    return FirstItems(model, dataset.n_items), model.batch_size


def flattered(scorer: Scorer, split: str) -> bool:
    """Whether this model has learnt from the targets of this split (`trained_on_validation`)."""
    model = scorer.model if isinstance(scorer, FirstItems) else None
    return split == "validation" and isinstance(model, LaserRecommender) and \
        trained_on_validation(model.facts.get("training", {}))


def zero_shot(fitted: Fitted, items: pl.DataFrame, name: str = "the model") -> Scorer:
    """A fitted model over the items of another catalogue (item_id, title and the attributes), with nothing learnt from
    that one. A model that takes new items (`Growing`) grows by those that it does not know. name: for messages. Raises
    UserError for a model that tells items by their ids alone."""
    model, method = fitted.model, find_method(fitted.method)
    if isinstance(model, Transferable):
        return model.transferred(items)
    if isinstance(model, Growing) and isinstance(model, TwoTower):
        at = {name: row for row, name in enumerate(fitted.items["item_id"])}
        new = items.filter(~pl.col("item_id").is_in(list(at)))
        if new.height:
            at |= {name: row for row, name in enumerate(new["item_id"], len(model.items()))}
            model.add_items(new)
        return SomeItems(model, torch.tensor([at[name] for name in items["item_id"]]))
    if isinstance(model, SequenceModel) and model.config.items != ItemTable.IDS:
        given = Given(fitted.config, items, items.height, fitted.features)
        other = method.make(given)
        start_from(method, other, given, fitted)
        return other.eval().requires_grad_(False)
    raise UserError(f"{name} has another catalogue than the data folder, and its method, {fitted.method}, tells "
                    "items by their ids; evaluate it on its own data")


def _fitted(name: str, dataset: Dataset, device: torch.device) -> tuple[Scorer, int]:
    config = load_config(method=name)
    method, features = find_method(name), TextFeatures(config.backbone, config.prompt, device)
    method.needs(config, dataset.n_items)
    given = Given(config, dataset.items, dataset.n_items, features)
    model = method.make(given)
    for phase in method.phases(model, given, dataset):
        phase.task.start(lambda: None)
    return model, config.eval.batch_size
