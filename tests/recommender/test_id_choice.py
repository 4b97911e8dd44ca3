"""Which ID model stays, with trainings that only tell their validation curves."""

from types import SimpleNamespace

import pytest
import tiny

from laserrec.recommender.id_choice import candidates, choose
from laserrec.training.trainer import GoalMissedError
from laserrec.util.distributed import World

LIGHT, SHUFFLED, ORDERED = (0.0, 0.2, 0.1), (0.5, 0.6, 1.0), (0.0, 0.6, 1.0)
"""Shuffle, dropout and weight decay."""


def config(light=0.2, **blend):
    return tiny.config(None, id_model={"shuffle": 0.5, "dropout": 0.6, "weight_decay": 1.0, "max_epochs": 50,
                                       "patience": 2, "eval_every": 1},
                       blend={"shuffles": (0.0,), "shuffle_epochs": 2, "light_dropout": light, **blend})


@pytest.fixture
def chosen(tmp_path):
    """(config, curves) -> the settings that stay, and (folder, epochs trained) of all trainings."""

    def run(settings, curves):
        trained = []

        def fit_into(place, own, goal):
            one = own.id_model
            curve = curves[one.shuffle, one.dropout, one.weight_decay][: one.max_epochs]
            epochs = len(curve) if goal is None else min(len(curve), goal.epoch)
            missed = goal is not None and len(curve) > goal.epoch and max(curve[:epochs]) < goal.ndcg
            trained.append((place.relative_to(tmp_path).as_posix(), epochs if missed else len(curve)))
            if missed:
                raise GoalMissedError
            place.mkdir(parents=True, exist_ok=True)
            (place / "dropout").write_text(str(one.dropout))
            kept = {"epoch": curve.index(max(curve)) + 1, "validation_ndcg@10": max(curve)}
            facts = {"training": {"epochs": len(curve), "kept": kept}}
            return SimpleNamespace(facts=facts, config=own)

        found = choose(fit_into, settings, tmp_path / "ids", World()).config
        assert (tmp_path / "ids" / "dropout").read_text() == str(found.id_model.dropout)
        assert found in candidates(settings)
        return (found.id_model.shuffle, found.id_model.dropout, found.id_model.weight_decay), trained

    return run


def test_little_regularisation_ends_the_others(chosen):
    slow = [0.1, 0.2, 0.25, 0.26] + [0.27] * 20
    for light, epochs in (([0.3, 0.4, 0.3, 0.3], 2), ([0.3, 0.3, 0.3, 0.4, 0.3, 0.3], 4), ([0.4, 0.3, 0.3], 2)):
        best, trained = chosen(config(), {LIGHT: light, SHUFFLED: [0.1] * 9, ORDERED: slow})
        assert best == LIGHT
        assert trained == [("ids_trials/light", len(light)), ("ids_trials/first/shuffle-0.5", 2),
                           ("ids_trials/first/shuffle-0", 2), ("ids_trials/whole/shuffle-0", epochs)]


@pytest.mark.parametrize(("late", "best"), [(0.41, ORDERED), (0.4, LIGHT), (0.39, LIGHT)])
def test_one_that_keeps_close_is_trained_to_its_end(chosen, late, best):
    found, trained = chosen(config(), {LIGHT: [0.3, 0.3, 0.3, 0.4, 0.3, 0.3], SHUFFLED: [0.1] * 9,
                                       ORDERED: [0.1, 0.2, 0.3, 0.381, 0.385, late]})
    assert found == best and trained[-1] == ("ids_trials/whole/shuffle-0", 6)


def test_without_the_light_one_the_last_is_fitted_in_place(chosen):
    found, trained = chosen(config(None), {SHUFFLED: [0.1, 0.4, 0.5], ORDERED: [0.3, 0.3, 0.9]})
    assert found == SHUFFLED and trained[-1] == ("ids", 3) and len(trained) == 3
    found, trained = chosen(config(0.2, shuffles=(), light_weight_decay=0.3), {
        (0.0, 0.2, 0.3): [0.1, 0.1], SHUFFLED: [0.1, 0.2]})
    assert found == SHUFFLED and [place for place, _ in trained] == ["ids_trials/light", "ids_trials/whole/shuffle-0.5"]


def test_nothing_is_tried_where_nothing_is_validated():
    settings = config()
    blind = settings.model_copy(update={"eval": settings.eval.model_copy(update={"validates": False})})
    assert candidates(blind) == [blind] and len(candidates(settings)) == 3
