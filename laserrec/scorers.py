"""A model's name on the command line -> what the evaluator calls."""

from __future__ import annotations

from laserrec.data.sequences import Dataset
from laserrec.errors import UserError
from laserrec.evaluate import Scorer


def load_scorer(name: str, dataset: Dataset) -> Scorer:
    """`popularity`, a model folder, ORG/NAME on the hub, or an ID-model folder. Raises UserError for anything else, or
    for other items."""
    from laserrec.baselines.popularity import Popularity
    from laserrec.hub import local_folder
    from laserrec.models.id_store import load_id_model
    from laserrec.recommender import LaserRecommender

    folder = local_folder(name)
    if (folder / "model.json").is_file():
        model = LaserRecommender.from_pretrained(folder)
        if model.items["item_id"].to_list() != dataset.items["item_id"].to_list():
            raise UserError(f"{name} has another catalogue than the data folder; evaluate it on its own data")
        return model.score
    if (folder / "config.json").is_file():
        return load_id_model(folder, dataset).model.score
    if name == "popularity":
        return Popularity(dataset).score
    raise UserError(f"{name!r} is neither a model folder, nor an ID-model folder, nor the name popularity")
