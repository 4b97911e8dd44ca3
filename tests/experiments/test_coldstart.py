"""Items held out of all training: nothing of them is left there, and the text models rank them afterwards."""

import numpy as np
import pytest
import tiny
import torch

from laserrec.config import IdModelConfig
from laserrec.experiments import coldstart
from laserrec.llm.text_features import text_vectors
from laserrec.methods.sequence import make_id_model
from laserrec.util.errors import UserError


def test_held_out_items_are_in_no_training_input():
    dataset = tiny.planted(20, 40)
    held = coldstart.hold_out(dataset, 0.2, seed=3)
    gone = set(held.full.items["item_id"][16:])
    assert held.warm.n_items == 16 and len(gone) == 4 and not gone & set(held.warm.items["item_id"])
    assert held.warm.items["item"].to_list() == list(range(1, 17))
    train, old = held.warm.train_sequences, dataset.train_sequences
    names = ["", *held.full.items["item_id"].to_list()]
    for user, sequence in old.items():
        left = [f"i{i}" for i in sequence if f"i{i}" not in gone]
        assert [names[i] for i in train.get(user, [])] == left
    assert len(held.warm.cases("test")) == 0
    for cases in (held.warm.cases("validation"),):
        assert max(cases.targets) <= 16 and max(h.max() for h in cases.histories) <= 16
        for user, history, target in zip(cases.users, cases.histories, cases.targets, strict=True):
            whole = np.r_[train[user], target]
            assert np.r_[history, target].tolist() == whole.tolist()


def test_the_whole_data_set_is_only_renumbered():
    dataset = tiny.planted(20, 40)
    full = coldstart.hold_out(dataset, 0.2, seed=3).full
    names = [None, *full.items["item_id"].to_list()]
    for a, b in zip(dataset.cases("test").histories, full.cases("test").histories, strict=True):
        assert [f"i{i}" for i in a] == [names[i] for i in b]
    titles = dict(dataset.items.select("item_id", "title").iter_rows())
    assert all(titles[i] == t for i, t in full.items.select("item_id", "title").iter_rows())


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001])
def test_a_share_that_holds_out_nothing_or_all_is_refused(share):
    with pytest.raises(UserError, match="holds out"):
        coldstart.hold_out(tiny.planted(20, 10), share, 0)


def test_a_text_model_scores_known_items_as_before():
    torch.manual_seed(0)
    text = torch.randn(12, 8)
    model = make_id_model(IdModelConfig(**{**tiny.ID_MODEL.model_dump(), "items": "text"}), 9, text[:9]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    history = tiny.histories([1, 5, 9])
    longer = coldstart.with_new_items(model, text)
    before, after = model.score(history), longer.score(history)
    assert torch.allclose(after[:, :9], before, atol=1e-5)
    state = longer.next_item_state(torch.tensor([[1, 5, 9]]))
    expected = state @ model.adaptor(text[9:]).T + model.bias.mean()
    assert torch.allclose(after[:, 9:], expected, atol=1e-5)


def test_histories_are_cut_from_their_old_end():
    cases = tiny.planted(20, 10).cases("test")
    cut = coldstart._cut(cases, 2, 2)
    assert [h.tolist() for h in cut.histories] == [h[-2:].tolist() for h in cases.histories]
    assert len(coldstart._cut(cases, 6, None)) == sum(len(h) >= 6 for h in cases.histories)


def test_whitening_by_the_known_items_alone(llm_folder):
    held = coldstart.hold_out(tiny.planted(20, 10), 0.2, 0)
    config = tiny.config(llm_folder())
    part, whole = text_vectors(held.warm, config), text_vectors(held.full, config, whiten_by=16)
    assert torch.allclose(part, whole[:16], atol=1e-3)


def test_every_model_every_history_once(monkeypatch, llm_folder, tmp_path):
    monkeypatch.setattr(coldstart, "ID_MODELS", {"sasrec": {"d_id": 16, "blocks": 1, "max_history": 6,
                                                            "max_epochs": 1}})
    config = tiny.config(llm_folder(), train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    dataset = tiny.planted(15, 40)
    result = coldstart.reproduce(dataset, config, tmp_path, [0], 0.2, progress=False)
    rows = result["rows"]
    assert len(rows) == 4 * len(coldstart._HISTORIES) * 2
    new = next(r for r in rows if r["model"] == "popularity" and r["target"] == "new" and r["history"] == "all")
    known = next(r for r in rows if r["model"] == "popularity" and r["target"] == "known" and r["history"] == "all")
    assert new["users"] + known["users"] == dataset.n_users and new["mrr"] < known["mrr"]
    monkeypatch.setattr(coldstart, "rank_cases", None)  # found again
    assert coldstart.reproduce(dataset, config, tmp_path, [0], 0.2, progress=False)["rows"] == rows
