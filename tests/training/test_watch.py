"""The curves of a training: what is in them, and that no step is lost or doubled by an interruption or a crash."""

import math
import signal

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laserrec.methods.laser import task
from laserrec.training import trainer
from laserrec.training.watch import EVENTS_FOLDER, LOG_FILE, Watch, read_training

SECTIONS = {"mformer": {"dropout": 0.3, "state_dropout": 0.3}, "head": {"seen_offset": True},
            "train": {"stage_one_epochs": 2, "stage_two_epochs": 1, "batch_size": 4}}


def events(folder) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value), as TensorBoard shows them."""
    reader = EventAccumulator(str(folder / EVENTS_FOLDER))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def total(entries, name) -> float:
    """A mean's sum over all steps: windows may be cut differently."""
    return sum(e[name] * e["steps"] for e in entries)


@pytest.fixture
def whole(llm, tmp_path):
    fit = tiny.trainer(llm(), tmp_path / "whole", **SECTIONS)
    fit.run()
    return fit


def test_a_fit_writes_every_curve(whole):
    entries, curves = read_training(whole.folder), events(whole.folder)
    assert {"train/contrast", "train/balance", "train/grad_norm", "train/lr", "train/seen_offset", "train/loss",
            "train/epoch", "train/examples_per_second", "validation/recall@10", "validation/ndcg@10",
            "validation/mrr", "experts/share_1", "experts/share_2", "experts/share_3"} == curves.keys()
    steps = [e["step"] for e in entries]
    assert steps == sorted(set(steps)) and steps[-1] == whole.place.steps == sum(e["steps"] for e in entries)
    assert max(e["steps"] for e in entries) == 10
    for name in ("contrast", "balance", "grad_norm", "lr", "seen_offset"):
        assert [step for step, _ in curves[f"train/{name}"]] == steps
        assert [v for _, v in curves[f"train/{name}"]] == pytest.approx([e[name] for e in entries], rel=1e-6)
    by_epoch = {(e["phase"], e["epoch"]): e["loss"] for e in whole.log if e["epoch"]}
    for (phase, epoch), loss in by_epoch.items():  # the two losses make up the loss that the log has
        own = [e for e in entries if (e["phase"], e["epoch"]) == (phase, epoch)]
        assert total(own, "loss") / sum(e["steps"] for e in own) == pytest.approx(loss, rel=1e-5)
        parts = total(own, "contrast") + 0.01 * total(own, "balance")
        assert parts / sum(e["steps"] for e in own) == pytest.approx(loss, rel=1e-5)
    assert [v for _, v in curves["validation/ndcg@10"]] == pytest.approx(
        [e["validation_ndcg@10"] for e in whole.log], rel=1e-6)
    ends = [0] + [max(e["step"] for e in entries if (e["phase"], e["epoch"]) == key) for key in by_epoch]
    assert [step for step, _ in curves["validation/ndcg@10"]] == ends


def test_experts_are_counted_for_users_with_states(whole):
    entries, curves = read_training(whole.folder), events(whole.folder)
    examples, routed = (sum(e["examples"] for e in entries), sum(sum(e["experts"]) for e in entries))
    assert examples == 3 * int((whole.dataset.train_sequences.lengths - 1).sum())
    assert 0.5 * examples < routed < 0.9 * examples  # three in ten have their states hidden
    shares = [[v for _, v in curves[f"experts/share_{j}"]] for j in (1, 2, 3)]
    assert [sum(row) for row in zip(*shares, strict=True)] == pytest.approx([1.0] * len(entries))


@pytest.mark.parametrize("step", [3, 14, 27])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_step_is_lost_or_doubled(llm, whole, tmp_path, monkeypatch, step, error):
    """KeyboardInterrupt: Ctrl-C, a checkpoint behind that step; RuntimeError: the last timed one, some steps back."""
    saved, contrast, calls = [], task.item_contrast, [0]

    def broken(*arguments):
        calls[0] += 1
        if calls[0] == step:
            if error is RuntimeError:
                raise error
            signal.raise_signal(signal.SIGINT)
        return contrast(*arguments)

    first = tiny.trainer(llm(), tmp_path / "cut", **SECTIONS)
    advance = trainer.Progress.advance

    def save_now_and_then(self, *a, **k):
        advance(self, *a, **k)
        if error is RuntimeError and first.place.steps in (2, 12, 22) and first.place.steps not in saved:
            saved.append(first.place.steps)
            first._save()

    monkeypatch.setattr(trainer.Progress, "advance", save_now_and_then)
    monkeypatch.setattr(task, "item_contrast", broken)
    with pytest.raises(error):
        first.run()
    monkeypatch.undo()
    assert read_training(first.folder)
    second = tiny.trainer(llm(), tmp_path / "cut", **SECTIONS)
    second.run()
    entries, uncut = read_training(second.folder), read_training(whole.folder)
    steps = [e["step"] for e in entries]
    assert steps == sorted(set(steps)) and sum(e["steps"] for e in entries) == steps[-1] == uncut[-1]["step"]
    assert [e["step"] - e["steps"] for e in entries] == [0, *steps[:-1]]
    for name in ("contrast", "grad_norm", "examples"):
        measure = total if name != "examples" else lambda rows, key: sum(e[key] for e in rows)
        assert measure(entries, name) == pytest.approx(measure(uncut, name), rel=1e-5)
    assert [sum(x) for x in zip(*(e["experts"] for e in entries), strict=True)] == [
        sum(x) for x in zip(*(e["experts"] for e in uncut), strict=True)]
    curves = events(second.folder)
    assert curves.keys() == events(whole.folder).keys()
    for tag, points in curves.items():
        at = [s for s, _ in points]
        assert at == (steps if not tag.startswith("validation") else sorted(set(at))), tag
    assert [s for s, _ in curves["validation/mrr"]] == [s for s, _ in events(whole.folder)["validation/mrr"]]


def test_a_fresh_start_forgets_what_stood_there(llm, whole, tmp_path):
    """The first run was killed before any checkpoint."""
    folder = tmp_path / "killed"
    killed = tiny.trainer(llm(), folder, **SECTIONS)
    killed.watch.start()
    killed.watch.add(contrast=torch.tensor(99.0))
    killed.watch.step(40, 4)
    killed.watch.close()
    assert events(folder)["train/contrast"] == [(40, 99.0)]
    fit = tiny.trainer(llm(), folder, **SECTIONS)
    fit.run()
    assert [{**e, "seconds": 0} for e in read_training(folder)] == [
        {**e, "seconds": 0} for e in read_training(whole.folder)]
    assert events(folder)["train/contrast"] == events(whole.folder)["train/contrast"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watch = Watch(None, every=1)
    watch.start()
    watch.add(loss=torch.tensor(1.0))
    watch.step(1, 8)
    watch.epoch(1, {"validation_mrr": 0.5})
    watch.close()
    assert list(tmp_path.iterdir()) == []


def test_means_stray_numbers_and_half_lines(tmp_path):
    watch = Watch(tmp_path, every=2)
    watch.start()
    for step, loss in enumerate((1.5, 2.5, math.inf), 1):
        watch.add(loss=torch.tensor(loss), experts=torch.tensor([0.0, 2.0]))
        watch.step(step, 3, epoch=1, phase="stage 1")
    watch.add(loss=torch.tensor(7.0))  # of a step that is never done
    watch.close()
    with open(tmp_path / LOG_FILE, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    first, second = read_training(tmp_path)
    assert (first["step"], first["steps"], first["loss"], first["examples"], first["experts"]) == (2, 2, 2.0, 6, [0, 4])
    assert second["step"] == 3 and second["loss"] is None and second["experts"] == [0, 2]
    watch = Watch(tmp_path, every=2)
    watch.start(3)  # the half line is gone
    watch.add(loss=torch.tensor(1.0))
    watch.step(4, 3)
    watch.close()
    assert [e["step"] for e in read_training(tmp_path)] == [2, 3, 4]
    assert len((tmp_path / LOG_FILE).read_text().splitlines()) == 3
    assert read_training(tmp_path / "nowhere") == []


def test_a_model_has_the_curves_of_its_own_training(llm, tmp_path):
    """Where nothing routes and nothing is offset there are no such curves."""
    fit = tiny.trainer(llm(), tmp_path, mformer={"prefix": "learned"})
    fit.run()
    first = read_training(tmp_path)[0]
    assert not any(tag.startswith("experts") for tag in events(tmp_path))
    assert "contrast" in first and not first.keys() & {"balance", "experts", "seen_offset"}


def test_a_full_disk_is_told_clearly(tmp_path, monkeypatch):
    from laserrec.util.errors import UserError

    watch = Watch(tmp_path, every=1)
    watch.start()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watch, "_write_line", full)
    with pytest.raises(UserError, match="make room on the disk"):
        watch.step(1, 4)
    with pytest.raises(UserError):  # the line is still not on disk
        watch.close()
