"""Distilling: what is read, that the teacher is learnt, that no LLM answers, folders, interruption."""

import json
import signal

import numpy as np
import polars as pl
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.cli import distil as cli_distil
from laserrec.config import StudentConfig
from laserrec.methods.laser.student import Student
from laserrec.recommender import distil
from laserrec.recommender.folder import shared_files
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util.errors import UserError

N = 20
QUICK = StudentConfig(hidden=16, epochs=2, batch_size=16)
PAPER = {"train": {"lr": 1e-2, "batch_size": 16, "stage_one_epochs": 1, "stage_two_epochs": 0}}
MEAN = {"prompt": {"max_items": 4, "max_item_tokens": 8, "layout": "text_first", "item_side": "mean"},
        "head": {"whiten_dims": 8, "projection": True, "id_share": 0.3, "seen_offset": True},
        "neighbours": {"count": 6, "l2": 1.0, "text_weight": 1.0}, **PAPER}
NEW = pl.DataFrame({"item_id": ["new1"], "title": ["steel drill 99"]})


@pytest.fixture(params=[PAPER, MEAN], ids=["paper", "mean"])
def sections(request):
    return request.param


@pytest.fixture
def teach(llm, llm_folder, tmp_path):
    def fit(sections=MEAN, data=None):
        data = data or tiny.planted(N, 40)
        config = tiny.config(llm_folder(), **sections)
        return LaserRecommender.fit_dataset(data, tiny.id_model(N), config, tmp_path / "model", False, llm()), data

    return fit


@pytest.fixture
def no_llm(monkeypatch):
    """Any use of the decoder fails."""
    from laserrec.llm.decoder import NativeDecoder

    def use():
        for name in ("read", "read_rows", "read_layers", "encode_text"):
            monkeypatch.setattr(NativeDecoder, name, None)

    return use


def test_histories_are_training_sequences_and_proper_parts_of_them():
    whole = tiny.histories([1, 2, 3, 4, 5], [6], [], [7, 8])
    drawn = distil.draw_histories(whole, StudentConfig(views=2))
    assert [h.tolist() for h in drawn[:3]] == [[1, 2, 3, 4, 5], [6], [7, 8]] and len(drawn) == 3 + 2 * 2
    begin, part = drawn[3], drawn[5]
    assert begin.tolist() == [1, 2, 3, 4, 5][: len(begin)] and 0 < len(begin) < 5
    assert 0 < len(part) < 5 and list(part) == sorted(set(part.tolist()) & {1, 2, 3, 4, 5})
    again = distil.draw_histories(whole, StudentConfig(views=2))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    few = distil.draw_histories(whole, StudentConfig(views=2, histories=4))
    assert len(few) == 4 and {tuple(h) for h in few} <= {tuple(h) for h in drawn}


def test_an_untrained_student_says_the_sum_of_the_history():
    student = Student(QUICK, 6, 4).eval()
    sums, states = torch.randn(3, 6) * 7, torch.randn(3, 4)
    torch.testing.assert_close(F.normalize(student(sums, states), dim=-1), F.normalize(sums, dim=-1))
    torch.nn.init.normal_(student.added.weight)
    assert not torch.equal(student(sums, states), student(sums, states * 0))
    torch.testing.assert_close(student(sums, states), student(sums * 5, states * 3))


def test_sums_are_of_unit_text_parts_newer_ones_heavier(teach):
    model, _ = teach()
    text = model.embeddings[:, : model.d_text]
    assert text.shape[1] == model.embeddings.shape[1] - tiny.ID_MODEL.d_id
    expected = sum(0.8**age * F.normalize(text[i - 1], dim=-1) for age, i in enumerate([4, 9, 2]))
    torch.testing.assert_close(model.history_sums(tiny.histories([2, 9, 4]))[0], expected)


def test_it_learns_what_the_teacher_says(teach, tmp_path, sections):
    teacher, data = teach(sections)
    histories = [h for h in data.cases("test").histories][:20]
    config = StudentConfig(hidden=64, epochs=60, batch_size=32, lr=1e-2, dropout=0.0)
    made = distil.distil(teacher, data, tmp_path / "fast", config, False)

    def far(student):
        """Mean distance of the softmax over all items to the teacher's."""
        tau = teacher.encoder.laser.config.train.temperature
        other = LaserRecommender(teacher.encoder, teacher.items, teacher.embeddings, teacher.facts, student.eval())
        one, two = (m.score(histories).div(tau).softmax(dim=-1) for m in (teacher, other))
        return float((one - two).abs().sum(dim=-1).mean())

    untrained = Student(config, teacher.d_text, tiny.ID_MODEL.d_id)
    assert far(made.student) < 0.8 * far(untrained)


def test_a_step_is_the_cross_entropy_to_the_teachers_softmax(teach, tmp_path, monkeypatch):
    teacher, data = teach()
    monkeypatch.setattr(distil, "_HIDDEN_STATES", 0.0)
    work = distil._Distillation(teacher, data, QUICK.model_copy(update={"dropout": 0.0}), tmp_path / "fast", False)
    torch.nn.init.normal_(work.student.added.weight)
    while work.read < len(work.histories):
        work._read_some()
    rows, tau = torch.tensor([3, 50, 7]), teacher.encoder.laser.config.train.temperature
    items = F.normalize(teacher.embeddings[:, : teacher.d_text], dim=-1)
    total = 0.0
    for row in rows.tolist():
        one = [work.histories[row]]
        wanted = (F.normalize(teacher.encoder.encode(one, 1)[0, : teacher.d_text], dim=-1) @ items.T / tau).softmax(-1)
        said = work.student(teacher.history_sums(one), teacher.encoder.id_part(one))[0]
        logs = (F.normalize(said, dim=-1) @ items.T / tau).log_softmax(-1)
        total -= float((wanted * logs).sum().detach())
    assert work._step(rows) == pytest.approx(total / 3, rel=1e-3)


def test_it_answers_without_the_llm_wherever_the_model_goes(teach, tmp_path, no_llm, sections):
    teacher, data = teach(sections)
    made = distil.distil(teacher, data, tmp_path / "fast", QUICK, False)
    histories = {"anna": ["i1", "i2"], "bob": ["i9"]}
    no_llm()
    loaded = LaserRecommender.from_pretrained(tmp_path / "fast", teacher.encoder.laser.backbone)
    assert loaded.encoder.catalogue._rows == []  # not even to be ready
    got = loaded.recommend(histories, k=4)
    assert got.equals(made.recommend(histories, k=4)) and got.height == 8
    assert np.array_equal(loaded.encode_users(histories), made.encode_users(histories))
    users = loaded.encode_users(histories)
    unit = users / np.linalg.norm(users, axis=1, keepdims=True)
    scores = loaded.encoder.laser.finish(torch.as_tensor(unit) @ loaded.embeddings.T, tiny.histories([1, 2], [9]))
    torch.testing.assert_close(loaded.score(tiny.histories([1, 2], [9])), scores, atol=1e-5, rtol=1e-4)
    with pytest.raises(TypeError):
        teacher.recommend(histories, k=4)


def test_new_items_are_read_by_the_llm_and_stand_in_histories(teach, tmp_path):
    teacher, data = teach()
    made = distil.distil(teacher, data, tmp_path / "fast", QUICK, False)
    made.add_items(NEW)
    assert "new1" not in teacher.items["item_id"].to_list() and len(teacher.encoder.catalogue) == N
    teacher.add_items(NEW)
    assert np.array_equal(made.encode_items(["new1"]), teacher.encode_items(["new1"]))
    assert "new1" in made.recommend([["i3"]], k=N + 1)["item_id"].to_list()
    one, two = made.encode_users([["new1"], ["i3"]])
    assert np.isfinite(one).all() and not np.allclose(one, two)
    made.save_pretrained(tmp_path / "grown")
    again = LaserRecommender.from_pretrained(tmp_path / "grown", teacher.encoder.laser.backbone)
    one, two = (m.recommend([["new1"]], k=3) for m in (again, made))
    assert one["item_id"].equals(two["item_id"]) and one["score"].to_list() == pytest.approx(two["score"].to_list())


def test_the_same_experts_are_told(teach, tmp_path):
    teacher, data = teach()
    made = distil.distil(teacher, data, tmp_path / "fast", QUICK, False)
    rows = tiny.histories([1, 2], [9], [4, 5, 6])
    assert made._users(rows)[1].expert.tolist() == teacher._users(rows)[1].expert.tolist()


def test_nothing_but_training_sequences_matters(llm, llm_folder, tmp_path):
    students = []
    for name, last in (("a", [9, 8]), ("b", [3, 4])):
        data = tiny.dataset([[(s + p) % N + 1 for p in range(5)] + last for s in range(20)], N)
        config = tiny.config(llm_folder(), **MEAN | {"train": PAPER["train"] | {"stage_one_epochs": 0}})
        teacher = LaserRecommender.fit_dataset(data, tiny.id_model(N), config, tmp_path / name, False, llm())
        made = distil.distil(teacher, data, tmp_path / f"fast-{name}", QUICK, False)
        students.append(made.student.state_dict())
    for key, tensor in students[0].items():
        assert torch.equal(tensor, students[1][key]), key


class Stop:
    """Ctrl-C during the n-th call of a method."""

    def __init__(self, call, at: int):
        self.call, self.left = call, at

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.call(*args)


@pytest.mark.parametrize(("where", "at"), [("_read_some", 1), ("_read_some", 3), ("_step", 1), ("_step", 12)])
def test_stop_and_resume_is_the_uninterrupted_run(teach, tmp_path, monkeypatch, where, at):
    monkeypatch.setattr(distil, "_READ_AT_ONCE", 50)
    teacher, data = teach()
    whole = distil.distil(teacher, data, tmp_path / "whole", QUICK, False)
    with monkeypatch.context() as patch:
        stop = Stop(getattr(distil._Distillation, where), at)
        patch.setattr(distil._Distillation, where, lambda *a: stop(*a))
        with pytest.raises(KeyboardInterrupt):
            distil.distil(teacher, data, tmp_path / "fast", QUICK, False)
    assert not (tmp_path / "fast" / "model.json").exists()
    with pytest.raises(UserError, match="other settings, data or another teacher"):
        distil.distil(teacher, data, tmp_path / "fast", QUICK.model_copy(update={"epochs": 7}), False)
    made = distil.distil(teacher, data, tmp_path / "fast", QUICK, False)
    for key, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, made.student.state_dict()[key]), key
    assert not (tmp_path / "fast" / "checkpoint.safetensors").exists()


def test_a_finished_folder_is_loaded_and_another_one_refused(teach, tmp_path, monkeypatch):
    teacher, data = teach()
    made = distil.distil(teacher, data, tmp_path / "fast", QUICK, False)
    with pytest.raises(UserError, match="distilled already"):
        distil.distil(made, data, tmp_path / "faster", QUICK, False)
    with pytest.raises(UserError, match="another catalogue"):
        distil.distil(teacher, tiny.planted(N + 1, 40), tmp_path / "other", QUICK, False)
    with pytest.raises(UserError, match="holds another model"):
        distil.distil(teacher, data, tmp_path / "model", QUICK, False)
    with pytest.raises(UserError, match="holds another model"):
        distil.distil(teacher, data, tmp_path / "fast", QUICK.model_copy(update={"seed": 3}), False)
    with pytest.raises(UserError, match="other settings, data or ID model"):  # a fit doesn't take it for its own
        LaserRecommender.fit_dataset(data, tiny.id_model(N), teacher.encoder.laser.config, tmp_path / "fast", False,
                                     teacher.encoder.laser.backbone)
    monkeypatch.setattr(distil._Distillation, "run", None)  # a second training would fail
    again = distil.distil(teacher, data, tmp_path / "fast", QUICK, False)
    assert torch.equal(again.student.map.weight, made.student.map.weight)


def test_the_folder_says_what_it_is_and_is_checked(teach, tmp_path):
    teacher, data = teach()
    teacher.facts["results"] = [{"split": "test", "recall@10": 1.0}]
    distil.distil(teacher, data, tmp_path / "fast", QUICK, False)
    note = json.loads((tmp_path / "fast" / "model.json").read_text())
    assert [r["split"] for r in note["results"]] == ["validation"]  # not the teacher's
    both = note["student"]["validation"]
    assert both.keys() == {"teacher", "student"} and both["student"]["ndcg@10"] == note["results"][0]["ndcg@10"]
    assert "It is distilled" in (tmp_path / "fast" / "README.md").read_text()
    assert "It is distilled" not in (tmp_path / "model" / "README.md").read_text()
    assert "student.safetensors" in shared_files(tmp_path / "fast")  # what a push uploads
    file = tmp_path / "fast" / "student.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match=r"student.safetensors has changed"):
        LaserRecommender.from_pretrained(tmp_path / "fast", teacher.encoder.laser.backbone)
    file.unlink()
    with pytest.raises(UserError, match=r"student.safetensors is missing"):
        LaserRecommender.from_pretrained(tmp_path / "fast", teacher.encoder.laser.backbone)
    file.write_bytes(kept)
    del note["files"]["student.safetensors"]
    (tmp_path / "fast" / "model.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match=r"lacks files of student\.safetensors"):
        LaserRecommender.from_pretrained(tmp_path / "fast", teacher.encoder.laser.backbone)


def test_a_large_catalogue_is_drawn_from(teach, tmp_path, monkeypatch):
    teacher, data = teach()
    monkeypatch.setattr(distil, "_MOST_ITEMS", 7)
    work = distil._Distillation(teacher, data, QUICK, tmp_path / "fast", False)
    one, two = work._items(), work._items()
    assert one.shape == two.shape == (7, teacher.d_text) and not torch.equal(one, two)


def test_the_command_prints_both_and_writes_them(llm_folder, tmp_path, capsys):
    config = tiny.config(llm_folder(), **MEAN, data={"min_user_interactions": 1, "min_item_interactions": 1})
    LaserRecommender.fit(*tiny.planted_tables(N, 30), config, tmp_path, progress=False)
    cli_distil.distil(tmp_path / "data", tmp_path / "model", tmp_path / "fast", quiet=True,
                      json_file=tmp_path / "told.json",
                      settings=cli_distil.StudentSettings(hidden=8, epochs=1, batch_size=16))
    out, told = capsys.readouterr().out, json.loads((tmp_path / "told.json").read_text())
    assert told.keys() == {"config", "histories", "seconds", "validation"} and told["config"]["hidden"] == 8
    for name in ("teacher", "student"):
        assert name in out and f"{told['validation'][name]['ndcg@10']:.4f}" in out
    with pytest.raises(UserError, match=r"flags\): epochs: Input should be greater"):
        cli_distil.distil(tmp_path / "data", tmp_path / "model", tmp_path / "x",
                          settings=cli_distil.StudentSettings(epochs=0))
