"""Items whose texts decide what follows: a word of the title stands for the item's class, and classes follow each
other. What is learnt of a class must reach items that stand in no training sequence."""

import zlib

import numpy as np
import polars as pl
import tiny
import torch

from laserrec.config import BackboneConfig, PromptConfig
from laserrec.data.dataset import Dataset
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.all import METHODS, Given
from laserrec.methods.sequence_task import SequenceTask
from laserrec.util.device import CPU

WORDS = tiny.WORDS[:5]
EACH, NEW = 8, 3
"""Items of a class, and how many of them, the last ones, are in no sequence."""
N = len(WORDS) * EACH


class Texts(TextFeatures):
    """The LLM's place: a text's mean output depends on its last word alone, but for a little noise."""

    def __init__(self, d: int = 12):
        super().__init__(BackboneConfig(name="none"), PromptConfig(), CPU)
        self.words = torch.randn(len(WORDS), d, generator=torch.Generator().manual_seed(5)) * 3

    def llm_means(self, items: pl.DataFrame) -> torch.Tensor:
        rows = [WORDS.index(title.split()[-1]) for title in items["title"]]
        return self.words[rows] + 0.3 * torch.stack([self._noise(title) for title in items["title"]])

    def _noise(self, title: str) -> torch.Tensor:
        """The same wherever the text stands."""
        return torch.randn(self.words.shape[1], generator=torch.Generator().manual_seed(zlib.crc32(title.encode())))


def items(name: str = "thing") -> pl.DataFrame:
    """Row r is of class r // EACH."""
    ids = [f"{name}{row}" for row in range(N)]
    titles = [f"{name} {row} {WORDS[row // EACH]}" for row in range(N)]
    return pl.DataFrame({"item": pl.Series(range(N), dtype=pl.Int32), "item_id": ids, "title": titles})


def data(users: int = 80) -> Dataset:
    """Users who walk through the classes, with any of a class's items but the new ones."""
    rng = np.random.default_rng(0)
    walks = [[int((start + step) % len(WORDS)) * EACH + int(rng.integers(EACH - NEW)) for step in range(6)]
             for start in rng.integers(0, len(WORDS), users)]
    made = tiny.dataset(walks, N)
    return Dataset(items(), made.users, made.interactions, made.meta)


def trained(model, epochs: int, lr: float = 1e-2):
    """The model after some epochs on `data`."""
    task, rng = SequenceTask(model, data()), np.random.default_rng(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    task.start(lambda: None)
    for epoch in range(1, epochs + 1):
        examples = task.begin_epoch(epoch)
        for rows in np.array_split(rng.permutation(len(examples.lengths)), 4):
            optimizer.zero_grad()
            task.loss(examples.batch(rows), np.arange(len(rows)))["loss"].backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def share_right(model) -> float:
    """Of histories of one item that stood in no training sequence: how often the best item is of the next class. One in
    five by chance."""
    asked = torch.tensor([row for row in range(N) if row % EACH >= EACH - NEW])
    best = model.score(tiny.histories(*([row] for row in asked.tolist()))).argmax(dim=1) // EACH
    return float((best == (asked // EACH + 1) % len(WORDS)).float().mean())


def learnt(name: str, catalogue: pl.DataFrame, epochs: int = 15, seeds: int = 3, **settings) -> float:
    """`share_right` of the method after training over this catalogue's texts, a mean over seeds."""
    config, shares = tiny.config("x", **{name: tiny.RIVALS[name] | {"dropout": 0.0} | settings}), []
    for seed in range(seeds):
        torch.manual_seed(seed)
        shares.append(share_right(trained(METHODS[name].make(Given(config, catalogue, N, Texts())), epochs)))
    return sum(shares) / seeds


def shop(name: str, users: int = 60, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Interactions (user_id, item_id, timestamp) and items of a shop where users walk through the classes as in `data`.
    Two shops share no item and no user; titles, which tell the class alone, and what follows what are the same."""
    rng = np.random.default_rng(seed)
    rows = [(f"{name} u{user}", f"{name}{int((start + step) % len(WORDS)) * EACH + int(rng.integers(EACH))}", step)
            for user, start in enumerate(rng.integers(0, len(WORDS), users)) for step in range(6)]
    titles = [f"the {WORDS[row // EACH]}" for row in range(N)]
    return (pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row"),
            items(name).drop("item").with_columns(title=pl.Series(titles)))
