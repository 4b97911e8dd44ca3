"""The last step of a fit: weigh Laser's parts by validation users, and tell what each of them gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import BlendConfig, Config, NeighboursConfig
from laserrec.data.dataset import Cases
from laserrec.data.histories import Histories
from laserrec.methods.laser.blend import (
    Blend,
    Candidates,
    Grid,
    full_grid,
    gather_candidates,
    search,
    search_guarded,
    shrunken,
)
from laserrec.methods.laser.sides import SummedUsers
from laserrec.methods.laser.task import LaserTask
from laserrec.methods.neighbours import Neighbours, is_local, multiplications
from laserrec.util.memory import rows_at_once
from laserrec.util.progress import Progress

_FEWEST_USERS = 50
"""With fewer validation users nothing is chosen."""
_WORK = 3e13
"""Multiplications that may be spent on regressions: sixteen of 12,000 items, none of more than 200,000."""
_HURDLE = 0.5
"""Standard errors that another regression must gain."""
_LADDERS: dict[str, tuple[float, ...]] = {
    "order": (0.0, 0.2, 0.5, 0.8, 1.0), "decay": (1.0, 0.9, 0.8, 0.6, 0.4),
    "text_weight": (0.0, 0.25, 1.0, 4.0, 16.0, 64.0), "l2": (3200.0, 1600.0, 800.0, 400.0, 200.0, 100.0, 50.0, 25.0),
    "row_power": (0.0, 0.5, 1.0), "length_power": (1.0, 0.5, 0.0)}
"""Settings of the regression that are tried, first in this direction and then in the other."""


@torch.no_grad()
def choose_blend(task: LaserTask, progress: bool = False) -> tuple[Config, dict[str, Any]]:
    """Weigh the parts of a fitted Laser and change it accordingly; the config that it has then, and what was found:
    {users, chosen, ndcg@10: {given, chosen, without ...}}. Parts that do not help are dropped. Every process of several
    chooses alike."""
    config, dataset = task.module.config, task.dataset
    cases = dataset.cases("validation").sample(config.blend.users)
    if not config.blend.trials or len(cases) < _FEWEST_USERS:
        return config, {}
    task.module.eval()
    parts = _Parts(task, cases, progress)
    chosen = parts.choose(config.blend)
    report = {"users": len(cases), "chosen": {**vars(chosen.blend), **chosen.regression()},
              "ndcg@10": parts.report(chosen, config.blend.trials)}
    return _apply(task, chosen), report


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

    def __init__(self, task: LaserTask, cases: Cases, progress: bool):
        self.task, self.cases, self.progress = task, cases, progress
        self.laser, self.config = task.module, task.module.config
        self.has_ids = self.laser.ids.model is not None
        if self.has_ids:
            self.laser.set_id_share(0.5)
        self.batch = rows_at_once(len(self.laser.vectors), self.config.eval.batch_size)
        self.grid = full_grid(self.has_ids, self.laser.neighbours is not None, self.laser.seen is not None)
        with Progress("weighing the parts", len(cases), progress) as bar:
            self.users = self._users(cases.histories, bar.advance)
        self.background = self._cosines(self._users(task.scale_histories()))

    def _users(self, histories: Histories, advance: Callable[[int], None] = lambda count: None) -> Tensor:
        found = []
        for rows in torch.arange(len(histories)).split(self.batch):
            found.append(self.laser.users(histories.take(rows)))
            advance(len(rows))
        return torch.cat(found)

    def _cosines(self, users: Float[Tensor, "some d_out"]) -> tuple[Tensor, Tensor]:
        """With all items, of the text parts and of the ID parts."""
        d, unit, items = self.laser.d_text, torch.nn.functional.normalize, self.laser.vectors
        text = unit(users[:, :d], dim=-1) @ unit(items[:, :d], dim=-1).T
        if not self.has_ids:
            return text, torch.zeros_like(text)
        return text, unit(users[:, d:], dim=-1) @ unit(items[:, d:], dim=-1).T

    def candidates(self, neighbours: Neighbours | None, users: Tensor | None = None) -> Candidates:
        """users: vectors in place of the model's own."""
        users, found, own = self.users if users is None else users, [], []
        for rows in torch.arange(len(self.cases)).split(self.batch):
            text, ids = self._cosines(users[rows.to(users.device)])
            histories = self.cases.histories.take(rows)
            boosts, seen = torch.zeros_like(text), torch.zeros_like(text, dtype=torch.bool)
            if neighbours is not None:
                term = neighbours.on(histories)
                boosts[term.pairs.users, term.pairs.items] = term.values
            pairs = histories.distinct().to(text.device)
            seen[pairs.users, pairs.items] = True
            targets = self.cases.targets[rows].to(text.device)
            found.append(gather_candidates(targets, text, ids, boosts, seen))
            own.append(ids.any(dim=1))
        return Candidates(*(torch.cat(part) for part in zip(*found, strict=True)), torch.cat(own), self.background)

    # -- the choice ---------------------------------------------------------------------------------------------

    def choose(self, settings: BlendConfig) -> _Choice:
        """Blend first, then the regression's settings, each with a short search of its own, then the blend again."""
        laser, trials, grid = self.laser, settings.trials, self.grid
        candidates = self.candidates(laser.neighbours)
        self.given = candidates.ndcg(self._start())
        best = _Choice(laser.neighbours, candidates, *search_guarded(candidates, self._start(), grid, trials))
        if laser.neighbours is None:
            return self._shrunken(best)
        best = self._regressions(best, settings.regressions)
        return self._shrunken(_Choice(best.neighbours, best.candidates,
                                      *search(best.candidates, best.blend, grid, trials)))

    def _shrunken(self, found: _Choice) -> _Choice:
        blend, ndcg = shrunken(found.candidates, self._start(), found.blend)
        return _Choice(found.neighbours, found.candidates, blend, ndcg)

    def _start(self) -> Blend:
        config, seen = self.config, self.laser.seen
        return Blend(config.head.id_share if self.has_ids else 0.0,
                     config.neighbours.share if self.laser.neighbours is not None else None,
                     config.neighbours.temperature, 0.0 if seen is None else float(seen.offset))

    def _regressions(self, best: _Choice, count: int) -> _Choice:
        """The regression's settings, one after another, each rung by rung for as long as validation gains. A closed
        form loses little from validation to test, so that the hurdle is low."""
        self.text, self.fits, self.work = self.task.text_vectors(), count, _WORK
        for name, rungs in _LADDERS.items():
            for ladder in _both_ways(rungs, getattr(self._of(best).config, name)):
                found = self._climb(best, name, ladder)
                gained, best = found is not best, found
                if gained:
                    break
        return best

    def _climb(self, best: _Choice, name: str, ladder: list[float]) -> _Choice:
        for value in ladder:
            config = self._of(best).config.model_copy(update={name: value})
            if (other := self._changed(best, config)) is None:
                break
            gain = other.ndcg - best.ndcg
            if gain.mean() <= _HURDLE * gain.std() / len(gain) ** 0.5:
                break
            best = other
        return best

    def _changed(self, best: _Choice, config: NeighboursConfig) -> _Choice | None:
        """With these settings of the regression, and a share that suits them; None where they can't be afforded."""
        own, n_items = self._of(best), len(self._of(best).items)
        neighbours = Neighbours(config, n_items).to(self.laser.device)
        if config == own.config.model_copy(update={"decay": config.decay}) and not config.order:
            neighbours.load_state_dict(own.state_dict())  # the decay is no part of the regression
        else:
            work = multiplications(n_items, config, self.text.shape[1])
            if not self.fits or work > self.work or (config.order and is_local(config, n_items)):
                return None
            self.fits, self.work = self.fits - 1, self.work - work
            neighbours.fit(self.task.dataset.train_sequences, self.text)
        candidates = self.candidates(neighbours)
        shares: Grid = {("share",): [((best.blend.share or 1.0) * factor,) for factor in (1.0, 0.5, 2.0)]}
        return _Choice(neighbours, candidates, *search(candidates, best.blend, shares, len(shares["share",])))

    @staticmethod
    def _of(choice: _Choice) -> Neighbours:
        assert choice.neighbours is not None
        return choice.neighbours

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
        if self.has_ids or best.share is not None:
            without["without the text part"] = {"id_share": 1.0}
        for name, change in without.items():
            rest = {names: values for names, values in self.grid.items() if not set(names) & set(change)}
            out[name] = search(found, replace(best, **change), rest, trials)[1]
        if isinstance(side := self.laser.user_side, SummedUsers) and side.reader is not None:
            out["without the LLM's reading of the history"] = self._without_pass(chosen, side)
        return {name: round(float(ndcg.mean()), 5) for name, ndcg in out.items()}

    def _without_pass(self, chosen: _Choice, side: SummedUsers) -> Tensor:
        laser = self.laser
        laser.user_side = SummedUsers(side.items, side.head, side.decay)
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
