"""RecGURU (Li et al. 2022, "RecGURU: Adversarial Learning of Generalized User Representations for Cross-Domain
Recommendation", WSDM): an autoencoder of the history, whose user vector a second domain's users help to make general,
and a recommender that reads the history and the user vector.

Phase "autoencoder": a transformer reads the sequence, its last state is the user's vector, a decoder writes the
sequence again from it (sampled cross-entropy). With a second data folder, both domains share encoder and decoder, and a
discriminator learns to tell the domains by the user vectors while the encoder learns to mislead it. Phase
"recommender": a decoder over the items bought so far predicts the next one (BPR); the encoder's weights stay fixed.

The encoder is causal here, so that every prefix of a sequence has a user vector and every position is a target; the
paper's sees the whole sequence. Its loss on users of both domains is left out: no user is in two of our data sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import RecGURUConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.parts import CausalEncoder, causal_mask
from laserrec.methods.protocol import Phase, Trainable
from laserrec.methods.sequence import NextItemModel, initialise, seen_offset
from laserrec.methods.sequence_task import SequenceTask, with_next_item
from laserrec.methods.targets import Targets
from laserrec.util import checkpoint
from laserrec.util.device import move

_EXTRA = "autoencoder."
"""Begins the names of tensors that only the first phase needs."""


class Decoder(nn.Module):
    """Causal self-attention over items that knows the user. The paper's attends to copies of the user's vector, and
    attention over equal vectors is a linear map of one: it is added in front of each block."""

    def __init__(self, config: RecGURUConfig):
        super().__init__()
        self.body = CausalEncoder(config)
        self.user = nn.ModuleList(nn.Linear(config.d_model, config.d_model) for _ in range(config.blocks))

    def forward(self, x: Float[Tensor, "batch seq d"], user: Float[Tensor, "batch #seq d"]
                ) -> Float[Tensor, "batch seq d"]:
        """A state per item."""
        x, mask = self.body.enter(x), causal_mask(x)
        for layer, block in zip(self.user, self.body.blocks, strict=True):
            x = block(x + layer(user), mask)
        return x


class RecGURU(NextItemModel):
    """What is left after training: item table, encoder and recommender."""

    def __init__(self, config: RecGURUConfig, n_items: int):
        super().__init__()
        self.config, self.n_items, self.pad = config, n_items, n_items
        self.item = nn.Embedding(n_items + 1, config.d_model, padding_idx=self.pad)
        self.encoder, self.recommender = CausalEncoder(config), Decoder(config)
        initialise(self)
        self.seen = seen_offset(config.seen_offset)

    def item_embeddings(self) -> Float[Tensor, "n_items d_model"]:
        """The item table."""
        return self.item.weight[: self.n_items]

    def states(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """The recommender's, at each item with the user vector of the items up to it."""
        x = self.item(items)
        return self.recommender(x, self.encoder(x).detach())

    def loss(self, part: Targets) -> Float[Tensor, ""]:
        """Summed over targets, the mean BPR loss against sampled items: -log sigmoid(score - sampled item's score)."""
        part = part.to(self.device)
        states = self.states(part.inputs).flatten(0, 1)[part.places]
        sampled = torch.randint(0, self.n_items, (len(states), self.config.bpr_negatives), device=states.device)
        gaps = (states * self.item(part.items)).sum(-1)[:, None] - (self.item(sampled) @ states[..., None])[..., 0]
        return F.softplus(-gaps).mean(dim=1).sum()

    # -- making and reading one ---------------------------------------------------------------------------------

    @staticmethod
    def fresh(config: Any, items: pl.DataFrame, features: TextFeatures) -> RecGURU:
        """Over these items, untrained."""
        return RecGURU(config.recguru, items.height).to(features.device)

    @staticmethod
    def restored(config: Any, items: pl.DataFrame, n_known: int, features: TextFeatures, weights: dict[str, Tensor],
                 kept: dict[str, Tensor]) -> RecGURU:
        """Ready for `weights`."""
        return RecGURU(config.recguru, n_known)

    @staticmethod
    def shapes(config: Any, n_known: int) -> dict[str, tuple[int, ...]]:
        """Of its largest weights."""
        own: RecGURUConfig = config.recguru
        return {"item.weight": (n_known + 1, own.d_model), "encoder.position.weight": (own.max_history, own.d_model),
                f"recommender.body.blocks.{own.blocks - 1}.feed.0.weight": (own.d_inner, own.d_model)}


class Recommending(SequenceTask):
    """The second phase."""

    def load(self, state: dict[str, Tensor]) -> None:
        """The model's; also from the first phase's state."""
        super().load({name: tensor for name, tensor in state.items() if not name.startswith(_EXTRA)})


class Reconstruction(nn.Module):
    """What only the first phase trains: the sequence's decoder, where it starts, and the other domain's items."""

    def __init__(self, config: RecGURUConfig, n_other: int):
        super().__init__()
        self.decoder, self.start = Decoder(config), nn.Parameter(torch.zeros(config.d_model))
        self.other = nn.Embedding(n_other + 1, config.d_model, padding_idx=n_other) if n_other else None
        initialise(self)

    def loss(self, items: Int[Tensor, "batch seq"], user: Float[Tensor, "batch d"], table: nn.Embedding, negatives: int
             ) -> Float[Tensor, ""]:
        """Sampled cross-entropies, summed over the items: each is told from `negatives` others by the decoder's state,
        which sees the items before it and the user's vector."""
        n_items = table.num_embeddings - 1
        x, real = table(items), items != n_items
        inputs = torch.cat([self.start.expand(len(x), 1, -1), x[:, :-1]], dim=1)
        states = self.decoder(inputs, user[:, None])[real]
        sampled = torch.randint(0, n_items, (len(states), negatives), device=states.device)
        vectors = torch.cat([x[real][:, None], table(sampled)], dim=1)
        logits = (vectors @ states[..., None])[..., 0]
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=x.device), reduction="sum")


class Adversary:
    """Tells the domain of a user vector: 1 for ours, 0 for the other. It learns apart from the model, by the published
    Adam, while a batch is made; its state belongs to the training's."""

    def __init__(self, config: RecGURUConfig, device: torch.device):
        self.config = config
        self.net = nn.Sequential(nn.Linear(config.d_model, config.d_inner), nn.LeakyReLU(0.2),
                                 nn.Linear(config.d_inner, 1)).to(device)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=config.adversary_lr, betas=(0.5, 0.9))

    def logits(self, users: Float[Tensor, "batch d"]) -> Float[Tensor, "batch"]:
        """Above zero: ours."""
        return self.net(users)[:, 0]

    @torch.enable_grad()
    def learn(self, own: Float[Tensor, "batch d"], other: Float[Tensor, "batch d"]) -> None:
        """Steps on the cross-entropy of both domains, with a penalty where the gradient between them is not of length
        1 (Gulrajani et al. 2017)."""
        for _ in range(self.config.adversary_steps):
            self.adam.zero_grad()
            loss = F.softplus(-self.logits(own)).mean() + F.softplus(self.logits(other)).mean()
            share = torch.rand(len(own), 1, device=own.device)
            between = (share * own + (1 - share) * other).requires_grad_()
            slope = torch.autograd.grad(self.logits(between).sum(), between, create_graph=True)[0]
            (loss + self.config.gradient_penalty * ((slope.norm(dim=1) - 1) ** 2).mean()).backward()
            self.adam.step()


@dataclass(frozen=True)
class Both:
    """A batch: as many sequences of each domain, padded, on the CPU."""

    own: Int[Tensor, "batch seq"]
    other: Int[Tensor, "batch seq_other"] | None


class Autoencoding(Trainable):
    """The first phase."""

    def __init__(self, model: RecGURU, dataset: Dataset, other: Dataset | None):
        """Raises UserError where there is nothing to learn from."""
        self.model, self.config = model, model.config
        self.own = _newest(dataset, self.config)
        self.others = None if other is None else _newest(other, self.config)
        self.extra = Reconstruction(self.config, 0 if other is None else other.n_items).to(model.device)
        self.adversary = None if other is None else Adversary(self.config, model.device)
        self.module = nn.ModuleDict({"model": model, "extra": self.extra})
        self.epoch = 0

    def begin_epoch(self, number: int) -> Autoencoding:
        """It is its own examples: all sequences."""
        self.module.train()
        self.epoch = number
        return self

    @property
    def lengths(self) -> Int[np.ndarray, "examples"]:
        """As `Examples.lengths`: items of each sequence."""
        return self.own.lengths.numpy()

    def batch(self, index: Int[np.ndarray, "batch"]) -> Both:
        """As `Examples.batch`: these sequences and as many of the other domain; the adversary learns on them."""
        own = self.own.take(index).padded(self.model.pad)
        if self.others is None or self.adversary is None or self.extra.other is None:
            return Both(own, None)
        rng = np.random.default_rng((self.config.seed, self.epoch, *index[:2].tolist()))
        drawn = self.others.take(rng.integers(0, len(self.others), len(index)))
        other = drawn.padded(self.extra.other.num_embeddings - 1)
        with torch.no_grad():
            users = self.users(own, self.model.item), self.users(other, self.extra.other)
        self.adversary.learn(*users)
        return Both(own, other)

    def users(self, items: Int[Tensor, "batch seq"], table: nn.Embedding) -> Float[Tensor, "batch d_model"]:
        """User vectors: the encoder's state at the newest item."""
        items = move(items, self.model.device)
        newest = (items < table.num_embeddings - 1).sum(dim=1) - 1
        return self.model.encoder(table(items))[torch.arange(len(items), device=items.device), newest]

    def loss(self, batch: Both, rows: Int[np.ndarray, "some"]) -> dict[str, Tensor]:
        """Reconstruction of each domain, and how far the discriminator is from being misled."""
        domains = [(batch.own, self.model.item, -1)]
        if batch.other is not None and self.extra.other is not None:
            domains.append((batch.other, self.extra.other, 1))
        rebuilt, seen_through = torch.zeros((), device=self.model.device), torch.zeros((), device=self.model.device)
        for items, table, side in domains:
            count = int((items < table.num_embeddings - 1).sum())  # on the CPU
            part = move(items[torch.as_tensor(rows)], self.model.device)
            users = self.users(part, table)
            rebuilt = rebuilt + self.extra.loss(part, users, table, self.config.negatives) / count
            if self.adversary is not None:
                wrong = F.softplus(-side * self.adversary.logits(users)).sum() / len(items)
                seen_through = seen_through + wrong
        return {"loss": rebuilt + seen_through, "reconstruction": rebuilt.detach(), "domain": seen_through.detach()}

    def scorer(self) -> RecGURU:
        """The model; its recommender is not trained yet."""
        return self.model.eval()

    def state(self) -> dict[str, Tensor]:
        """The model's, and what only this phase needs."""
        more = {f"extra.{name}": tensor for name, tensor in self.extra.state_dict().items()}
        if self.adversary is not None:
            more |= {f"net.{name}": tensor for name, tensor in self.adversary.net.state_dict().items()}
            more |= {f"adam.{name}": x for name, x in checkpoint.optimizer_tensors(self.adversary.adam).items()}
        return {**self.model.state_dict(), **{_EXTRA + name: tensor for name, tensor in more.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        more = checkpoint.part(state, _EXTRA.removesuffix("."))
        self.model.load_state_dict({name: x for name, x in state.items() if not name.startswith(_EXTRA)})
        self.extra.load_state_dict(checkpoint.part(more, "extra"))
        if self.adversary is not None:
            self.adversary.net.load_state_dict(checkpoint.part(more, "net"))
            checkpoint.restore_optimizer(self.adversary.adam, checkpoint.part(more, "adam"))


def _newest(dataset: Dataset, config: RecGURUConfig) -> Histories:
    """What the encoder reads of each training sequence that has a next item."""
    return dataset.train_sequences.take(with_next_item(dataset.train_sequences)).last(config.max_history)


def phases(model: RecGURU, dataset: Dataset) -> list[Phase]:
    """Reconstruction, then recommendation. Raises UserError where the second domain's data folder can't be read."""
    own = model.config
    other = None if own.other is None else Dataset.load(own.other)
    second = Phase("recommender", Recommending(model, dataset), own.max_epochs, own.batch_size, own.lr,
                   own.weight_decay, patience=own.patience, eval_every=own.eval_every)
    if not own.autoencoder_epochs:
        return [second]
    return [Phase("autoencoder", Autoencoding(model, dataset, other), own.autoencoder_epochs, own.batch_size, own.lr,
                  own.weight_decay, validates=False), second]
