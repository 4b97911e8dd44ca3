"""The table of qualities in small; cosines against naive ones."""

import json

import pytest
import tiny
import torch

from laserrec.config import Config
from laserrec.experiments import quality, table
from laserrec.experiments.quality import Unranked


@pytest.fixture
def small(small_rivals, llm_folder):
    return tiny.config(llm_folder(), train={"stage_one_epochs": 1, "stage_two_epochs": 0},
                       prompt={"layout": "text_first", "item_side": "mean", "max_items": 4, "max_item_tokens": 8},
                       head={"whiten_dims": 8, "projection": True, "id_share": 0.3},
                       neighbours={"count": 5, "l2": 1.0})


def test_all_models_of_all_seeds_once(small, tmp_path, monkeypatch):
    dataset = tiny.planted(15, 30)
    result = quality.reproduce(dataset, small, tmp_path, [0], progress=False, device="cpu")
    assert {row["model"] for row in result["rows"]} == {row.name for row in quality.rows()}
    assert len(result["rows"]) == len(quality.rows()) == 13
    assert all({"model", "kind", "seed", "recall@10", "ndcg@10", "mrr", "train_seconds"} <= row.keys()
               for row in result["rows"])
    assert json.loads((tmp_path / "quality.json").read_text(encoding="utf-8")) == result
    assert [line["kind"] for line in result["laser_over"]] == ["id", "text"]
    monkeypatch.setattr(table, "evaluate", None)  # nothing is measured twice
    monkeypatch.setattr(table, "fit", None)
    assert quality.reproduce(dataset, small, tmp_path, [0], progress=False, device="cpu") == result


def test_rivals_are_on_equal_terms():
    for row in quality.rows():
        config = Config.model_validate({**Config().model_dump(), **row.settings})
        assert row.method not in ("sasrec", "bert4rec") or config.id_model.seen_offset
        assert row.method not in ("sasrec", "bert4rec") or config.id_model.kind == row.method


def test_cosines_alone_are_a_user_and_all_items_with_the_seen_offset(small, llm, tmp_path):
    rows = [quality.Row("Laser", "laser", "laser", {"head": {"seen_offset": True}})]
    model = table.Table(rows, tiny.planted(15, 30), small, tmp_path, torch.device("cpu"), False).fitted("Laser").model
    histories = tiny.histories([3, 4], [9])
    users = torch.nn.functional.normalize(model.users(histories), dim=-1)
    expected = users @ model.items().T
    for user, row in enumerate([[3, 4], [9]]):
        expected[user, row] += model.seen.offset
    torch.testing.assert_close(Unranked(model).score(histories), model.score(histories))
    alone = Unranked(model, neighbours=False).score(histories)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)
    assert (model.score(histories) > alone + 1e-4).any()
