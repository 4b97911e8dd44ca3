"""A config -> a composed Laser and the phases that fit it."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config, ItemSide, ItemTable, ItemVectors, Layout, Prefix
from laserrec.data.dataset import Dataset
from laserrec.data.extras import VECTOR
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.laser.head import AddedOutput, Head
from laserrec.methods.laser.id_states import IdStates
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.ranker import FEATURES, Ranker
from laserrec.methods.laser.readers import READERS, Reader
from laserrec.methods.laser.sides import MeanItems, ReadItems, ReadUsers, StudentUsers, SummedUsers
from laserrec.methods.laser.student import Student
from laserrec.methods.laser.task import LaserTask
from laserrec.methods.laser.texts import Texts
from laserrec.methods.laser.transformer import HistoryTransformer
from laserrec.methods.neighbours import Neighbours
from laserrec.methods.protocol import Phase
from laserrec.methods.sequence import SequenceModel
from laserrec.methods.terms import SeenOffset
from laserrec.util.distributed import World


def compose(
    config: Config, items: pl.DataFrame, n_known: int, features: TextFeatures, id_model: SequenceModel | None,
    means: Float[Tensor, "n_items d_means"] | None = None, world: World | None = None, progress: bool = False,
) -> Laser:
    """A fresh Laser over `items`, of which the first n_known are those it is fitted on; seed torch first.

    means: what the LLM's mean outputs over the items' texts are, if they are known. The LLM is loaded only where a part
    needs it: to read histories, or texts whose means are not given. Raises UserError where settings and LLM don't fit.
    """
    ids, settings, decay = IdStates(id_model, features.device, config.head.id_product), config.head, config.prompt.decay
    added = student = mean_items = transformer = None
    if config.prompt.item_side == ItemSide.MEAN:
        mean_items = MeanItems(features.means(items) if means is None else means)
    reader, texts = _reader(config, items, features, ids, world, progress)
    if mean_items is not None:
        head = Head(settings, mean_items.means.shape[1], features.parts(items))
        if reader is not None:
            added = AddedOutput(settings, reader.backbone.d_llm, head.d_out)
        elif _has_transformer(config):
            transformer = HistoryTransformer(config.transformer, head.d_out)
        item_side, user_side = mean_items, SummedUsers(mean_items, head, decay, reader, added, transformer)
    else:
        assert reader is not None  # Config refuses layout none without mean items
        head = Head(settings, reader.backbone.d_llm)
        item_side = ReadItems(reader, config.prompt.item_side == ItemSide.PLAIN)
        user_side = ReadUsers(reader, head)
    if config.student is not None:
        student = Student(config.student, head.d_out, ids.d_id)
        user_side = StudentUsers(student, ids, decay)
    neighbours = Neighbours(config.neighbours, n_known) if config.neighbours.count else None
    seen = SeenOffset(settings.seen_offset_start) if settings.seen_offset else None
    laser = Laser(config, user_side, item_side, head, ids, features, texts, reader, added, transformer, student,
                  neighbours, seen)
    laser.n_known = n_known
    return laser


def has_texts(config: Config, items: pl.DataFrame) -> bool:
    """Whether anything is known of items beside their IDs that a model of these settings reads."""
    vectors = config.backbone.item_vectors != ItemVectors.NONE and VECTOR in items.columns
    return vectors or any(items[name].null_count() < items.height for name in ("title", *config.prompt.attributes))


def without_texts(config: Config) -> Config:
    """The parts that need no item texts: regression and ID model. As it is where items are made by the trained reader,
    which has nothing beside it (paper)."""
    if config.prompt.item_side != ItemSide.MEAN:
        return config
    ids = {"items": ItemTable.IDS} if config.id_model.items == ItemTable.LLM_START else {}
    changes: dict[str, dict[str, Any]] = {
        "prompt": {"layout": Layout.NONE}, "mformer": {"prefix": Prefix.NONE}, "transformer": {"blocks": 0},
        "neighbours": {"text_weight": 0.0}, "id_model": ids, "train": {"stage_one_epochs": 0, "stage_two_epochs": 0}}
    return config.model_copy(update={name: getattr(config, name).model_copy(update=changed)
                                     for name, changed in changes.items()})


def _reader(config: Config, items: pl.DataFrame, features: TextFeatures, ids: IdStates, world: World | None,
            progress: bool) -> tuple[Reader | None, Texts | None]:
    """The LLM's side: None where neither users nor items are read by it (layout none; a student over mean items)."""
    mean_items = config.prompt.item_side == ItemSide.MEAN
    if config.prompt.layout == Layout.NONE or (config.student is not None and mean_items):
        return None, None
    texts = Texts(features.backbone, config.prompt, items, progress, world)
    return READERS[config.prompt.layout](config, features.backbone, texts, ids), texts


def _has_transformer(config: Config) -> bool:
    """Where the LLM reads histories, or a student does, there is none whatever the settings say."""
    return config.transformer.blocks > 0 and config.prompt.layout == Layout.NONE and config.student is None


def phases(laser: Laser, dataset: Dataset, world: World, progress: bool = False) -> list[Phase]:
    """The paper's two stages; a stage of no epochs still makes what is made in closed form."""
    train = laser.config.train
    shared: dict[str, Any] = {
        "batch_size": train.batch_size, "lr": train.lr, "weight_decay": train.weight_decay,
        "cosine_decay": train.cosine_decay, "max_grad_norm": train.max_grad_norm,
        "tokens_per_pass": train.tokens_per_pass if laser.config.prompt.layout == Layout.PREFIX_FIRST else None}
    first = Phase("stage 1", LaserTask(laser, dataset, world, fixed=False, progress=progress), train.stage_one_epochs,
                  warmup_fraction=train.warmup_fraction, validates_start=True, **shared)
    if not train.stage_two_epochs:
        return [first]
    second = LaserTask(laser, dataset, world, fixed=True, progress=progress)
    return [first, Phase("stage 2", second, train.stage_two_epochs, **shared)]


def restore(config: Config, items: pl.DataFrame, n_known: int, features: TextFeatures,
            id_model: SequenceModel | None, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> Laser:
    """A fitted Laser from its state_dict and item tensors. Raises RuntimeError where they don't fit."""
    if config.prompt.item_side == ItemSide.MEAN and len(kept["means"]) != items.height:
        raise RuntimeError(f"{len(kept['means'])} mean outputs of {items.height} items")
    means = kept["means"].to(features.device) if "means" in kept else None
    laser = compose(config, items, n_known, features, id_model, means)
    if "ranker.hidden.weight" in weights:
        hidden, read = weights["ranker.hidden.weight"].shape
        if read != FEATURES:
            raise RuntimeError(f"the ranking network of this version reads {FEATURES} features, this one {read}")
        laser.ranker = Ranker(n_known, hidden).to(features.device)
    laser.load_state_dict(weights)
    if kept["vectors"].shape != (items.height, laser.d_out):
        raise RuntimeError(f"embeddings of shape {tuple(kept['vectors'].shape)}, not {(items.height, laser.d_out)}")
    laser.set_items(kept["vectors"].to(torch.float32).to(features.device))
    return laser.eval().requires_grad_(False)


def shapes(config: Config, n_known: int) -> dict[str, tuple[int, ...]]:
    """Of the largest weights, as the settings claim them."""
    out, mformer = {}, config.mformer
    if config.neighbours.count:
        out["neighbours.items"] = (n_known, min(config.neighbours.count, max(1, n_known - 1)))
    if _has_transformer(config):
        size = config.transformer
        out["transformer.encoder.position.weight"] = (size.max_history, size.d_model)
        out[f"transformer.encoder.blocks.{size.blocks - 1}.feed.0.weight"] = (size.d_inner, size.d_model)
    reads = config.prompt.layout != Layout.NONE and config.student is None
    if reads and mformer.prefix in (Prefix.MFORMER, Prefix.ONE_EXPERT):
        experts = 1 if mformer.prefix == Prefix.ONE_EXPERT else mformer.experts
        out["reader.mformer.experts"] = (experts, mformer.queries, mformer.d_model)
        out[f"reader.mformer.blocks.{mformer.blocks - 1}.feed.0.weight"] = (4 * mformer.d_model, mformer.d_model)
    return out
