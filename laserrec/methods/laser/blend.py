"""How much each part of a score counts, chosen on validation users after training (not in the paper).

What a data set rewards differs: item texts say much about tools and little about films. Nothing here trains; it weighs
what is there. The choice is made on each user's likely items alone, so that one trial takes milliseconds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_TOP = 100
"""Best items of each part among a user's candidates. The best ten of a blend are nearly always among them."""
_ANY = 50
"""Other items, drawn at random, so that the candidates show what most items are like."""


@dataclass(frozen=True)
class Blend:
    """Weights of the parts."""

    id_share: float
    """Of the ID model's cosine; the text's gets the rest."""
    share: float | None
    """Of the cosines relative to the neighbours; None: no neighbours."""
    temperature: float
    """At which cosines and neighbours are combined."""
    seen_offset: float
    """Added to the scores of items in the history."""


Grid = dict[tuple[str, ...], list[tuple[Any, ...]]]
"""Settings that are chosen together -> their values."""


def full_grid(ids: bool, neighbours: bool, seen: bool) -> Grid:
    """All values that are tried, for the parts that are there."""
    grid: Grid = {}
    if neighbours:
        temperatures = (0.03, 0.05, 0.07, 0.1, 0.14, 0.2)
        shares = (0.001, 0.03, 0.1, 0.3, 0.7, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
        grid["share", "temperature"] = [(None, temperatures[0]), *itertools.product(shares, temperatures)]
    if ids:
        grid["id_share",] = [*((tenth / 10,) for tenth in range(10)), (0.95,)]
    if seen:
        sizes = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0)
        grid["seen_offset",] = [(0.0,), *((sign * size,) for size in sizes for sign in (-1, 1))]
    return grid


@dataclass(frozen=True)
class Cosines:
    """Of the parts of users and items, zero where one has no such part."""

    text: Float[Tensor, "users items"]
    """Of the text parts."""
    ids: Float[Tensor, "users items"]
    """Of the ID parts."""
    has_text: Bool[Tensor, "users"]
    """Users with a text part."""
    has_ids: Bool[Tensor, "users"]
    """Users with an ID part."""
    item_text: Bool[Tensor, "#users items"]
    """Items with a text part."""
    lent: Bool[Tensor, "#users items"]
    """Items whose ID part is inherited. It stands beside a text part of length one."""

    def weighed(self, id_share: float) -> tuple[Float[Tensor, "users items"], Float[Tensor, "users items"]]:
        """What text parts and ID parts add to the cosines of whole embeddings, which are of length one with both parts
        or with one alone."""
        text, ids = (1 - id_share) ** 0.5, id_share**0.5
        user_text, user_ids = _of_length_one(text * self.has_text[:, None], ids * self.has_ids[:, None])
        if not self._whole_items:
            alone = 1.0 if id_share < 1 else 0.0
            texts = self.item_text * torch.where(self.lent, alone, text)
            text, ids = _of_length_one(texts, texts.new_tensor(ids))
        return user_text * text * self.text, user_ids * ids * self.ids

    @cached_property
    def _whole_items(self) -> bool:
        return bool(self.item_text.all()) and not bool(self.lent.any())


def _of_length_one(text: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of two parts, scaled so that both together have length one."""
    whole = (text.square() + ids.square()).sqrt().clamp(min=1e-12)
    return text / whole, ids / whole


@dataclass(frozen=True)
class Candidates(Cosines):
    """Validation users' likely items, part by part. Column 0 is the target. A user of several validation interactions,
    as there are after a temporal split, counts as several users."""

    boosts: Float[Tensor, "users candidates"]
    """Sums of neighbour weights."""
    seen: Bool[Tensor, "users candidates"]
    """Items of the history."""
    real: Bool[Tensor, "users candidates"]
    """False where an item stands a second time."""
    items: Int[Tensor, "users candidates"]
    """Their rows."""
    lengths: Int[Tensor, "users"]
    """Items of the histories."""
    who: Int[Tensor, "users"]
    """Whose history it is."""
    background: Cosines
    """Of some training users with all items, which set the neighbours' scale."""

    @cached_property
    def found(self) -> Bool[Tensor, "users"]:
        """Users whose target is among their likely items by itself."""
        return (self.items[:, 1:] == self.items[:, :1]).any(dim=1)

    @cached_property
    def log_boosts(self) -> Float[Tensor, "users candidates"]:
        """Minus infinity where there is no boost."""
        return self.boosts.log()

    def take(self, rows: Int[Tensor, "some"]) -> Candidates:
        """Some of the users."""
        parts = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "background"}
        return replace(self, **parts)

    def ndcg(self, blend: Blend, k: int = 10) -> Float[Tensor, "users"]:
        """Of each user's target; tied items share the mean of their ranks."""
        return self.ndcg_of(self.scores(blend), k)

    def ndcg_of(self, scores: Float[Tensor, "users candidates"], k: int = 10) -> Float[Tensor, "users"]:
        """The same of any scores."""
        scores = scores.masked_fill(~self.real, -torch.inf)
        target, others = scores[:, :1], scores[:, 1:]
        rank = 1 + (others > target).sum(dim=1) + 0.5 * ((others == target) & self.real[:, 1:]).sum(dim=1)
        return torch.where(rank <= k, 1 / torch.log2(rank + 1), 0.0)

    def scores(self, blend: Blend) -> Float[Tensor, "users candidates"]:
        """With all terms."""
        text, ids = self.weighed(blend.id_share)
        scores = text + ids
        if blend.share is not None:
            tau = blend.temperature
            scores = tau * torch.logaddexp(scores / tau, self.log_boosts + self._log_scale(blend))
        return scores + blend.seen_offset * self.seen

    def _log_scale(self, blend: Blend) -> Tensor:
        key = blend.id_share, blend.temperature
        if key not in self._log_sums:
            text, ids = self.background.weighed(blend.id_share)
            self._log_sums[key] = ((text + ids) / blend.temperature).logsumexp(dim=1).mean()
        return self._log_sums[key] - math.log(blend.share or 1.0)

    @cached_property
    def _log_sums(self) -> dict[tuple[float, float], Tensor]:
        """Of the background's softmax, by ID share and temperature."""
        return {}


def gather_candidates(
    targets: Int[Tensor, "users"], text: Float[Tensor, "users items"], ids: Float[Tensor, "users items"],
    boosts: Float[Tensor, "users items"], seen: Bool[Tensor, "users items"],
) -> tuple[Tensor, ...]:
    """(text, ids, boosts, seen, real, items) of some users' candidates: the target, the best items by text, by ID,
    by both and by neighbours, seen ones, and some others, the same at every call."""
    users, n_items = text.shape
    tops = [part.topk(min(_TOP, n_items), dim=1).indices for part in (text, ids, text + ids, boosts, seen.float())]
    drawn = torch.randint(n_items, (users, _ANY), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([targets[:, None], *tops, drawn.to(targets.device)], dim=1)
    order = rows.sort(dim=1, stable=True)
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
    real = torch.empty_like(again).scatter_(1, order.indices, ~again)
    return *(part.gather(1, rows) for part in (text, ids, boosts, seen)), real, rows


def search(candidates: Candidates, start: Blend, grid: Grid, trials: int) -> tuple[Blend, Float[Tensor, "users"]]:
    """Coordinate ascent of mean NDCG@10 from `start`, until nothing improves or `trials` are used up; the best blend
    and its users' NDCG. Of equal blends the first tried stays."""
    best, found, improved = start, candidates.ndcg(start), True
    while improved and trials > 0:
        improved = False
        for names, values in grid.items():
            tried = [replace(best, **dict(zip(names, each, strict=True))) for each in values][: max(0, trials)]
            trials -= len(tried)
            for blend in tried:
                ndcg = candidates.ndcg(blend)
                if ndcg.mean() > found.mean() + 1e-6:
                    best, found, improved = blend, ndcg, True
    return best, found


_STEPS = (0.0, 0.25, 0.5, 0.75)
"""Of the way from the start to the best blend."""
_CLOSED_SHARE, _CLOSED_TEMPERATURE = 2.0, 0.14
"""Of the cosines, where the closed form leads."""
_ID_SHARES = (0.3, 0.6)
"""Of the further starts of the search."""
_GIVEN_UP = 0.01
"""Of NDCG, for more of the closed form."""


def shrunken(candidates: Candidates, start: Blend, best: Blend, most: float = 1.0
             ) -> tuple[Blend, Float[Tensor, "users"]]:
    """The blend nearest to `start`, on the way from it to `best`, that is within a standard error of `best` (Breiman et
    al. 1984, the rule of one standard error): what is better by chance alone is not followed. A part that `best` drops
    stays dropped. The start should be what suits most data. most: share of the NDCG that may be lost."""
    found = candidates.ndcg(best)
    for step in _STEPS:
        blend = _between(start, best, step)
        ndcg = candidates.ndcg(blend)
        lost = found - ndcg
        if lost.mean() <= min(lost.std() / len(lost) ** 0.5, most * found.mean()):
            return blend, ndcg
    return best, found


def towards_closed_form(candidates: Candidates, best: Blend) -> tuple[Blend, Float[Tensor, "users"]]:
    """A blend in which the neighbours count more, if it is no worse than `best` by more than a standard error and a
    hundredth. What is trained by gradient loses more from validation to later interactions than a closed form does,
    which validation can't show."""
    if best.share is None or best.share <= _CLOSED_SHARE:
        return best, candidates.ndcg(best)
    return shrunken(candidates, replace(best, share=_CLOSED_SHARE), best, _GIVEN_UP)


def _between(start: Blend, best: Blend, step: float) -> Blend:
    def level(name: str) -> float:
        one, other = getattr(start, name), getattr(best, name)
        return one + (other - one) * step if other else 0.0

    def ratio(name: str) -> float:
        one, other = getattr(start, name), getattr(best, name)
        return one * (other / one) ** step

    share = best.share if best.share is None or start.share is None else ratio("share")
    return Blend(level("id_share"), share, ratio("temperature"), level("seen_offset"))


def search_guarded(candidates: Candidates, start: Blend, grid: Grid, trials: int
                   ) -> tuple[Blend, Float[Tensor, "users"]]:
    """As `search`, but `start` where such a search does not help users that it has not seen: it is run on each half of
    the users and judged on the other."""
    best, found = search(candidates, start, grid, trials)
    halves = torch.arange(len(found), device=found.device).split((len(found) + 1) // 2)
    if len(halves) < 2:
        return start, candidates.ndcg(start)
    gain = 0.0
    for chosen_on, judged_on in (halves, halves[::-1]):
        blend, _ = search(candidates.take(chosen_on), start, grid, trials)
        others = candidates.take(judged_on)
        gain += float((others.ndcg(blend) - others.ndcg(start)).sum())
    return (best, found) if gain > 0 else (start, candidates.ndcg(start))


def choose(candidates: Candidates, start: Blend, grid: Grid, trials: int) -> tuple[Blend, Float[Tensor, "users"]]:
    """The blend to take and its users' NDCG: the best one found from `start`, drawn back to it, or the best one from
    other starts, where the closed form leads, if that is better by more than a standard error; then towards the closed
    form. Each search has at most `trials` trials, and from one start alone it may end at a local optimum."""
    best, _ = search_guarded(candidates, start, grid, trials)
    best, ndcg = shrunken(candidates, start, best)
    for share in () if start.share is None else _ID_SHARES if start.id_share else (0.0,):
        closed = replace(start, id_share=share, share=_CLOSED_SHARE, temperature=_CLOSED_TEMPERATURE)
        other, found = search_guarded(candidates, closed, grid, trials)
        gain = found - ndcg
        if gain.mean() > gain.std() / len(gain) ** 0.5:
            best, ndcg = other, found
    return towards_closed_form(candidates, best)
