"""The benchmarks on tiny models: what they count and check, not how fast."""

import dataclasses
import json

import engine
import machine
import numpy as np
import pytest
import tiny
import torch
from engine import OURS, SORTED, THEIRS, Setting

from laserrec.config import DataConfig
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.experiments.machine import describe
from laserrec.util.errors import UserError


@pytest.fixture(scope="module")
def setting(tmp_path_factory, llm_folder):
    folder = tmp_path_factory.mktemp("bench") / "data"
    raw = from_frames(*tiny.planted_tables(15, 40))
    prepare(raw.interactions, raw.items, DataConfig(min_user_interactions=2, min_item_interactions=1), folder)
    return Setting(data=folder, backbone=str(llm_folder("llama")), batch_size=4, histories=10, items=6, runs=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(engine, "peak_memory", lambda work, *arguments: 1.5)
    monkeypatch.setattr(engine, "product_peak", lambda dtype: 1e12)
    config = Setting.config
    monkeypatch.setattr(Setting, "config", lambda self, engine, precision="fp32", compiled=True: config(
        self, engine, precision, False))


def test_train_reports_what_the_results_file_needs(setting):
    result = engine.bench_train(setting, progress=False)
    assert set(result["times"]) == {OURS, THEIRS, SORTED}
    best = {name: times["minimum_seconds"] for name, times in result["times"].items()}
    assert result["ratio"] == pytest.approx(best[THEIRS] / best[OURS])
    assert result["tokens_per_second"] == pytest.approx(result["real_tokens"] / best[OURS])
    assert result["peak_share"] > 0 and result["peak_memory_gib"] == 1.5 and result["compile_seconds"] >= 0
    assert max(result["equality_float32"].values()) < 1e-4


def test_encode_covers_users_items_and_shared_items(setting):
    result = engine.bench_encode(setting, progress=False)
    assert result["ratio"] > 0 and result["items"]["ratio"] > 0 and result["items_shared"]["ratio"] > 0
    assert result["items_shared"]["equality_float32"] < 1e-4
    assert 0 < result["items_shared"]["ratio_with_reading"] < result["items_shared"]["ratio"]


def test_both_sides_have_the_same_trained_parts_and_gradients(setting):
    ours, theirs = engine._sides(setting, Dataset.load(setting.data))
    for a, b in zip(ours.laser.parameters(), theirs.laser.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unequal_engines_are_not_timed(setting, monkeypatch):
    step = engine.Side.step

    def wrong(self, *arguments):
        return step(self, *arguments) * (1.01 if self.reader.backbone.native else 1.0)

    monkeypatch.setattr(engine.Side, "step", wrong)
    with pytest.raises(UserError, match="nothing was timed"):
        engine.bench_train(setting, progress=False)


def test_tokens_per_epoch_counts_every_token(setting):
    counts = engine.tokens_per_epoch(setting)
    dataset = Dataset.load(setting.data)
    texts = engine.Side(setting, "native", dataset=dataset).reader.texts
    cuts = [row[:cut] for row in dataset.train_sequences.lists() for cut in range(1, len(row))]
    items = [[row] for row in range(dataset.n_items)]
    length = sum(4 + len(text) + 1 for text in texts.texts(tiny.histories(*cuts, *items), False))  # 4 queries
    assert counts["per_position"] == length
    assert counts["ours"] == 5 * len(cuts) < counts["random_cut"] < counts["per_position"]
    assert json.dumps(counts)


def test_more_histories_than_there_are(setting):
    with pytest.raises(UserError, match="not 5000"):
        engine.bench_train(dataclasses.replace(setting, histories=5000), progress=False)


def allocate(mebibytes):
    return np.ones(mebibytes * 2**17).sum()


def test_peak_memory_is_that_of_the_work():
    small, large = machine.peak_memory(allocate, 1), machine.peak_memory(allocate, 257)
    assert 0.2 < large - small < 0.3


def die():
    import os

    os._exit(3)


def test_a_process_that_dies_is_told():
    with pytest.raises(RuntimeError, match="die"):
        machine.peak_memory(die)


def test_the_machine_is_described():
    facts = describe()
    assert facts["cores"] >= 1 and facts["torch"] == torch.__version__
    assert machine.product_peak(torch.float32, runs=1) > 1e8


def test_the_command_writes_what_it_measured(setting, tmp_path, capsys, monkeypatch):
    part = engine.bench_train(setting, progress=False)
    monkeypatch.setattr(engine, "bench_train", lambda *_: part)
    monkeypatch.setattr(engine, "bench_encode", lambda *_: {**part, "items": part, "items_shared": part})
    engine.main(setting.data, backbone=setting.backbone, batch_size=4, histories=10, items=6, runs=2, quiet=True,
                json_file=tmp_path / "engine.json")
    kept = json.loads((tmp_path / "engine.json").read_text())
    assert set(kept) == {"machine", "train", "encode", "tokens_per_epoch"}
    assert "train step" in capsys.readouterr().out
