"""All methods by name. A method says how its model is made, fitted and read again; everything else is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from laserrec.config import Config, IdModelKind, ItemSide, ItemTable, ItemVectors, Layout
from laserrec.data.dataset import Dataset
from laserrec.llm.text_features import TextFeatures, text_whitening
from laserrec.llm.whitening import whiten
from laserrec.methods import llamarec, llm4rec, lrurec, recformer
from laserrec.methods.bert4rec import BERT4Rec
from laserrec.methods.closed_form import (
    ClosedForm,
    FitOnce,
    ItemRegression,
    NearestText,
    Popularity,
    regression_width,
)
from laserrec.methods.fdsa import FDSA
from laserrec.methods.gru4rec import GRU4Rec
from laserrec.methods.kar import KAR
from laserrec.methods.knowledge import read_knowledge
from laserrec.methods.laser import build as laser
from laserrec.methods.laser.finish import choose_blend
from laserrec.methods.laser.ranker import FEATURES
from laserrec.methods.neighbours import check_size
from laserrec.methods.protocol import Phase
from laserrec.methods.recguru import RecGURU
from laserrec.methods.recguru import phases as recguru_phases
from laserrec.methods.sasrec import SASRec
from laserrec.methods.sequence import SequenceModel
from laserrec.methods.sequence_task import SequenceTask
from laserrec.methods.warm_start import carry_laser, carry_sequence_model, carry_weights, carry_zesrec
from laserrec.methods.zesrec import ZESRec
from laserrec.util.distributed import World
from laserrec.util.errors import UserError

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Given:
    """What a model is made of, beside its weights."""

    config: Config
    items: pl.DataFrame
    """The catalogue: item_id, title and the attributes."""
    n_known: int
    """Items that the model is fitted on: the first rows of `items`."""
    features: TextFeatures
    """Of the frozen LLM; they carry the device."""
    id_model: SequenceModel | None = None
    world: World = field(default_factory=World)
    progress: bool = False


Carry = Callable[[Any, Any, Tensor, Given, Given], None]


@dataclass(frozen=True)
class Method:
    """One way to recommend."""

    kind: str
    """What it knows of items: id, text or laser (both)."""
    sections: tuple[str, ...]
    """Of the config, those that its result depends on."""
    reads_text: Callable[[Config], bool]
    """Whether the result depends on the frozen LLM too."""
    make: Callable[[Given], Any]
    """A fresh model; torch is seeded before."""
    phases: Callable[[Any, Given, Dataset], list[Phase]]
    """How it is fitted."""
    restore: Callable[[Given, dict[str, Tensor], dict[str, Tensor]], Any]
    """The model from its state_dict and item tensors. Raises RuntimeError where they don't fit."""
    shapes: Callable[[Config, int], Shapes]
    """Shapes of its largest weights, by which forged settings are found before anything is allocated."""
    finish: Callable[[Any, bool], tuple[Config, dict[str, Any]]] | None = None
    """(task after the training, progress) -> settings that it chose by itself, and facts about the choice."""
    needs: Callable[[Config, int], None] = lambda config, n_items: None
    """Raises UserError where it can't be fitted to so many items on this machine."""
    carry: Carry | None = None
    """(fresh model, fitted one of the same method, its row of each item or -1, what the fresh one and what the fitted
    one is made of): start from the fitted one's weights. None: there is nothing to start from."""
    loads_llm: bool = False
    """Whether a fitted model is opened with the LLM, and not only fitted or given new items with it."""
    seed: Callable[[Config], int] = lambda config: config.train.seed
    """Of all that is drawn at random."""
    reads: Callable[[Config], str] = lambda config: ""
    """Identifies what it reads beside the data folder and the LLM; "" where that is nothing. Raises UserError where it
    can't be read."""
    inputs: dict[str, int] = field(default_factory=dict)
    """Of weights that a model may have, how many inputs they have in this version, whatever the settings are."""


def _llm_reads_items(config: Config) -> bool:
    """Whether what is known of items comes from their texts: else they have vectors of their own alone."""
    return config.backbone.item_vectors != ItemVectors.INSTEAD


def _laser_reads(config: Config) -> bool:
    histories = config.prompt.layout != Layout.NONE and config.student is None
    return histories or config.prompt.item_side != ItemSide.MEAN or _llm_reads_items(config)


# -- sequence models --------------------------------------------------------------------------------------------------

def _sequence(kind: type[SequenceModel], name: IdModelKind) -> Method:
    def settings(config: Config) -> Any:
        return config.id_model.model_copy(update={"kind": name})

    def make(given: Given) -> SequenceModel:
        config, features = settings(given.config), given.features
        if config.items == ItemTable.IDS:
            return kind(config, given.n_known).to(features.device)
        means, parts = features.means(given.items), features.parts(given.items)
        white = text_whitening(means, parts)
        model = kind(config, given.n_known, whiten(means, *white, parts).cpu()).to(features.device)
        if config.items == ItemTable.TEXT:
            model.whitened_by(*white)
        return model

    def restore(given: Given, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> SequenceModel:
        config, text = settings(given.config), weights.get("text")
        if text is None and config.items != ItemTable.IDS:
            text = torch.zeros(given.n_known, config.d_id)  # it started the item table, which the weights hold now
        model = kind(config, given.n_known, text)
        if "text_matrix" in weights:
            model.whitened_by(weights["text_mean"], weights["text_matrix"])
        return _filled(model, weights, given)

    def phases(model: SequenceModel, given: Given, dataset: Dataset) -> list[Phase]:
        config = model.config
        return [Phase(name.value, SequenceTask(model, dataset), config.max_epochs, config.batch_size, config.lr,
                      config.weight_decay, patience=config.patience, eval_every=config.eval_every)]

    def shapes(config: Config, n_known: int) -> Shapes:
        return kind.shapes(config.id_model, n_known)

    def reads_text(config: Config) -> bool:
        return config.id_model.items != ItemTable.IDS and _llm_reads_items(config)

    def carry(model: SequenceModel, old: SequenceModel, rows: Tensor, given: Given, before: Given) -> None:
        texts = None if model.config.items == ItemTable.IDS else _in_one_space(old, given, before)
        carry_sequence_model(model, old, rows, texts)

    return Method("id", ("id_model",), reads_text, make, phases, restore, shapes, carry=carry,
                  seed=lambda config: config.id_model.seed)


def _in_one_space(old: SequenceModel, given: Given, before: Given) -> tuple[Tensor, Tensor]:
    """Text vectors of both catalogues' items, whitened as the older one's were."""
    means, parts = given.features.means(given.items), given.features.parts(given.items)
    if parts != before.features.parts(before.items):
        raise UserError("the model to start from was fitted on items with other vectors of their own, or with none "
                        "(backbone.item_vectors), than these items have; fit from nothing")
    if old.whitening is not None:
        return whiten(means, *old.whitening, parts), old.get_buffer("text")
    old_means = before.features.means(before.items)
    white = text_whitening(old_means, parts)
    return whiten(means, *white, parts), whiten(old_means, *white, parts)


# -- rivals over sequences, one class each ----------------------------------------------------------------------------

def _rival(name: str, kind: str, model: Any, reads_text: Callable[[Config], bool] = lambda config: True,
           phases: Callable[..., list[Phase]] | None = None,
           reads: Callable[[Config], str] = lambda config: "",
           carry: Carry | None = None) -> Method:
    """model: a class with `fresh`, `restored` and `shapes`, whose settings are the section `name`."""

    def restore(given: Given, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> Any:
        kept = {key: tensor.to(given.features.device) for key, tensor in kept.items()}
        ready = model.restored(given.config, given.items, given.n_known, given.features, weights, kept)
        return _filled(ready, weights, given)

    def one_phase(fresh: Any, given: Given, dataset: Dataset) -> list[Phase]:
        own = getattr(given.config, name)
        return [Phase(name, SequenceTask(fresh, dataset), own.max_epochs, own.batch_size, own.lr, own.weight_decay,
                      patience=own.patience, eval_every=own.eval_every)]

    def make(given: Given) -> Any:
        return model.fresh(given.config, given.items, given.features)

    return Method(kind, (name,), reads_text, make, phases or one_phase, restore, model.shapes,
                  seed=lambda config: getattr(config, name).seed, reads=reads, carry=carry)


def _knowledge_sha256(config: Config) -> str:
    return "" if config.kar.knowledge is None else read_knowledge(config.kar.knowledge).sha256


def _other_sha256(config: Config) -> str:
    return "" if config.recguru.other is None else Dataset.load(config.recguru.other).fingerprint


# -- closed forms -----------------------------------------------------------------------------------------------------

def _closed_form(kind: str, make: Callable[[Given], ClosedForm], fit: Callable[[Any, Given, Dataset], object],
                 shapes: Callable[[Config, int], Shapes], needs: Callable[[Config, int], None] | None = None) -> Method:
    def phases(model: ClosedForm, given: Given, dataset: Dataset) -> list[Phase]:
        return [Phase("closed form", FitOnce(model, lambda: fit(model, given, dataset)), epochs=0)]

    def restore(given: Given, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> ClosedForm:
        return _filled(make(given), weights, given)

    def reads_text(config: Config) -> bool:
        return kind == "text" and _llm_reads_items(config)

    return Method(kind, ("neighbours",), reads_text, make, phases, restore, shapes,
                  needs=needs or (lambda config, n_items: None))


def _regression(kind: str) -> Method:
    def fit(model: ItemRegression, given: Given, dataset: Dataset) -> None:
        model.fit(dataset, given.features.vectors(given.items) if kind == "text" else None)

    def make(given: Given) -> ItemRegression:
        return ItemRegression(given.config.neighbours, given.n_known).to(given.features.device)

    def shapes(config: Config, n_items: int) -> Shapes:
        return {"weights": (n_items, regression_width(config.neighbours, n_items))}

    return _closed_form(kind, make, fit, shapes, lambda config, n: check_size(n, config.neighbours))


def _nearest() -> Method:
    def make(given: Given) -> NearestText:
        return NearestText(given.n_known, given.config.neighbours.decay).to(given.features.device)

    return _closed_form("text", make, lambda model, given, dataset: model.fit(given.features.vectors(given.items)),
                        lambda config, n: {})


def _popularity() -> Method:
    return _closed_form("id", lambda given: Popularity(given.n_known).to(given.features.device),
                        lambda model, given, dataset: model.fit(dataset), lambda config, n: {"counts": (n,)})


# -- Laser ------------------------------------------------------------------------------------------------------------

def _laser() -> Method:
    def make(given: Given) -> Any:
        return laser.compose(given.config, given.items, given.n_known, given.features, given.id_model,
                             world=given.world, progress=given.progress)

    def restore(given: Given, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> Any:
        return laser.restore(given.config, given.items, given.n_known, given.features, given.id_model, weights, kept)

    def needs(config: Config, n_items: int) -> None:
        if config.neighbours.count:
            check_size(n_items, config.neighbours)

    return Method("laser", ("id_model", "backbone", "prompt", "mformer", "transformer", "head", "neighbours", "train",
                            "blend", "student"),
                  _laser_reads, make, lambda model, given, data: laser.phases(model, data, given.world,
                                                                                     given.progress),
                  restore, laser.shapes, choose_blend, needs,
                  lambda model, old, rows, given, before: carry_laser(model, old, rows),
                  inputs={"ranker.hidden.weight": FEATURES})


# -- rivals -----------------------------------------------------------------------------------------------------------

def _from_phases(kind: str, sections: tuple[str, ...], make: Callable[[Given], nn.Module],
                 phases: Callable[[Any, Config, Dataset], list[Phase]], shapes: Callable[[Config, int], Shapes],
                 restore: Callable[[Given, dict[str, Tensor], dict[str, Tensor]], Any] | None = None,
                 reads: Callable[[Config], str] = lambda config: "",
                 carry: Carry | None = None) -> Method:
    """restore: None where all of the model is in its state_dict. The last of its sections has the seed."""

    def filled(given: Given, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> Any:
        return _filled(make(given), weights, given)

    return Method(kind, sections, lambda config: kind != "id", make,
                  lambda model, given, dataset: phases(model, given.config, dataset), restore or filled, shapes,
                  loads_llm=kind != "id", seed=lambda config: getattr(config, sections[-1]).seed, reads=reads,
                  carry=carry)


def _lrurec() -> Method:
    def make(given: Given) -> lrurec.LRURec:
        return lrurec.LRURec(given.config.lrurec, given.n_known).to(given.features.device)

    return _from_phases("id", ("lrurec",), make, lambda model, config, data: lrurec.phases(model, config.lrurec, data),
                        lambda config, n: lrurec.shapes(config.lrurec, n))


def _llamarec() -> Method:
    def make(given: Given) -> llamarec.LlamaRec:
        return llamarec.LlamaRec(given.config, given.n_known, given.items, given.features.backbone)

    return _from_phases("laser", ("lrurec", "llamarec"), make, llamarec.phases, llamarec.shapes)


def _recformer() -> Method:
    def make(given: Given) -> recformer.RecFormer:
        return recformer.RecFormer(given.config.recformer, given.items, given.features.backbone)

    def restore(given: Given, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> recformer.RecFormer:
        return recformer.restore(make(given), weights, kept)

    def reads(config: Config) -> str:
        return " ".join(Dataset.load(folder).fingerprint for folder in config.recformer.pretrain_on)

    return _from_phases("text", ("recformer",), make, recformer.phases,
                        lambda config, n: recformer.shapes(config.recformer), restore, reads,
                        lambda model, old, rows, given, before: carry_weights(model, old))


def _llm4rec() -> Method:
    def make(given: Given) -> llm4rec.LLM4Rec:
        return llm4rec.LLM4Rec(given.config.llm4rec, given.n_known, given.items, given.features.backbone)

    def restore(given: Given, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> llm4rec.LLM4Rec:
        return llm4rec.restore(make(given), weights)

    return _from_phases("laser", ("llm4rec",), make, llm4rec.phases, lambda config, n: {}, restore)


def _filled(model: nn.Module, weights: dict[str, Tensor], given: Given) -> Any:
    model.load_state_dict(weights)
    return model.to(given.features.device).eval().requires_grad_(False)


METHODS: dict[str, Method] = {
    "laser": _laser(),
    "sasrec": _sequence(SASRec, IdModelKind.SASREC),
    "bert4rec": _sequence(BERT4Rec, IdModelKind.BERT4REC),
    "gru4rec": _sequence(GRU4Rec, IdModelKind.GRU4REC),
    "ease": _regression("id"),
    "ease-text": _regression("text"),
    "nearest-text": _nearest(),
    "popularity": _popularity(),
    "lrurec": _lrurec(),
    "llamarec": _llamarec(),
    "recformer": _recformer(),
    "llm4rec": _llm4rec(),
    "fdsa": _rival("fdsa", "laser", FDSA),
    "zesrec": _rival("zesrec", "text", ZESRec, _llm_reads_items,
                     carry=lambda model, old, rows, given, before: carry_zesrec(model, old, given.items)),
    "kar": _rival("kar", "laser", KAR, reads=_knowledge_sha256),
    "recguru": _rival("recguru", "id", RecGURU, lambda config: False,
                      phases=lambda model, given, dataset: recguru_phases(model, dataset),
                      reads=_other_sha256),
}


def find_method(name: str) -> Method:
    """Raises UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"unknown method {name[:80]!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]
