"""Items held out of all training: nothing of them is left there, and the text models rank them afterwards."""

import pytest
import tiny
import torch

from laserrec.config import IdModelConfig
from laserrec.experiments import coldstart, table
from laserrec.llm import text_features
from laserrec.methods.sasrec import SASRec
from laserrec.recommender import fitting
from laserrec.util.device import CPU
from laserrec.util.errors import UserError

COUNT, N_WARM = 20, 16


@pytest.fixture
def held():
    return coldstart.hold_out(tiny.planted(COUNT, 40), 0.2, seed=3)


def test_held_out_items_are_in_no_training_input(held):
    gone = set(held.full.items["item_id"][N_WARM:])
    assert held.warm.n_items == N_WARM and len(gone) == 4 and not gone & set(held.warm.items["item_id"])
    assert held.warm.items["item"].to_list() == list(range(N_WARM))
    assert held.warm.interactions["item"].max() < N_WARM
    assert len(held.warm.cases("test")) == 0
    validation = held.warm.cases("validation")
    assert int(validation.targets.max()) < N_WARM and int(validation.histories.items.max()) < N_WARM


def test_what_is_left_is_in_its_old_order(held):
    dataset, names = tiny.planted(COUNT, 40), held.full.items["item_id"]
    old = dict(zip(dataset.train_users.tolist(), dataset.train_sequences.lists(), strict=True))
    new = dict(zip(held.warm.train_users.tolist(), held.warm.train_sequences.lists(), strict=True))
    gone = set(names[N_WARM:])
    for user, sequence in old.items():
        left = [f"i{row + 1}" for row in sequence if f"i{row + 1}" not in gone]
        assert [names[row] for row in new.get(user, [])] == left
    cases = held.warm.cases("validation")
    for user, history in zip(cases.users.tolist(), cases.histories.lists(), strict=True):
        assert history == new[user]


def test_the_whole_data_set_is_only_renumbered(held):
    dataset, full = tiny.planted(COUNT, 40), held.full
    names = full.items["item_id"].to_list()
    assert full.items["item"].to_list() == list(range(COUNT))
    for a, b in zip(dataset.cases("test").histories.lists(), full.cases("test").histories.lists(), strict=True):
        assert [f"i{row + 1}" for row in a] == [names[row] for row in b]
    titles = dict(dataset.items.select("item_id", "title").iter_rows())
    assert all(titles[i] == t for i, t in full.items.select("item_id", "title").iter_rows())


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001])
def test_a_share_that_holds_out_nothing_or_all_is_refused(share):
    with pytest.raises(UserError, match="holds out"):
        coldstart.hold_out(tiny.planted(COUNT, 10), share, 0)


def test_a_text_model_scores_known_items_as_before():
    text = torch.randn(12, 8)
    config = IdModelConfig(**{**tiny.ID_MODEL.model_dump(), "items": "text", "seen_offset": True})
    model = SASRec(config, 9, text[:9]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.item.weight[model.pad] = 0
    histories = tiny.histories([0, 4, 8], [2])
    longer = coldstart.with_new_items(model, text)
    before, after = model.score(histories), longer.score(histories)
    torch.testing.assert_close(after[:, :9], before, atol=1e-4, rtol=1e-4)
    states = longer.next_item_state(longer.pad_histories(histories))
    torch.testing.assert_close(after[:, 9:], states @ model.adaptor(text[9:]).T + model.bias.mean())


def test_a_model_of_ids_alone_takes_no_new_items():
    with pytest.raises(ValueError, match="made from text"):
        coldstart.with_new_items(tiny.id_model(9), torch.randn(12, 8))


def test_histories_are_cut_from_their_old_end():
    cases = tiny.planted(COUNT, 10).cases("test")
    cut = coldstart._cut(cases, 2, 2)
    assert cut.histories.lists() == [row[-2:] for row in cases.histories.lists()]
    long = coldstart._cut(cases, 6, None)
    assert long.histories.lists() == [row for row in cases.histories.lists() if len(row) >= 6]
    assert len(long.targets) == len(long.histories)


def test_texts_are_read_once_for_all_seeds(llm_folder, monkeypatch):
    dataset, config = tiny.planted(COUNT, 10), tiny.config(llm_folder())
    features = coldstart.CatalogueFeatures(dataset, config, CPU, False)
    plain = text_features.TextFeatures(config.backbone, config.prompt, CPU)
    held = coldstart.hold_out(dataset, 0.2, 0)
    torch.testing.assert_close(features.means(held.full.items), plain.means(held.full.items), atol=1e-5, rtol=1e-4)
    part, whole = features.vectors(held.warm.items), features.vectors(held.full.items, fit_rows=N_WARM)
    torch.testing.assert_close(part, whole[:N_WARM], atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(text_features, "_means", None)
    features.means(coldstart.hold_out(dataset, 0.2, 1).full.items)


@pytest.fixture
def small(small_rivals, llm_folder):
    return tiny.config(llm_folder(), train={"stage_one_epochs": 1, "stage_two_epochs": 0})


def test_every_model_every_history_once(small, tmp_path, monkeypatch):
    fitted_on, own = [], fitting.fit
    monkeypatch.setattr(table, "fit", lambda method, data, *rest: fitted_on.append(data) or own(method, data, *rest))
    dataset = tiny.planted(15, 40)
    result = coldstart.reproduce(dataset, small, tmp_path, [0], 0.2, progress=False, device="cpu")
    rows = result["rows"]
    assert len(rows) == 4 * len(coldstart._HISTORIES) * 2
    assert all(data.n_items == 12 and data.interactions["item"].max() < 12 for data in fitted_on) and fitted_on
    new, known = (next(r for r in rows if r["model"] == "popularity" and r["target"] == target
                       and r["history"] == "all") for target in ("new", "known"))
    assert new["users"] + known["users"] == dataset.n_users and new["mrr"] < known["mrr"]

    ranked, rank = [], coldstart.rank_cases
    monkeypatch.setattr(coldstart, "rank_cases", lambda *rest: ranked.append(1) or rank(*rest))
    again = coldstart.reproduce(dataset, small, tmp_path, [0], 0.2, progress=False, device="cpu")
    assert again["rows"] == rows and not ranked
    monkeypatch.setattr(coldstart, "_HISTORIES", {"all": (1, None)})  # another way of measuring
    shorter = coldstart.reproduce(dataset, small, tmp_path, [0], 0.2, progress=False, device="cpu")
    assert len(shorter["rows"]) == 4 * 2 and len(ranked) == 4
    with pytest.raises(UserError, match="other data"):  # another share: never the old rows
        coldstart.reproduce(dataset, small, tmp_path, [0], 0.4, progress=False, device="cpu")
