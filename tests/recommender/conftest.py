"""Models of a few neurons, fitted as `laserrec fit` does."""

import pytest
import tiny

from laserrec.data.dataset import Dataset
from laserrec.recommender import fitting
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util.device import CPU

BASE = {"prompt": {"template": "no_instruction", "max_items": 3, "max_item_tokens": 6},
        "id_model": {**tiny.ID_MODEL.model_dump(), "max_epochs": 2, "lr": 1e-2, "batch_size": 16},
        "train": {"lr": 1e-2, "stage_one_epochs": 1, "stage_two_epochs": 1, "batch_size": 32},
        "neighbours": {"l2": 1.0}, **tiny.RIVALS}


@pytest.fixture(scope="session")
def settings(llm_folder):
    """(**sections) -> Config."""

    def make(**sections):
        return tiny.config(llm_folder(), **{name: BASE.get(name, {}) | sections.get(name, {})
                                            for name in {*BASE, *sections}})

    return make


@pytest.fixture(scope="session")
def fit(llm, settings):
    """(data, folder, method, below=folder of the ID model, **sections) -> LaserRecommender, with the LLM that is loaded
    already."""

    def make(data: Dataset, folder, method: str = "laser", below=None, progress=False, **sections):
        tree = settings(**sections)
        return LaserRecommender(fitting.fit(method, data, tree, folder, CPU, below, tiny.features(llm(), tree),
                                            progress=progress))

    return make
