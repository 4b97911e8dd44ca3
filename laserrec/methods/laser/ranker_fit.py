"""Training the ranker on validation users, and whether to keep it (laserrec.methods.laser.ranker)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from laserrec.methods.laser.blend import Blend, Candidates
from laserrec.methods.laser.ranker import Parts, Ranker
from laserrec.util.device import seeded
from laserrec.util.progress import Progress

_FOLDS = 3
_EPOCHS, _MOST_STEPS = 100, 1_600
"""Fewer epochs where they would take more steps."""
_BATCH, _LR, _DECAY = 256, 1e-2, 0.1
_WARMUP = 0.1
_FEWEST_USERS = 300
"""Whose targets are among the items that are trained on. With fewer no network is trained."""
_BEST, _BEST_SEEN = 150, 50
"""Items by the blend that a user is trained on, beside the target: unseen and seen ones."""


@dataclass(frozen=True)
class Inputs:
    """What the network reads beside the parts of the blend: of all items, and of the users' likely ones (`Parts`)."""

    popularity: Float[Tensor, "n_items"]
    recency: Float[Tensor, "n_items"]
    last_text: Float[Tensor, "users candidates"]
    last_ids: Float[Tensor, "users candidates"]
    last_boosts: Float[Tensor, "users candidates"]


@dataclass(frozen=True)
class _Examples:
    """Users' likely items. Column 0 is the target."""

    features: Float[Tensor, "users candidates features"]
    """Standardised."""
    scores: Float[Tensor, "users candidates"]
    """Of the blend."""
    real: Bool[Tensor, "users candidates"]


def fit_ranker(candidates: Candidates, blend: Blend, inputs: Inputs, hidden: int, progress: bool = False
               ) -> tuple[Ranker | None, dict[str, Any]]:
    """A ranker behind `blend`, and {users, blend, network, kept}: NDCG@10 of both on users that the network was not
    trained on.

    It minimises the cross-entropy of the softmax over the blend's best items for a user, for those whose target is
    among them. Judged by cross-fitting: trained on two thirds of the users, it ranks for the others. None where it is
    worse than the blend by more than two standard errors there. The doubt is in its favour: the blend's settings were
    chosen on all of these users, the networks that are judged see two thirds of them, and what is met later gains more.
    The same for the same input.
    """
    ranker, examples = _prepared(candidates, blend, inputs, hidden)
    best, among = _best(examples, candidates.seen)
    cases = (candidates.found & among).nonzero()[:, 0]
    people, of = torch.unique(candidates.who, return_inverse=True)
    if len(torch.unique(of[cases])) < _FEWEST_USERS:
        return None, {}
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(0)).to(of.device)
    with_network = torch.zeros(len(of), device=of.device)
    with Progress("training the ranking network", _FOLDS + 1, progress) as bar:
        for fold in order.tensor_split(_FOLDS):
            left_out = torch.isin(of, fold)
            _train(ranker, best, cases[~left_out[cases]])
            with_network[left_out] = candidates.ndcg_of(_ranked(ranker, examples))[left_out]
            bar.advance(1)
        _train(ranker, best, cases)
        bar.advance(1)
    with_network, without = with_network * candidates.found, candidates.ndcg(blend) * candidates.found
    told = {"users": len(people), "blend": round(float(without.mean()), 5),
            "network": round(float(with_network.mean()), 5),
            "kept": not _worse(with_network - without)}
    return (ranker.requires_grad_(False) if told["kept"] else None), told


def _worse(gain: Float[Tensor, "users"]) -> bool:
    """Beyond chance: by more than two standard errors."""
    return float(gain.mean()) < -2 * float(gain.std()) / len(gain) ** 0.5


def _prepared(candidates: Candidates, blend: Blend, inputs: Inputs, hidden: int) -> tuple[Ranker, _Examples]:
    ranker = Ranker(len(inputs.popularity), hidden).to(inputs.popularity.device)
    ranker.popularity.copy_(inputs.popularity)
    ranker.recency.copy_(inputs.recency)
    text, ids = candidates.weighed(blend.id_share)
    neighbours = 0.0 if blend.share is None else 1.0
    parts = Parts(text, ids, inputs.last_text, inputs.last_ids, neighbours * candidates.boosts,
                  neighbours * inputs.last_boosts, candidates.seen, ranker.popularity[candidates.items],
                  ranker.recency[candidates.items], candidates.lengths[:, None])
    features = parts.features()
    ranker.standardise(features[candidates.real])
    return ranker, _Examples(ranker.standardised(features), candidates.scores(blend), candidates.real)


def _best(examples: _Examples, seen: Bool[Tensor, "users candidates"]) -> tuple[_Examples, Bool[Tensor, "users"]]:
    """Of each user the target, the best unseen items by the blend and the best seen ones, and whether the target is as
    good as these unseen ones. Seen ones always: where the blend puts them last, the network must have learnt to leave
    them there."""
    scores = examples.scores.masked_fill(~examples.real, -torch.inf)
    others, own = scores[:, 1:], seen[:, 1:]
    longest = int((own & examples.real[:, 1:]).sum(dim=1).max())
    unseen = others.masked_fill(own, -torch.inf).topk(min(_BEST, others.shape[1]), dim=1)
    known = others.masked_fill(~own, -torch.inf).topk(min(_BEST_SEEN, longest), dim=1)
    target = torch.zeros_like(unseen.indices[:, :1])
    columns = torch.cat([target, 1 + unseen.indices, 1 + known.indices], dim=1)
    real = torch.cat([examples.real[:, :1], unseen.values > -torch.inf, known.values > -torch.inf], dim=1)
    features = examples.features.gather(1, columns[..., None].expand(-1, -1, examples.features.shape[-1]))
    return _Examples(features, examples.scores.gather(1, columns), real), scores[:, 0] >= unseen.values[:, -1]


def _ranked(ranker: Ranker, examples: _Examples) -> Float[Tensor, "users candidates"]:
    """Scores that are no numbers count as the worst, so that a network that diverged is not kept."""
    with torch.no_grad():
        added = torch.cat([ranker(some) for some in examples.features.split(_BATCH)])
        scores = examples.scores + ranker.log_temperature.exp() * added
        return scores.masked_fill(scores.isnan(), -torch.inf)


def _train(ranker: Ranker, examples: _Examples, users: Int[Tensor, "some"]) -> None:
    """From the same start each time."""
    with seeded(ranker.popularity.device, 0), torch.enable_grad():
        ranker.reset()
        ranker.train()
        _minimise(ranker, examples, users)
    ranker.eval()


def _minimise(ranker: Ranker, examples: _Examples, users: Int[Tensor, "some"]) -> None:
    maps = [parameter for name, parameter in ranker.named_parameters() if name != "log_temperature"]
    optimizer = torch.optim.AdamW([{"params": maps, "weight_decay": _DECAY},
                                   {"params": [ranker.log_temperature], "weight_decay": 0.0}], lr=_LR)
    batches = -(-len(users) // _BATCH)
    epochs = min(_EPOCHS, -(-_MOST_STEPS // batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=epochs * batches, pct_start=_WARMUP)
    for _ in range(epochs):
        for rows in torch.randperm(len(users)).to(users.device).split(_BATCH):
            own = users[rows]
            logits = examples.scores[own] * (-ranker.log_temperature).exp() + ranker(examples.features[own])
            logits = logits.masked_fill(~examples.real[own], -torch.inf)
            loss = F.cross_entropy(logits, torch.zeros(len(own), dtype=torch.long, device=own.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
