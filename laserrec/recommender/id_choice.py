"""Which settings the ID model below Laser gets: several are fitted, and the best on validation stays."""

from __future__ import annotations

import contextlib
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
"""(folder, settings, goal) -> Fitted. Raises GoalMissedError where the goal is missed."""


def candidates(config: Config) -> list[Config]:
    """All settings that the ID model may end with, the given ones first."""
    light = _light(config)
    return _shuffles(config) if light is None else [*_shuffles(config), light]


def choose(fit_into: FitInto, config: Config, folder: Path, world: World) -> Any:
    """Fit what `candidates` holds into folders beside `folder` (FOLDER_trials), and keep the best there, the first of
    equals. The one with little regularisation comes first: the others must come close to it in as many epochs as its
    best took, and in no fewer than patience lasts. Of several shuffles, those that are close to the best of them after
    blend.shuffle_epochs are fitted to their end."""
    trials, light, found, goal = folder.with_name(folder.name + "_trials"), _light(config), {}, None
    if light is not None:
        one = fit_into(trials / "light", light, None)
        found[trials / "light"] = one
        epochs = max(one.facts["training"]["kept"]["epoch"], config.id_model.patience * config.id_model.eval_every)
        goal = Goal(epochs, CLOSE * _ndcgs([one], config, world)[0])
    left = _shuffles(config)
    if len(left) > 1:
        epochs = min(config.blend.shuffle_epochs, config.id_model.max_epochs)
        short = [fit_into(trials / "first" / _name(settings), _with(settings, max_epochs=epochs), None)
                 for settings in left]
        reached = _ndcgs(short, config, world)
        left = [settings for settings, ndcg in zip(left, reached, strict=True) if ndcg >= CLOSE * max(reached)]
    if len(left) == 1 and light is None:
        return fit_into(folder, left[0], None)
    for settings in left:
        place = trials / "whole" / _name(settings)
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


def _name(settings: Config) -> str:
    return f"shuffle-{settings.id_model.shuffle:g}"


def _ndcgs(found: Iterable[Any], config: Config, world: World) -> list[float]:
    """As the first process has them: others may round differently, and all must choose alike."""
    name = f"validation_ndcg@{config.eval.k}"
    return world.told(lambda: [fitted.facts["training"]["kept"].get(name, 0.0) for fitted in found])
