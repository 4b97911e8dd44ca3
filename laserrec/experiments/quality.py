"""`laserrec reproduce quality`: Laser beside its rivals, several seeds, one evaluator, the test split read once each.

Settings were chosen on validation before; here all models are trained and measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config, IdModelConfig, StudentConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import Scorer
from laserrec.experiments.table import Place, Row, Table, compare, summarise
from laserrec.methods.laser.model import Laser
from laserrec.presets import EASE, EASE_TEXT, ID_MODELS, READING
from laserrec.recommender.distil import distil
from laserrec.recommender.fitting import Fitted
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util.device import choose
from laserrec.util.io import write_json

LASER = "Laser"
BI_TUNING = "Laser, bi-tuning (the LLM reads histories)"


def id_settings(kind: str, **others: Any) -> dict[str, Any]:
    """A rival's tuned settings. A seen offset is learnt, as in Laser, so that the comparison is on equal terms."""
    return {"id_model": IdModelConfig(**{"kind": kind, **ID_MODELS[kind], "seen_offset": True, **others}).model_dump()}


def closed_forms() -> list[Row]:
    """Methods in which nothing is random."""
    return [Row("popularity", "id", "popularity", seeded=False),
            Row("EASE", "id", "ease", {"neighbours": EASE}, seeded=False),
            Row("EASE with LLM text", "text", "ease-text", {"neighbours": EASE_TEXT}, seeded=False),
            Row("untrained LLM, nearest items", "text", "nearest-text", seeded=False)]


def rows() -> list[Row]:
    """All of the table."""
    return [
        *closed_forms(),
        Row("SASRec", "id", "sasrec", id_settings("sasrec")),
        Row("BERT4Rec", "id", "bert4rec", id_settings("bert4rec")),
        Row("SASRec from LLM embeddings", "text", "sasrec", id_settings("sasrec", items="llm_start")),
        Row("text SASRec", "text", "sasrec", id_settings("sasrec", items="text")),
        Row(LASER, "laser", "laser"),
        Row("Laser without its ranking network", "laser", of=(LASER,), make=_blend),
        Row("Laser without its neighbours (cosines)", "laser", of=(LASER,), make=_cosines),
        Row(BI_TUNING, "laser", "laser", READING),
        Row("Laser, bi-tuning, distilled (no LLM for users)", "laser",
            settings={"student": StudentConfig().model_dump()}, of=(BI_TUNING,), make=_distilled),
    ]


def reproduce(dataset: Dataset, config: Config, out: Path, seeds: Sequence[int], progress: bool = True,
              device: str = "auto") -> dict[str, Any]:
    """Train and measure all models for all seeds. Returns {"rows", "summary", "laser_over", "config"}, which is also
    written to OUT/quality.json; see `laserrec.experiments.table` for what is found again."""
    found = Table(rows(), dataset, config, out, choose(device), progress).results(seeds)
    k = config.eval.k
    result = {"rows": found, "summary": summarise(found, out, k), "laser_over": compare(LASER, found, out, k),
              "config": config.model_dump(mode="json")}
    write_json(out / "quality.json", result)
    return result


class Unranked:
    """A Laser without the network that ranks items anew, and if `neighbours` is False without the regression too."""

    def __init__(self, model: Laser, neighbours: bool = True):
        self.model, self.neighbours = model, neighbours

    @torch.no_grad()
    def score(self, histories: Histories) -> Float[Tensor, "users n_items"]:
        """Cosines with the terms that are left."""
        scores = self.model.users(histories) @ self.model.items().T
        for term in (self.model.neighbours if self.neighbours else None, self.model.seen):
            scores = scores if term is None else term.on(histories).to_all(scores)
        return scores


def _blend(place: Place, laser: Fitted) -> tuple[Scorer, float]:
    return Unranked(laser.model), 0.0


def _cosines(place: Place, laser: Fitted) -> tuple[Scorer, float]:
    return Unranked(laser.model, neighbours=False), 0.0


def _distilled(place: Place, laser: Fitted) -> tuple[Scorer, float]:
    settings = (place.config.student or StudentConfig()).model_copy(update={"seed": place.config.train.seed})
    student = distil(LaserRecommender(laser), place.dataset, place.folder, settings, place.progress)
    return student, student.facts["student"]["seconds"]
