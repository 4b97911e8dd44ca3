"""What each choice of Laser's recipe is worth, one at a time: `python benchmarks/choices.py OUT`.

Every variant is the preset `small` with one thing changed, trained for one epoch of random cuts, one seed, and scored
by the text part's cosines alone on validation. A line per variant is added to OUT/choices.jsonl; what stands there
already is not run again. Differences below .001 in NDCG@10 are within the noise of a seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trials import Trials, open_data

from laserrec.config import Config, load_config, merge
from laserrec.llm.backbone import load_backbone
from laserrec.llm.text_features import text_vectors
from laserrec.methods.id_store import load_id_model
from laserrec.methods.laser.mformer import Route
from laserrec.recommender.recommender import LaserRecommender
from laserrec.training import train
from laserrec.training.pretrain import pretrain_id_model

_BASE: dict[str, Any] = {"neighbours": {"count": 0}, "head": {"id_share": 0.0},
                         "train": {"cuts": "random", "stage_one_epochs": 1, "stage_two_epochs": 0}}
_VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "no prefix": {"mformer": {"prefix": "none"}},
    "learned prefix": {"mformer": {"prefix": "learned"}},
    "one expert": {"mformer": {"prefix": "one_expert"}},
    "prefix from random vectors": {"mformer": {"zero_init": False}},
    "suffix from a random vector": {"head": {"suffix_from_eos": False}},
    "hard routing": {"mformer": {"routing": "hard"}},
    "balance over the batch": {},
    "16 queries, 4 blocks": {"mformer": {"queries": 16, "blocks": 4}},
    "no warm-up": {"train": {"warmup_fraction": 0.0}},
    "lr 3e-3": {"train": {"lr": 3e-3}},
    "lr 3e-4": {"train": {"lr": 3e-4}},
    "temperature .05": {"train": {"temperature": 0.05}},
    "temperature .1": {"train": {"temperature": 0.1}},
    "learnt temperature": {"train": {"learn_temperature": True}},
    "12 tokens an item": {"prompt": {"max_item_tokens": 12}},
    "48 tokens an item": {"prompt": {"max_item_tokens": 48}},
    "items fixed per epoch": {"train": {"item_gradient": False}},
    "12 layers": {"backbone": {"layers": 12}},
}


def _batch_balance(route: Route) -> Tensor:
    """The load-balancing loss over a batch's items together, in place of each user's."""
    probabilities = route.probabilities[route.mask]
    experts = probabilities.shape[-1]
    share = torch.nn.functional.one_hot(probabilities.argmax(dim=-1), experts).float().mean(dim=0)
    return experts * (share * probabilities.mean(dim=0)).sum()


@contextmanager
def _balance(name: str) -> Iterator[None]:
    own = train.load_balance
    train.load_balance = _batch_balance if name == "balance over the batch" else own
    try:
        yield
    finally:
        train.load_balance = own


def measure(out: Path, names: list[str]) -> None:
    small = load_config("small")
    dataset, backbone, done = open_data(out, small), load_backbone(small.backbone), Trials(out / "choices.jsonl")
    pretrain_id_model(dataset, small.id_model, out / "id_model", True,
                      lambda: text_vectors(dataset, small, True, backbone))
    id_model = load_id_model(out / "id_model", dataset).model
    for name in names:
        if name in done:
            continue
        config = Config.model_validate(merge(merge(small.model_dump(), _BASE), _VARIANTS[name]))
        own = backbone if config.backbone == small.backbone else load_backbone(config.backbone)
        with tempfile.TemporaryDirectory() as folder, _balance(name):
            model = LaserRecommender.fit_dataset(dataset, id_model, config, Path(folder) / "model", False, own)
            log = [json.loads(x) for x in (Path(folder) / "model" / "log.jsonl").read_text().splitlines()]
        ends = ("untrained", log[0]), ("trained", log[-1])
        scores = {f"{end}_{m}": entry[f"validation_{m}"] for end, entry in ends for m in ("recall@10", "ndcg@10")}
        done.add(name, variant=name, seconds=model.facts["training"]["seconds"], loss=log[-1]["loss"], **scores)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="*", default=list(_VARIANTS), choices=list(_VARIANTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure(options.out, options.variants)
