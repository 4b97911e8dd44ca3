"""The last step of a fit: weigh Laser's parts by validation users, and tell what each of them gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.config import BlendConfig, Config, NeighboursConfig
from laserrec.data.dataset import Cases
from laserrec.data.histories import Histories
from laserrec.methods.laser.blend import Blend, Candidates, Cosines, choose, full_grid, gather_candidates, search
from laserrec.methods.laser.ranker import Ranker, recency
from laserrec.methods.laser.ranker_fit import Inputs, fit_ranker
from laserrec.methods.laser.sides import SummedUsers
from laserrec.methods.laser.task import LaserTask
from laserrec.methods.neighbours import Neighbours, multiplications
from laserrec.util.memory import rows_at_once
from laserrec.util.progress import Progress

_FEWEST_USERS = 50
"""With fewer validation users nothing is chosen."""
_WORK = 3e13
"""Multiplications that may be spent on regressions: sixteen of 12,000 items."""
_RANKED_ITEMS = 100_000
"""With more no ranker is trained: it would score all items of a large catalogue for each user."""
_ALONE = 0.001
"""Share of the cosines at which the neighbours alone decide."""
_LADDERS: dict[str, tuple[float, ...]] = {
    "order": (0.0, 0.2, 0.5, 0.8, 1.0), "decay": (1.0, 0.9, 0.8, 0.6, 0.4),
    "text_weight": (0.0, 0.25, 1.0, 4.0, 16.0, 64.0), "l2": (3200.0, 1600.0, 800.0, 400.0, 200.0, 100.0, 50.0, 25.0),
    "row_power": (0.0, 0.5, 1.0), "length_power": (1.0, 0.5, 0.0)}
"""Settings of the regression that are tried, first in this direction and then in the other."""


@torch.no_grad()
def choose_blend(task: LaserTask, progress: bool = False) -> tuple[Config, dict[str, Any]]:
    """Weigh the parts of a fitted Laser and change it accordingly; the config that it has then, and what was found:
    {users, chosen, ndcg@10: {given, chosen, without ...}, network}. Parts that do not help are dropped. Every process
    of several chooses alike."""
    config, dataset = task.module.config, task.dataset
    cases = dataset.cases("validation").sample(config.blend.users)
    if not config.eval.validates or not config.blend.trials or len(cases) < _FEWEST_USERS:
        return config, {}
    task.module.eval()
    parts = _Parts(task, cases, progress)
    chosen = parts.choose(config.blend)
    report = {"users": len(cases), "chosen": {**vars(chosen.blend), **chosen.regression()},
              "ndcg@10": parts.report(chosen, config.blend.trials)}
    config = _apply(task, chosen)
    if config.blend.network and dataset.n_items <= _RANKED_ITEMS:
        task.module.ranker, told = _ranker(task, chosen, config.blend, progress)
        report |= {"network": told} if told else {}
    return config, report


def _ranker(task: LaserTask, chosen: _Choice, settings: BlendConfig, progress: bool
            ) -> tuple[Ranker | None, dict[str, Any]]:
    """Of several processes the first one trains it."""
    device, hidden = task.module.device, settings.network
    cases = task.dataset.cases("validation").sample(settings.network_users)

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        candidates = chosen.candidates
        if len(cases) != len(candidates.lengths):  # else they are the same users
            candidates = _Parts(task, cases, progress, "reading users for the network").candidates(chosen.neighbours)
            task.module.set_id_share(chosen.blend.id_share)
        inputs = _inputs(task, cases.histories, candidates.items)
        ranker, told = fit_ranker(candidates, chosen.blend, inputs, hidden, progress)
        return ({} if ranker is None else dict(ranker.state_dict())), told

    weights, told = task.world.from_main(make)
    if not weights:
        return None, told
    ranker = Ranker(task.dataset.n_items, hidden).to(device)
    ranker.load_state_dict(weights)
    return ranker.eval().requires_grad_(False), told


def _inputs(task: LaserTask, histories: Histories, items: Int[Tensor, "users candidates"]) -> Inputs:
    """From the model as it will score."""
    laser, sequences, n_items = task.module, task.dataset.train_sequences, task.dataset.n_items
    newest, d, text, ids, boosts = laser.newest(histories), laser.d_text, [], [], []
    for user, rows in enumerate(items):
        last, vectors = newest.vectors[user], laser.vectors[rows]
        text.append(vectors[:, :d] @ last[:d])
        ids.append(vectors[:, d:] @ last[d:])
        boosts.append(torch.zeros_like(text[-1]) if newest.boosts is None else newest.boosts.at(user, rows))
    popularity = torch.bincount(sequences.items, minlength=n_items).float().to(laser.device)
    return Inputs(popularity, recency(sequences, n_items).to(laser.device), *map(torch.stack, (text, ids, boosts)))


@dataclass(frozen=True)
class _Choice:
    neighbours: Neighbours | None
    candidates: Candidates
    blend: Blend
    ndcg: Float[Tensor, "users"]

    def regression(self) -> dict[str, float]:
        """Settings of the neighbours, if there are any."""
        if self.blend.share is None or self.neighbours is None:
            return {}
        return {name: getattr(self.neighbours.config, name) for name in _LADDERS}


class _Parts:
    """A fitted Laser's parts for some validation users."""

    def __init__(self, task: LaserTask, cases: Cases, progress: bool, title: str = "weighing the parts"):
        self.task, self.cases, self.progress = task, cases, progress
        self.laser, self.config = task.module, task.module.config
        self.has_ids = self.laser.ids.model is not None
        if self.has_ids:
            self.laser.set_id_share(0.5)
        self.batch = rows_at_once(len(self.laser.vectors), self.config.eval.batch_size)
        items = torch.arange(len(self.laser.vectors), device=self.laser.device)
        self.item_text = self.laser.vectors[:, : self.laser.d_text].any(dim=1)
        self.lent = ~self.laser.ids.knows(items) & self.has_ids
        self.grid = full_grid(self.has_ids, self.laser.neighbours is not None, self.laser.seen is not None)
        with Progress(title, len(cases), progress) as bar:
            self.users = self._users(cases.histories, bar.advance)
        self.background = self._cosines(self._users(task.scale_histories()))

    def _users(self, histories: Histories, advance: Callable[[int], None] = lambda count: None) -> Tensor:
        found = []
        for rows in torch.arange(len(histories)).split(self.batch):
            found.append(self.laser.users(histories.take(rows)))
            advance(len(rows))
        return torch.cat(found)

    def _cosines(self, users: Float[Tensor, "some d_out"]) -> Cosines:
        """With all items."""
        d, unit, items = self.laser.d_text, torch.nn.functional.normalize, self.laser.vectors
        text = unit(users[:, :d], dim=-1) @ unit(items[:, :d], dim=-1).T
        ids = unit(users[:, d:], dim=-1) @ unit(items[:, d:], dim=-1).T if self.has_ids else torch.zeros_like(text)
        has_ids = users[:, d:].any(dim=1) if self.has_ids else torch.zeros_like(users[:, 0], dtype=torch.bool)
        return Cosines(text, ids, users[:, :d].any(dim=1), has_ids, self.item_text[None], self.lent[None])

    def candidates(self, neighbours: Neighbours | None, users: Tensor | None = None) -> Candidates:
        """users: vectors in place of the model's own."""
        users, found, own = self.users if users is None else users, [], []
        lengths = self.cases.histories.lengths
        for rows in torch.arange(len(self.cases)).split(self.batch):
            whole = self._cosines(users[rows.to(users.device)])
            histories = self.cases.histories.take(rows)
            boosts, seen = torch.zeros_like(whole.text), torch.zeros_like(whole.text, dtype=torch.bool)
            if neighbours is not None:
                term = neighbours.on(histories)
                boosts[term.pairs.users, term.pairs.items] = term.values
            pairs = histories.distinct().to(seen.device)
            seen[pairs.users, pairs.items] = True
            targets = self.cases.targets[rows].to(seen.device)
            found.append(gather_candidates(targets, whole.text, whole.ids, boosts, seen))
            own.append((whole.has_text, whole.has_ids))
        text, ids, boosts, seen, real, items = (torch.cat(part) for part in zip(*found, strict=True))
        has_text, has_ids = (torch.cat(part) for part in zip(*own, strict=True))
        return Candidates(text, ids, has_text, has_ids, self.item_text[items], self.lent[items], boosts, seen, real,
                          items, lengths.to(items.device), torch.tensor(self.cases.users, device=items.device),
                          self.background)

    # -- the choice ---------------------------------------------------------------------------------------------

    def choose(self, settings: BlendConfig) -> _Choice:
        """The regression first, on its own; then the blend."""
        laser, start = self.laser, self._start()
        neighbours, candidates = laser.neighbours, self.candidates(laser.neighbours)
        self.given = candidates.ndcg(start)
        if neighbours is not None:
            neighbours, candidates = self._best_regression(neighbours, candidates, settings.regressions)
        return _Choice(neighbours, candidates, *choose(candidates, start, self.grid, settings.trials))

    def _start(self) -> Blend:
        config, seen = self.config, self.laser.seen
        return Blend(config.head.id_share if self.has_ids else 0.0,
                     config.neighbours.share if self.laser.neighbours is not None else None,
                     config.neighbours.temperature, 0.0 if seen is None else float(seen.offset))

    def _best_regression(self, neighbours: Neighbours, candidates: Candidates, count: int
                         ) -> tuple[Neighbours, Candidates]:
        """One setting after another, rung by rung for as long as the neighbours alone gain. Alone, because what is
        trained by gradient is better on validation than on test, and a closed form hardly is: beside the former,
        validation would choose a regression that serves it."""
        self.text, self.fits, self.work = self.task.text_vectors(), count, _WORK
        with Progress("trying regressions", count, self.progress) as self.bar:
            for name, rungs in _LADDERS.items():
                if name != "text_weight" or self.text.any():
                    neighbours, candidates = self._climbed(neighbours, candidates, name, rungs)
        return neighbours, candidates

    def _climbed(self, neighbours: Neighbours, candidates: Candidates, name: str, rungs: tuple[float, ...]
                 ) -> tuple[Neighbours, Candidates]:
        """With the best rung of one setting."""
        alone = replace(self._start(), share=_ALONE)
        ndcg = candidates.ndcg(alone).mean()
        for ladder in _both_ways(rungs, getattr(neighbours.config, name)):
            gained = False
            for value in ladder:
                other = self._refitted(neighbours, neighbours.config.model_copy(update={name: value}))
                if other is None:
                    break
                own = self.candidates(other)
                if (found := own.ndcg(alone).mean()) <= ndcg:
                    break
                neighbours, candidates, ndcg, gained = other, own, found, True
            if gained:
                break
        return neighbours, candidates

    def _refitted(self, own: Neighbours, config: NeighboursConfig) -> Neighbours | None:
        """With other settings; None where they can't be afforded."""
        n_items = len(own.items)
        other = Neighbours(config, n_items).to(self.laser.device)
        if not config.order and config == own.config.model_copy(update={"decay": config.decay}):
            other.load_state_dict(own.state_dict())  # without order, the decay is no part of the regression
            return other
        work = multiplications(n_items, config, self.text.shape[1])
        if not self.fits or work > self.work:
            return None
        self.fits, self.work = self.fits - 1, self.work - work
        other.fit(self.task.dataset.train_sequences, self.text)
        self.bar.advance(1)
        return other

    # -- what each part gives -----------------------------------------------------------------------------------

    def report(self, chosen: _Choice, trials: int) -> dict[str, float]:
        """NDCG@10 on these users: as given, as chosen, and without each part, the others weighed anew."""
        found, best = chosen.candidates, chosen.blend
        out = {"given": self.given, "chosen": chosen.ndcg}
        without: dict[str, dict[str, Any]] = {}
        if best.share is not None:
            without["without neighbours"] = {"share": None}
        if best.id_share:
            without["without the ID part"] = {"id_share": 0.0}
        if (self.has_ids or best.share is not None) and found.text.any():
            without["without the text part"] = {"id_share": 1.0}
        for name, change in without.items():
            rest = {names: values for names, values in self.grid.items() if not set(names) & set(change)}
            out[name] = search(found, replace(best, **change), rest, trials)[1]
        if isinstance(side := self.laser.user_side, SummedUsers) and side.more:
            out[f"without {side.more}"] = self._sums_alone(chosen, side)
        return {name: round(float(ndcg.mean()), 5) for name, ndcg in out.items()}

    def _sums_alone(self, chosen: _Choice, side: SummedUsers) -> Tensor:
        laser = self.laser
        laser.user_side = side.sums_alone()
        try:
            users = self._users(self.cases.histories)
        finally:
            laser.user_side = side
        return self.candidates(chosen.neighbours, users).ndcg(chosen.blend)


def _both_ways(rungs: tuple[float, ...], own: float) -> tuple[list[float], list[float]]:
    """The rungs behind `own`, and those before it, nearest first."""
    down = rungs[0] > rungs[-1]
    behind = [rung for rung in rungs if (rung < own if down else rung > own)]
    return behind, [rung for rung in rungs if (rung > own if down else rung < own)][::-1]


def _apply(task: LaserTask, chosen: _Choice) -> Config:
    laser, blend, config = task.module, chosen.blend, task.module.config
    head = config.head.model_copy(update={"id_share": blend.id_share})
    neighbours = config.neighbours.model_copy(update={"count": 0})
    if blend.share is None:
        laser.neighbours = None
    elif chosen.neighbours is not None:
        neighbours = chosen.neighbours.config.model_copy(update={
            "share": blend.share, "temperature": blend.temperature, "count": config.neighbours.count})
        chosen.neighbours.config = neighbours
        laser.neighbours = chosen.neighbours
    if laser.seen is not None:
        laser.seen.offset.fill_(blend.seen_offset)
    laser.config = config.model_copy(update={"head": head, "neighbours": neighbours})
    laser.set_id_share(blend.id_share)
    task.scale_neighbours()
    return laser.config
