"""Items whose texts decide what follows: a word of the title stands for the item's class, and classes follow each
other. What is learnt of a class must reach items that stand in no training sequence."""

import numpy as np
import polars as pl
import tiny
import torch

from laserrec.config import BackboneConfig, PromptConfig
from laserrec.data.dataset import Dataset
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.sequence import SequenceTask
from laserrec.util.device import CPU

WORDS = tiny.WORDS[:5]
EACH = 8
"""Items of a class; the last of each is in no sequence."""
N = len(WORDS) * EACH


class Texts(TextFeatures):
    """The LLM's place: a text's mean output depends on its last word alone, but for a little noise."""

    def __init__(self, d: int = 12):
        super().__init__(BackboneConfig(name="none"), PromptConfig(), CPU)
        self.words = torch.randn(len(WORDS), d, generator=torch.Generator().manual_seed(5)) * 3

    def means(self, items: pl.DataFrame) -> torch.Tensor:
        rows = [WORDS.index(title.split()[-1]) for title in items["title"]]
        noise = torch.randn(len(rows), self.words.shape[1], generator=torch.Generator().manual_seed(6))
        return self.words[rows] + 0.3 * noise


def items(name: str = "thing") -> pl.DataFrame:
    """Row r is of class r // EACH."""
    ids = [f"{name}{row}" for row in range(N)]
    titles = [f"{name} {row} {WORDS[row // EACH]}" for row in range(N)]
    return pl.DataFrame({"item": pl.Series(range(N), dtype=pl.Int32), "item_id": ids, "title": titles})


def data(users: int = 80) -> Dataset:
    """Users who walk through the classes, with any of a class's items but the last."""
    rng = np.random.default_rng(0)
    walks = [[int((start + step) % len(WORDS)) * EACH + int(rng.integers(EACH - 1)) for step in range(6)]
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
    """Of histories of one item that stood in no training sequence: how often the best item is of the next class."""
    asked = [word * EACH + EACH - 1 for word in range(len(WORDS))]
    best = model.score(tiny.histories(*([row] for row in asked))).argmax(dim=1) // EACH
    return float((best == (torch.arange(len(WORDS)) + 1) % len(WORDS)).float().mean())
