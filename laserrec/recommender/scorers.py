"""A model's name on the command line -> what the evaluator calls."""

from __future__ import annotations

from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import Scorer
from laserrec.util.errors import UserError


def load_scorer(name: str, dataset: Dataset) -> Scorer:
    """`popularity`, a model folder, ORG/NAME on the hub, or an ID-model folder. Raises UserError for anything else, or
    for other items."""
    from laserrec.methods.id_store import load_id_model
    from laserrec.methods.popularity import Popularity
    from laserrec.recommender.hub import local_folder
    from laserrec.recommender.recommender import LaserRecommender

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
