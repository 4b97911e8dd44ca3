"""Every method is fitted, scored and opened on a device that this machine pretends to have, with the CPU's results."""

import pytest
import tiny
import torch
from devices import pretended

from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.methods.all import METHODS
from laserrec.recommender.fitting import fit, open_folder
from laserrec.util.device import CPU

STEADY = {"id_model": tiny.ID_MODEL.model_dump() | {"max_epochs": 2, "dropout": 0.0},
          "mformer": {"experts": 3, "queries": 2, "blocks": 2, "d_model": 16, "heads": 2, "dropout": 0.0},
          "train": {"batch_size": 16, "stage_one_epochs": 1, "stage_two_epochs": 1, "lr": 1e-3, "cuts": "random"},
          "data": {"min_item_interactions": 1, "min_user_interactions": 2},
          **{name: {key: 0.0 for key in ("dropout", "lora_dropout", "user_dropout") if key in own}
             for name, own in tiny.RIVALS.items()}}
SMALL = {"prompt": {"layout": "text_first", "item_side": "mean", "max_items": 4, "max_item_tokens": 8},
         "head": {"projection": True, "whiten_dims": 8, "seen_offset": True, "id_share": 0.3},
         "neighbours": {"count": 4, "l2": 1.0}, "train": {"item_gradient": True},
         "blend": {"trials": 60, "regressions": 2, "network": 4}}
CASES = [*((name, {}) for name in METHODS), ("sasrec", {"id_model": {"items": "text", "seen_offset": True}}),
         ("laser", SMALL)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    raw = from_frames(*tiny.planted_tables(20, users=24))
    prepare(raw.interactions, raw.items, tiny.config("x", **STEADY).data, folder / "data")
    return Dataset.load(folder / "data")


@pytest.mark.parametrize(("name", "sections"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "plain")
def test_a_fit_on_the_device_is_the_cpus(data, llm_folder, tmp_path, monkeypatch, name, sections):
    for module in ("finish", "ranker_fit"):
        monkeypatch.setattr(f"laserrec.methods.laser.{module}._FEWEST_USERS", 10)
    monkeypatch.setattr("laserrec.methods.laser.ranker_fit._worse", lambda gain: False)
    monkeypatch.setattr("laserrec.methods.laser.ranker_fit._EPOCHS", 2)
    merged = {section: STEADY.get(section, {}) | sections.get(section, {}) for section in {*STEADY, *sections}}
    config, asked = tiny.config(llm_folder(), **merged), Histories.of([[0, 3], [5], [7, 8, 9]])
    own = fit(name, data, config, tmp_path / "cpu", CPU, progress=False)
    want = own.model.score(asked)
    with pretended() as gpu:
        there = fit(name, data, config, tmp_path / "gpu", gpu.device, progress=False)
        opened = open_folder(tmp_path / "gpu", gpu.device)
        assert getattr(own.model, "ranker", None) is not None or sections is not SMALL
        for model in (there.model, opened.model):
            scores = model.score(asked.to(gpu.device))
            assert scores.device == gpu.device
            torch.testing.assert_close(scores.cpu(), want, rtol=2e-3, atol=2e-3)
    losses = [[entry["loss"] for entry in fitted.log if entry.get("loss")] for fitted in (there, own)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
