"""Pretraining: only training items are seen, the best epoch is kept, stop and resume equals uninterrupted."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from laserrec.config import IdModelConfig, IdModelKind
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.id_store import load_id_model
from laserrec.methods.popularity import Popularity
from laserrec.methods.sequence import SASRec
from laserrec.training import pretrain
from laserrec.training.pretrain import pretrain_id_model
from laserrec.util import checkpoint
from laserrec.util.errors import UserError

N = 25
SMALL = IdModelConfig(d_id=16, blocks=1, heads=2, dropout=0.2, max_history=6, batch_size=16, max_epochs=5, lr=1e-2)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def planted(test_shift: int = 0) -> Dataset:
    """40 users who walk up the items; `test_shift` changes test items and nothing else."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(1, 41):
        length, start = int(rng.integers(4, 10)), int(rng.integers(0, N))
        for position in range(length):
            split = {length - 1: "test", length - 2: "validation"}.get(position, "train")
            item = (start + position + (test_shift if split == "test" else 0)) % N + 1
            rows.append((user, item, position, split))
    schema = {"user": pl.Int32, "item": pl.Int32, "position": pl.Int32, "split": pl.String}
    items = pl.DataFrame({"item": range(1, N + 1), "item_id": [f"i{j}" for j in range(1, N + 1)]})
    users = pl.DataFrame({"user": range(1, 41), "user_id": [f"u{j}" for j in range(1, 41)]})
    return Dataset(items, users, pl.DataFrame(rows, schema=schema, orient="row"), {"sha256": f"data{test_shift}"})


def weights(folder) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "model.safetensors")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_batches_hold_training_sequences_only(tmp_path, monkeypatch):
    dataset, batches = planted(), []
    loss = SASRec.loss
    monkeypatch.setattr(SASRec, "loss", lambda self, items: batches.append(items) or loss(self, items))
    pretrain_id_model(dataset, SMALL.model_copy(update={"max_epochs": 1}), tmp_path / "id", progress=False)
    got = sorted(tuple(i for i in row if i) for batch in batches for row in batch.tolist())
    train = dataset.interactions.filter(pl.col("split") == "train").group_by("user", maintain_order=True).agg("item")
    assert got == sorted(tuple(s[-6:]) for s in train["item"].to_list() if len(s) > 1)


def test_shuffled_sequences_are_the_same_items_in_another_order_each_epoch(tmp_path, monkeypatch):
    dataset, batches = planted(), []
    loss = SASRec.loss
    monkeypatch.setattr(SASRec, "loss", lambda self, items: batches.append(items) or loss(self, items))
    settings = SMALL.model_copy(update={"max_epochs": 2, "shuffle": 0.5, "max_history": 10})
    pretrain_id_model(dataset, settings, tmp_path / "id", progress=False)
    rows = [tuple(i for i in row if i) for batch in batches for row in batch.tolist()]
    whole = [tuple(s.tolist()) for s in dataset.train_sequences.values() if len(s) > 1]
    epochs = rows[: len(whole)], rows[len(whole) :]
    for epoch in epochs:
        assert sorted(map(sorted, epoch)) == sorted(map(sorted, whole))
        kept = sum(row in whole for row in epoch)
        assert 0.3 * len(whole) < kept < 0.9 * len(whole)  # half stay, and some of the others by chance
    assert sorted(epochs[0]) != sorted(epochs[1])


def test_test_items_change_nothing(tmp_path):
    for shift in (0, 7):
        pretrain_id_model(planted(shift), SMALL, tmp_path / str(shift), progress=False)
    assert same(weights(tmp_path / "0"), weights(tmp_path / "7"))
    assert (tmp_path / "0" / "metrics.json").exists()


@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
@pytest.mark.parametrize(("error", "seconds"), [(KeyboardInterrupt, 1e9), (RuntimeError, 0.0)])
def test_stop_and_resume_equals_uninterrupted(tmp_path, monkeypatch, kind, error, seconds):
    """Ctrl-C in the middle of an epoch; and a crash, after which the last timed checkpoint is all there is."""
    dataset, config = planted(), SMALL.model_copy(update={"kind": IdModelKind(kind)})
    whole = pretrain_id_model(dataset, config, tmp_path / "whole", progress=False)
    monkeypatch.setattr(pretrain, "_CHECKPOINT_SECONDS", seconds)
    kinds, calls = type(load_id_model(tmp_path / "whole").model), [0]
    loss = kinds.loss

    def broken(self, items):
        calls[0] += 1
        if calls[0] == 8:
            raise error
        return loss(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "loss", broken)
        with pytest.raises(error):
            pretrain_id_model(dataset, config, tmp_path / "parts", progress=False)
    assert (tmp_path / "parts" / "checkpoint.safetensors").exists()
    with pytest.raises(UserError, match="unfinished"):
        load_id_model(tmp_path / "parts")
    torch.manual_seed(99)
    parts = pretrain_id_model(dataset, config, tmp_path / "parts", progress=False)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "parts" / "log.jsonl").read_text()
    assert {**whole, "seconds": 0} == {**parts, "seconds": 0}
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == [
        "config.json", "log.jsonl", "metrics.json", "model.safetensors", "states.safetensors", "tensorboard",
        "training.jsonl"]


def test_the_best_epoch_on_validation_is_kept_and_patience_ends_it(tmp_path):
    dataset = planted()
    config = SMALL.model_copy(update={"max_epochs": 60, "patience": 2, "eval_every": 2, "lr": 3e-2})
    metrics = pretrain_id_model(dataset, config, tmp_path, progress=False)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    looked = {e["epoch"]: e["validation_ndcg@10"] for e in log if "validation_ndcg@10" in e}
    assert list(looked) == list(range(2, metrics["epochs"] + 1, 2))
    assert looked[metrics["best_epoch"]] == max(looked.values()) == metrics["validation_ndcg@10"]
    assert metrics["epochs"] == metrics["best_epoch"] + 4 < 60
    again = evaluate("x", load_id_model(tmp_path, dataset).model.score, dataset, "validation").plain.ndcg
    assert again == pytest.approx(metrics["validation_ndcg@10"], abs=1e-6)


def test_it_learns_the_planted_order_better_than_popularity(tmp_path):
    dataset = planted()
    pretrain_id_model(dataset, SMALL.model_copy(update={"max_epochs": 40, "dropout": 0.0}), tmp_path, progress=False)
    learnt = evaluate("sasrec", load_id_model(tmp_path).model.score, dataset, "test").plain.mrr
    assert learnt > 2 * evaluate("popularity", Popularity(dataset).score, dataset, "test").plain.mrr


def test_saved_states_are_those_of_each_training_sequence(tmp_path):
    dataset = planted()
    pretrain_id_model(dataset, SMALL.model_copy(update={"max_epochs": 1}), tmp_path, progress=False)
    model, saved = load_id_model(tmp_path, dataset).model, checkpoint.load(tmp_path / "states.safetensors")[0]
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert torch.equal(saved["item_embeddings"], model.item_embeddings())
    for row, user in enumerate(saved["users"].tolist()):
        window = torch.as_tensor(dataset.train_sequences[user][-6:].astype(np.int64))[None]
        states = saved["states"][saved["offsets"][row] : saved["offsets"][row + 1]]
        assert torch.allclose(states, model.states(window)[0], atol=1e-5)
    assert saved["offsets"][-1] == len(saved["states"])


def test_a_finished_folder_is_reused_and_other_data_or_settings_are_refused(tmp_path):
    dataset, config = planted(), SMALL.model_copy(update={"max_epochs": 1})
    first = pretrain_id_model(dataset, config, tmp_path, progress=False)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert pretrain_id_model(dataset, config, tmp_path, progress=False) == {**first, "reused": True}
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        pretrain_id_model(dataset, config.model_copy(update={"lr": 0.5}), tmp_path, progress=False)
    with pytest.raises(UserError, match="other data"):
        pretrain_id_model(planted(3), config, tmp_path, progress=False)
    with pytest.raises(UserError, match="other data"):
        load_id_model(tmp_path, planted(3))


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_id_model(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        load_id_model(tmp_path)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "checkpoint.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is damaged"):
        pretrain_id_model(planted(), SMALL, unfinished, progress=False)


def test_users_with_one_interaction_are_nothing_to_learn_from(tmp_path):
    dataset = planted()
    thin = Dataset(dataset.items, dataset.users, dataset.interactions.filter(pl.col("position") == 0), dataset.meta)
    with pytest.raises(UserError, match="nothing to learn"):
        pretrain_id_model(thin, SMALL, tmp_path, progress=False)


def test_popularity_counts_training_interactions_only():
    dataset = planted()
    counts = [0] * N
    for item, split in dataset.interactions.select("item", "split").iter_rows():
        counts[item - 1] += split == "train"
    scores = Popularity(dataset).score([np.array([1]), np.array([2])])
    assert scores.tolist() == [counts, counts]
