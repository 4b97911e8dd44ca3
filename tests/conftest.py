"""One thread, no network, checked shapes, and tiny frozen LLMs that are made once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that would download fails instead

from jaxtyping import install_import_hook

# Shapes in signatures are checked at every call (where there are any: beartype refuses polars' types in unions).
SHAPED = ("llm", "methods", "evaluation", "training", "retrieval.indexed", "retrieval.top",
          "recommender.ranking", "recommender.recommender")
install_import_hook([f"laserrec.{module}" for module in SHAPED], "beartype.beartype")

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """family -> folder of a tiny random decoder with its tokenizer."""
    made = {}

    def folder(family: str = "llama"):
        if family not in made:
            made[family] = tiny.save_llm(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def llm(llm_folder):
    """(family, engine, **settings) -> loaded Backbone, one per session; tests must not change it."""
    from laserrec.config import BackboneConfig
    from laserrec.llm.backbone import load_backbone

    made = {}

    def load(family: str = "llama", **settings):
        key = (family, *sorted(settings.items()))
        if key not in made:
            made[key] = load_backbone(BackboneConfig(name=str(llm_folder(family)), **{"precision": "fp32", **settings}))
        return made[key]

    return load
