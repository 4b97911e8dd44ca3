"""LRURec (Yue, Wang, He, Zeng, McAuley & Wang 2024, "Linear Recurrent Units for Sequential Recommendation", WSDM).

In place of attention a block has a linear recurrence with one complex decay per dimension (the linear recurrent unit of
Orvieto et al. 2023), which is computed for all positions in a logarithm of so many steps. Every position predicts the
next item, with the full softmax. There are no position embeddings: the recurrence knows the order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import IdModelConfig, LruRecConfig, Softmax
from laserrec.data.dataset import Dataset
from laserrec.methods.protocol import Phase
from laserrec.methods.sasrec import SASRec
from laserrec.methods.sequence_task import SequenceTask

_STD = 0.02
"""Standard deviation of fresh weights."""
_RADII = 0.8, 0.99
"""Between these the decays' absolute values start."""


class LinearRecurrence(nn.Module):
    """h_t = lambda * h_(t-1) + gamma * (B x_t), y_t = Re(C h_t), with complex h, lambda, B and C.

    lambda = exp(-exp(nu) + i exp(theta)), so that its absolute value stays below 1 whatever is learnt. gamma starts at
    sqrt(1 - |lambda|^2), which keeps the states' size. Complex numbers are held as pairs of real ones.
    """

    def __init__(self, d_id: int):
        super().__init__()
        width = 2 * d_id
        least, most = (r**2 for r in _RADII)
        squared = torch.rand(width) * (most - least) + least  # |lambda|^2, even over the ring
        self.nu = nn.Parameter((-0.5 * squared.log()).log())
        self.theta = nn.Parameter((torch.rand(width).clamp(min=1e-6) * 2 * math.pi).log())
        self.gamma = nn.Parameter(0.5 * (1 - squared).log())
        self.into, self.out = nn.Linear(d_id, 2 * width), nn.Linear(2 * width, d_id)

    def forward(self, x: Float[Tensor, "batch seq d_id"]) -> Float[Tensor, "batch seq d_id"]:
        """An output depends on nothing behind its own position."""
        real, imaginary = (self.into(x) * self.gamma.exp().repeat(2)).chunk(2, dim=-1)
        step = 1
        while step < x.shape[1]:  # each state sums the last `step` inputs; with the state `step` back, twice as many
            size, angle = (-step * self.nu.exp()).exp(), step * self.theta.exp()
            a, b = size * angle.cos(), size * angle.sin()
            old_real, old_imaginary = (F.pad(part[:, :-step], (0, 0, step, 0)) for part in (real, imaginary))
            real, imaginary = (real + a * old_real - b * old_imaginary, imaginary + a * old_imaginary + b * old_real)
            step *= 2
        return self.out(torch.cat([real, imaginary], dim=-1))


class LruBlock(nn.Module):
    """A recurrence, then a feed-forward of 4 d_id, both residual and normalised behind the sum."""

    def __init__(self, config: LruRecConfig):
        super().__init__()
        d = config.d_id
        self.recurrence, self.recurrence_norm, self.feed_norm = LinearRecurrence(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.feed = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "batch seq d_id"]) -> Float[Tensor, "batch seq d_id"]:
        x = self.recurrence_norm(x + self.dropout(self.recurrence(x)))
        return self.feed_norm(x + self.dropout(self.feed(x)))


class LRURec(SASRec):
    """SASRec with recurrences for its attention: same inputs, targets, softmax and item table."""

    def __init__(self, config: LruRecConfig, n_items: int):
        super().__init__(IdModelConfig(d_id=config.d_id, blocks=1, heads=1, dropout=config.dropout, seed=config.seed,
                                       max_history=config.max_history, softmax=Softmax.FULL,
                                       seen_offset=config.seen_offset), n_items)
        del self.position
        self.blocks = nn.ModuleList(LruBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.d_id)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)

    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_id"]:
        """One state per item, of the items up to it."""
        x = self.embedding_dropout(self.norm(self.embed(items)))
        for block in self.blocks:
            x = block(x)
        return x


def retriever_phase(config: LruRecConfig, task: SequenceTask, name: str = "lrurec") -> Phase:
    """How an LRURec is trained."""
    return Phase(name, task, config.max_epochs, config.batch_size, config.lr, config.weight_decay,
                 patience=config.patience, eval_every=config.eval_every)


def phases(model: LRURec, config: LruRecConfig, dataset: Dataset) -> list[Phase]:
    """One stretch on whole sequences."""
    return [retriever_phase(config, SequenceTask(model, dataset))]


def shapes(config: LruRecConfig, n_known: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Of the largest weights, as the settings claim them."""
    d = config.d_id
    return {f"{prefix}item.weight": (n_known + 2, d),
            f"{prefix}blocks.{config.blocks - 1}.recurrence.into.weight": (4 * d, d)}
