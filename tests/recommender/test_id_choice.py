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
    """(config, curves) -> the settings that stay, and folder -> epochs trained."""

    def run(settings, curves):
        trained, calls = {}, []

        def fit_into(place, own, goal):
            one, name = own.id_model, place.relative_to(tmp_path).as_posix()
            curve = [ndcg if epoch % one.eval_every == 0 else None  # no validation
                     for epoch, ndcg in enumerate(curves[one.shuffle, one.dropout, one.weight_decay], start=1)]
            epochs = trained.get(name, 0)  # a training goes on from where it stands
            while epochs < len(curve) and not (
                    goal is not None and epochs >= goal.epoch and best(curve[:epochs]) < goal.ndcg):
                epochs += 1
            trained[name] = epochs
            calls.append(name)
            log = [{"epoch": epoch, "validation_ndcg@10": ndcg} if ndcg is not None else {"epoch": epoch}
                   for epoch, ndcg in enumerate(curve[:epochs], start=1)]
            if epochs < len(curve):
                raise GoalMissedError(log)
            place.mkdir(parents=True, exist_ok=True)
            (place / "dropout").write_text(str(one.dropout))
            kept = next(e for e in log if e.get("validation_ndcg@10") == best(curve))
            return SimpleNamespace(facts={"training": {"epochs": len(curve), "kept": kept}}, config=own, log=log)

        def best(curve):
            return max(ndcg for ndcg in curve if ndcg is not None)

        found = choose(fit_into, settings, tmp_path / "ids", World()).config
        assert (tmp_path / "ids" / "dropout").read_text() == str(found.id_model.dropout)
        assert found in candidates(settings)
        once, reached = dict(trained), [*calls]  # all of it again, from the folders: the same choice, nothing trained
        assert choose(fit_into, settings, tmp_path / "ids", World()).config == found
        assert trained == once and calls == reached * 2
        return (found.id_model.shuffle, found.id_model.dropout, found.id_model.weight_decay), trained

    return run


def test_little_regularisation_ends_the_others(chosen):
    slow = [0.1, 0.2, 0.25, 0.26] + [0.27] * 20
    for light, epochs in (([0.3, 0.4, 0.3, 0.3], 2), ([0.3, 0.3, 0.3, 0.4, 0.3, 0.3], 4), ([0.4, 0.3, 0.3], 2)):
        best, trained = chosen(config(), {LIGHT: light, SHUFFLED: [0.1] * 9, ORDERED: slow})
        assert best == LIGHT
        assert trained == {"ids_trials/light": len(light), "ids_trials/shuffle-0.5": 2, "ids_trials/shuffle-0": epochs}


@pytest.mark.parametrize(("late", "best"), [(0.41, ORDERED), (0.4, LIGHT), (0.39, LIGHT)])
def test_one_that_keeps_close_is_trained_to_its_end(chosen, late, best):
    found, trained = chosen(config(), {LIGHT: [0.3, 0.3, 0.3, 0.4, 0.3, 0.3], SHUFFLED: [0.1] * 9,
                                       ORDERED: [0.1, 0.2, 0.3, 0.381, 0.385, late]})
    assert found == best and trained["ids_trials/shuffle-0"] == 6 and trained["ids_trials/shuffle-0.5"] == 2


def test_a_shuffle_that_is_close_goes_on_and_may_win(chosen):
    """What one reaches later than shuffle_epochs doesn't end the others, also when the choice is made again."""
    curves = {SHUFFLED: [0.1, 0.4, 0.5, 0.9], ORDERED: [0.3, 0.39, 0.91]}
    assert chosen(config(None), curves) == (ORDERED, {"ids_trials/shuffle-0.5": 4, "ids_trials/shuffle-0": 3})


@pytest.mark.parametrize(("behind", "epochs"), [(0.95, 3), (0.94, 2)])
def test_a_shuffle_that_is_far_behind_is_given_up(chosen, behind, epochs):
    """More than 5% below the best one after shuffle_epochs."""
    _, trained = chosen(config(None), {SHUFFLED: [0.1, 1.0, 1.0], ORDERED: [0.1, behind, 9.0]})
    assert trained["ids_trials/shuffle-0"] == epochs


def test_validations_at_a_distance(chosen):
    settings = config(None)
    rare = settings.model_copy(update={"id_model": settings.id_model.model_copy(update={"eval_every": 3})})
    found, trained = chosen(rare, {SHUFFLED: [0.9, 0.9, 0.2, 0.2, 0.2, 0.2], ORDERED: [0.1, 0.1, 0.3, 0.3, 0.3, 0.4]})
    assert found == ORDERED and trained == {"ids_trials/shuffle-0.5": 3, "ids_trials/shuffle-0": 6}


def test_one_ends_before_the_comparison(chosen):
    found, trained = chosen(config(None, shuffle_epochs=4), {SHUFFLED: [0.5, 0.4], ORDERED: [0.1, 0.2, 0.3, 0.4, 0.9]})
    assert found == SHUFFLED and trained == {"ids_trials/shuffle-0.5": 2, "ids_trials/shuffle-0": 4}


def test_what_is_tried_where_there_is_less(chosen):
    found, trained = chosen(config(None), {SHUFFLED: [0.1, 0.4, 0.5], ORDERED: [0.3, 0.3, 0.9]})
    assert found == SHUFFLED and trained == {"ids_trials/shuffle-0.5": 3, "ids_trials/shuffle-0": 2}
    found, trained = chosen(config(None, shuffles=()), {SHUFFLED: [0.1, 0.4, 0.5]})
    assert found == SHUFFLED and trained == {"ids": 3}


def test_other_regularisation_of_the_light_one(chosen):
    found, trained = chosen(config(0.2, shuffles=(), light_weight_decay=0.3), {
        (0.0, 0.2, 0.3): [0.1, 0.1], SHUFFLED: [0.1, 0.2]})
    assert found == SHUFFLED and [*trained] == ["ids_trials/light", "ids_trials/shuffle-0.5"]


def test_nothing_is_tried_where_nothing_is_validated():
    settings = config()
    blind = settings.model_copy(update={"eval": settings.eval.model_copy(update={"validates": False})})
    assert candidates(blind) == [blind] and len(candidates(settings)) == 3
