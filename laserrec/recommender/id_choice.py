"""Which settings the ID model below Laser gets: several are fitted, and the best on validation stays."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from laserrec.config import Config
from laserrec.training.trainer import Goal, GoalMissedError
from laserrec.util.distributed import World

CLOSE = 0.95
"""Share of the best validation NDCG that an ID model must reach to be trained on. Of shuffles, on six data sets the one
that was better in the end was never more than 4% behind after six epochs (dev/LOG.md)."""
FitInto = Callable[[Path, Config, Goal | None], Any]
"""(folder, settings, goal) -> Fitted. Raises GoalMissedError where the goal is missed; called again with another goal,
it goes on from there."""


def candidates(config: Config) -> list[Config]:
    """All settings that the ID model may end with, the given ones first."""
    light = _light(config)
    return _shuffles(config) if light is None else [*_shuffles(config), light]


def choose(fit_into: FitInto, config: Config, folder: Path, world: World) -> Any:
    """Fit what `candidates` holds into folders beside `folder` (FOLDER_trials), and keep the best there, the first of
    equals. The one with little regularisation comes first: the others must come close to it in as many epochs as its
    best took, and in no fewer than patience lasts. Several shuffles are fitted for blend.shuffle_epochs, and those that
    are close to the best of them then go on to their end."""
    trials, light, found, goal = folder.with_name(folder.name + "_trials"), _light(config), {}, None
    if len(candidates(config)) == 1:
        return fit_into(folder, config, None)
    if light is not None:
        one = fit_into(trials / "light", light, None)
        found[trials / "light"] = one
        epochs = max(one.facts["training"]["kept"]["epoch"], config.id_model.patience * config.id_model.eval_every)
        goal = Goal(epochs, CLOSE * _ndcgs([one], config, world)[0])
    left = {trials / f"shuffle-{settings.id_model.shuffle:g}": settings for settings in _shuffles(config)}
    if len(left) > 1:
        reached = [_begun(fit_into, place, settings, world) for place, settings in left.items()]
        left = {place: settings for (place, settings), ndcg in zip(left.items(), reached, strict=True)
                if ndcg >= CLOSE * max(reached)}
    for place, settings in left.items():
        with contextlib.suppress(GoalMissedError):
            found[place] = fit_into(place, settings, goal)
    reached = _ndcgs(found.values(), config, world)
    place = [*found][reached.index(max(reached))]
    if world.is_main:
        shutil.copytree(place, folder, dirs_exist_ok=True)
    world.wait()
    return found[place]


def _shuffles(config: Config) -> list[Config]:
    others = [value for value in dict.fromkeys(config.blend.shuffles) if value != config.id_model.shuffle]
    return [config, *(_with(config, shuffle=value) for value in others if config.eval.validates)]


def _light(config: Config) -> Config | None:
    blend = config.blend
    if blend.light_dropout is None or not config.eval.validates:
        return None
    return _with(config, shuffle=0.0, dropout=blend.light_dropout, weight_decay=blend.light_weight_decay)


def _with(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"id_model": config.id_model.model_copy(update=settings)})


def _begun(fit_into: FitInto, place: Path, settings: Config, world: World) -> float:
    """The best validation NDCG after blend.shuffle_epochs, rounded up to a validation. The training waits there."""
    every, name = settings.id_model.eval_every, f"validation_ndcg@{settings.eval.k}"
    epochs = every * math.ceil(settings.blend.shuffle_epochs / every)
    try:
        log = fit_into(place, settings, Goal(epochs, math.inf)).log or []
    except GoalMissedError as waiting:
        log = waiting.log
    return world.told(lambda: max((e[name] for e in log if e["epoch"] <= epochs and name in e), default=0.0))


def _ndcgs(found: Iterable[Any], config: Config, world: World) -> list[float]:
    """As the first process has them: others may round differently, and all must choose alike."""
    name = f"validation_ndcg@{config.eval.k}"
    return world.told(lambda: [fitted.facts["training"]["kept"].get(name, 0.0) for fitted in found])
