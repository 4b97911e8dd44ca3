"""A tiny fitted model behind the real HTTP application."""

import pytest
import tiny

from laserrec import LaserRecommender

N = 12


@pytest.fixture(scope="session")
def model_folder(llm, llm_folder, tmp_path_factory):
    config = tiny.config(llm_folder(), prompt={"layout": "text_first", "max_items": 4, "max_item_tokens": 8},
                         head={"id_share": 0.3, "whiten_dims": 8, "projection": True, "seen_offset": True},
                         train={"lr": 1e-2, "stage_one_epochs": 1, "stage_two_epochs": 0, "batch_size": 32})
    folder = tmp_path_factory.mktemp("served") / "model"
    LaserRecommender.fit_dataset(tiny.planted(N, users=16), config, folder, progress=False)
    return folder
