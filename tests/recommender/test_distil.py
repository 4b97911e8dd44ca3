"""Distilling: what is read, that the teacher is learnt, that no LLM answers, folders, interruption."""

import json
import signal

import numpy as np
import polars as pl
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.config import StudentConfig
from laserrec.methods.laser import distil as task_module
from laserrec.methods.laser.distil import DistilTask, distil_phase, draw_histories
from laserrec.methods.laser.student import Student
from laserrec.recommender import distil
from laserrec.recommender.folder import shared_files
from laserrec.recommender.recommender import LaserRecommender
from laserrec.recommender.validated import trained_on_validation, validated
from laserrec.training.trainer import Trainer
from laserrec.util.errors import UserError

N = 20
QUICK = StudentConfig(hidden=16, epochs=2, batch_size=16)
PAPER = {"train": {"lr": 1e-2, "batch_size": 32, "stage_one_epochs": 1, "stage_two_epochs": 0}}
MEAN = {"prompt": {"max_items": 3, "max_item_tokens": 6, "layout": "text_first", "item_side": "mean"},
        "head": {"whiten_dims": 8, "projection": True, "id_share": 0.3, "seen_offset": True},
        "neighbours": {"count": 6, "l2": 1.0, "text_weight": 1.0}, **PAPER}
NEW = pl.DataFrame({"item_id": ["new1"], "title": ["steel drill 99"]})
DATA = tiny.planted(N, 30)


@pytest.fixture(scope="module")
def fitted(fit, tmp_path_factory):
    """kind -> folder of a teacher, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            fit(DATA, made[kind], **{"mean": MEAN, "paper": PAPER}[kind])
        return made[kind]

    return get


@pytest.fixture
def teach(fitted, llm):
    """A teacher that a test may change."""
    return lambda kind="mean": LaserRecommender.from_pretrained(fitted(kind), llm())


@pytest.fixture(params=["paper", "mean"])
def kind(request):
    return request.param


@pytest.fixture
def no_llm(monkeypatch):
    """Any use of the decoder fails."""
    from laserrec.llm.decoder import NativeDecoder

    def use():
        for name in ("read", "read_rows", "read_layers", "encode_text"):
            monkeypatch.setattr(NativeDecoder, name, None)

    return use


def task_of(teacher, config=QUICK) -> DistilTask:
    return DistilTask(teacher.model, distil._student(teacher, config), DATA)


def weights(model) -> dict[str, torch.Tensor]:
    return model.model.student.state_dict()


def test_histories_are_training_sequences_and_proper_parts_of_them():
    whole = tiny.histories([1, 2, 3, 4, 5], [6], [], [7, 8])
    drawn = draw_histories(whole, StudentConfig(views=2)).lists()
    assert drawn[:3] == [[1, 2, 3, 4, 5], [6], [7, 8]] and len(drawn) == 3 + 2 * 2
    begin, part = drawn[3], drawn[5]
    assert begin == [1, 2, 3, 4, 5][: len(begin)] and 0 < len(begin) < 5
    assert 0 < len(part) < 5 and part == sorted(set(part) & {1, 2, 3, 4, 5})
    assert drawn == draw_histories(whole, StudentConfig(views=2)).lists()
    few = draw_histories(whole, StudentConfig(views=2, histories=4)).lists()
    assert len(few) == 4 and {tuple(h) for h in few} <= {tuple(h) for h in drawn}


def test_an_untrained_student_says_the_sum_of_the_history():
    student = Student(QUICK, 6, 4).eval()
    sums, states = torch.randn(3, 6) * 7, torch.randn(3, 4)
    torch.testing.assert_close(F.normalize(student(sums, states), dim=-1), F.normalize(sums, dim=-1))
    torch.nn.init.normal_(student.added.weight)
    assert not torch.equal(student(sums, states), student(sums, states * 0))
    torch.testing.assert_close(student(sums, states), student(sums * 5, states * 3))


def test_sums_are_of_unit_text_parts_newer_ones_heavier(teach):
    teacher = teach()
    text = teacher.embeddings[:, : teacher.model.d_text]
    assert text.shape[1] == teacher.embeddings.shape[1] - tiny.ID_MODEL.d_id
    expected = sum(0.8**age * F.normalize(text[i], dim=-1) for age, i in enumerate([4, 9, 2]))
    sums, states = task_of(teacher).student.user_side.inputs(tiny.histories([2, 9, 4]))
    torch.testing.assert_close(sums[0], expected)
    assert torch.equal(states, teacher.model.ids.user(tiny.histories([2, 9, 4])))


def test_it_learns_what_the_teacher_says(teach, tmp_path, kind):
    teacher = teach(kind)
    histories = DATA.cases("test").histories.take(range(20))
    config = StudentConfig(hidden=64, epochs=60, batch_size=32, lr=1e-2, dropout=0.0)
    made = distil.distil(teacher, DATA, tmp_path / "fast", config, False)

    def far(student):
        """Mean distance of the softmax over all items to the teacher's."""
        one, two = (m.score(histories).div(0.05).softmax(dim=-1) for m in (teacher.model, student))
        return float((one - two).abs().sum(dim=-1).mean())

    assert far(made.model) < 0.8 * far(distil._student(teacher, config).eval())


def test_a_step_is_the_cross_entropy_to_the_teachers_softmax(teach):
    teacher = teach()
    task = task_of(teacher, QUICK.model_copy(update={"dropout": 0.0}))
    torch.nn.init.normal_(task.module.added.weight, std=0.1)
    task.start(lambda: None)
    model, index = task.student, np.array([3, 50, 7])
    items = F.normalize(teacher.embeddings[:, : model.d_text], dim=-1)
    histories, total = task.histories.take(index), 0.0
    for user in range(3):
        one = histories.take([user])
        wanted = (F.normalize(teacher.model.users(one)[0, : model.d_text], dim=-1) @ items.T / 0.05).softmax(-1)
        said = task.module(*model.user_side.inputs(one))[0]
        total -= float((wanted * (F.normalize(said, dim=-1) @ items.T / 0.05).log_softmax(-1)).sum().detach())
    batch = task.batch(index)
    batch.hide[:] = False
    assert float(task.loss(batch, np.arange(3))["loss"]) == pytest.approx(total / 3, rel=1e-2)
    parts = [float(task.loss(batch, np.array(rows))["loss"]) for rows in ([0, 2], [1])]
    assert sum(parts) == pytest.approx(total / 3, rel=1e-2)  # shares of a batch add up to it


def test_it_answers_without_the_llm_wherever_the_model_goes(teach, tmp_path, no_llm, kind, llm):
    teacher = teach(kind)
    made = distil.distil(teacher, DATA, tmp_path / "fast", QUICK, False)
    histories, rows = {"anna": ["i1", "i2"], "bob": ["i9"]}, tiny.histories([0, 1], [8])
    no_llm()
    loaded = LaserRecommender.from_pretrained(tmp_path / "fast", llm())
    got = loaded.recommend(histories, k=4)
    assert got.equals(made.recommend(histories, k=4)) and got.height == 8
    users = loaded.encode_users(histories)
    assert np.array_equal(users, made.encode_users(histories))
    scores = torch.as_tensor(users) @ loaded.embeddings.T
    for term in loaded.model.terms:
        scores = term.on(rows).to_all(scores)
    torch.testing.assert_close(loaded.score(rows), scores, atol=1e-5, rtol=1e-4)
    assert [answer.expert for answer in loaded.rank([])] == []
    with pytest.raises(TypeError):
        teacher.recommend(histories, k=4)


def test_a_student_of_mean_items_loads_no_llm(teach, tmp_path, monkeypatch):
    made = distil.distil(teach(), DATA, tmp_path / "fast", QUICK, False)
    monkeypatch.setattr("laserrec.llm.text_features.load_backbone", lambda *a, **k: pytest.fail("the LLM was loaded"))
    loaded = LaserRecommender.from_pretrained(tmp_path / "fast")
    assert loaded.recommend([["i3"]]).equals(made.recommend([["i3"]]))


def test_new_items_are_read_by_the_llm_and_stand_in_histories(teach, tmp_path, kind, llm):
    teacher = teach(kind)
    made = distil.distil(teacher, DATA, tmp_path / "fast", QUICK, False)
    made.add_items(NEW)
    assert "new1" not in teacher.items["item_id"].to_list() and len(teacher.embeddings) == N
    teacher.add_items(NEW)
    np.testing.assert_allclose(made.encode_items(["new1"]), teacher.encode_items(["new1"]), atol=1e-6)
    assert "new1" in made.recommend([["i3"]], k=N + 1)["item_id"].to_list()
    one, two = made.encode_users([["new1"], ["i3"]])
    assert np.isfinite(one).all() and not np.allclose(one, two)
    made.save_pretrained(tmp_path / "grown")
    again = LaserRecommender.from_pretrained(tmp_path / "grown", llm())
    one, two = (m.recommend([["new1"]], k=3) for m in (again, made))
    assert one["item_id"].equals(two["item_id"]) and one["score"].to_list() == pytest.approx(two["score"].to_list())


def test_what_a_teacher_was_given_or_lost_its_student_has_and_lacks(teach, tmp_path, llm):
    teacher = teach()
    teacher.add_items(NEW)
    teacher.remove_items(["i4"])
    distil.distil(teacher, DATA, tmp_path / "fast", QUICK, False)
    made = LaserRecommender.from_pretrained(tmp_path / "fast", llm())
    assert made.n_known == N and made.removed == {3}
    assert set(made.recommend([["i3"]], k=99)["item_id"]) == {f"i{j + 1}" for j in range(N) if j != 3} | {"new1"}
    teacher.remove_items(["i5"])
    with pytest.raises(UserError, match="holds another model"):  # which would recommend it
        distil.distil(teacher, DATA, tmp_path / "fast", QUICK, False)


def test_nothing_but_training_sequences_matters(fit, tmp_path):
    students = []
    for name, last in (("a", [9, 8]), ("b", [3, 4])):
        data = tiny.dataset([[(s + p) % N for p in range(5)] + last for s in range(20)], N)
        model = fit(data, tmp_path / name, eval={"batch_size": 16, "validates": False},
                    **MEAN | {"train": PAPER["train"] | {"stage_one_epochs": 0}})
        students.append(weights(distil.distil(model, data, tmp_path / f"fast-{name}", QUICK, False)))
    tiny.assert_same(*students)


class Stop:
    """Ctrl-C during the n-th call of a method."""

    def __init__(self, call, at: int):
        self.call, self.left = call, at

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.call(*args)


@pytest.mark.parametrize(("owner", "where", "at"), [
    (task_module.Laser, "users", 1), (task_module.Laser, "users", 5), (Trainer, "_step", 1), (Trainer, "_step", 9)])
def test_stop_and_resume_is_the_uninterrupted_run(teach, tmp_path, monkeypatch, owner, where, at):
    monkeypatch.setattr(task_module, "_READ_AT_ONCE", 50)
    teacher = teach()
    whole = distil.distil(teacher, DATA, tmp_path / "whole", QUICK, False)
    with monkeypatch.context() as patch:
        stop = Stop(getattr(owner, where), at)
        patch.setattr(owner, where, lambda *a: stop(*a))
        with pytest.raises(KeyboardInterrupt):
            distil.distil(teacher, DATA, tmp_path / "fast", QUICK, False)
    assert not (tmp_path / "fast" / "model.json").exists()
    with pytest.raises(UserError, match="other settings or data"):
        distil.distil(teacher, DATA, tmp_path / "fast", QUICK.model_copy(update={"epochs": 7}), False)
    made = distil.distil(teacher, DATA, tmp_path / "fast", QUICK, False)
    tiny.assert_same(weights(made), weights(whole))
    assert not (tmp_path / "fast" / "checkpoint.safetensors").exists()


def test_a_finished_folder_is_loaded_and_another_one_refused(teach, fitted, fit, tmp_path, monkeypatch):
    teacher = teach()
    made = distil.distil(teacher, DATA, tmp_path / "fast", QUICK, False)
    for other in (made, fit(DATA, tmp_path / "popular", "popularity")):
        with pytest.raises(UserError, match="only a Laser that reads histories with the LLM can be distilled"):
            distil.distil(other, DATA, tmp_path / "faster", QUICK, False)
    with pytest.raises(UserError, match="another catalogue"):
        distil.distil(teacher, tiny.planted(N + 1, 30), tmp_path / "other", QUICK, False)
    for place, config in ((fitted("mean"), QUICK), (tmp_path / "fast", QUICK.model_copy(update={"seed": 3}))):
        with pytest.raises(UserError, match="holds another model"):
            distil.distil(teacher, DATA, place, config, False)
    with pytest.raises(UserError, match="other settings or other data"):  # a fit doesn't take it for its own
        fit(DATA, tmp_path / "fast", **MEAN)
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it trains again"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"mine holds thesis\.txt"):
        distil.distil(teacher, DATA, tmp_path / "mine", QUICK, False)
    tiny.assert_same(weights(distil.distil(teacher, DATA, tmp_path / "fast", QUICK, False)), weights(made))


def test_the_folder_says_what_it_is_and_is_checked(teach, fitted, tmp_path, llm):
    teacher, fast = teach(), tmp_path / "fast"
    teacher.facts["results"] = [{"split": "test", "recall@10": 1.0}]
    distil.distil(teacher, DATA, fast, QUICK, False)
    note = json.loads((fast / "model.json").read_text())
    assert note["format"] == 3 and note["config"]["student"]["hidden"] == 16
    assert [r["split"] for r in note["results"]] == ["validation"]  # not the teacher's
    both = note["student"]["validation"]
    assert both.keys() == {"teacher", "student"} and both["student"]["ndcg@10"] == note["results"][0]["ndcg@10"]
    assert "It is distilled" in (fast / "README.md").read_text()
    assert "It is distilled" not in (fitted("mean") / "README.md").read_text()
    assert "weights.safetensors" in shared_files(fast) and "id_model/weights.safetensors" in shared_files(fast)
    file = fast / "weights.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match=r"weights\.safetensors has changed"):
        LaserRecommender.from_pretrained(fast, llm())


def test_what_is_told_of_the_training_is_the_students(teach, tmp_path):
    teacher, fast = teach(), tmp_path / "fast"
    taught = teacher.facts["training"] = {**teacher.facts["training"], "seconds": 12345.6}
    taught["kept"] = {**taught["kept"], "validation_ndcg@10": 0.98765}
    distil.distil(teacher, DATA, fast, QUICK, False)
    note = json.loads((fast / "model.json").read_text())
    own, both = note["training"], note["student"]["validation"]
    assert own["teacher"] == taught and own["seconds"] == note["student"]["seconds"] and own["epochs"] == 2
    assert validated(own) == {name: value for name, value in both["student"].items() if name != "seconds"}
    card = (fast / "README.md").read_text()
    assert f"| validation | {both['student']['recall@10']:.4f} |" in card and "0.9876" not in card
    assert f"| seconds of training | {own['seconds']:,.0f} |" in card
    assert "| of the model that it was distilled from | 12,346 |" in card


def test_of_a_student_whose_network_has_learnt_from_validation_users_nothing_is_told_on_these(teach, tmp_path):
    teacher, fast = teach(), tmp_path / "fast"
    parts = {"network": {"kept": True, "network": 0.98765}, "ndcg@10": {"chosen": 0.98765}, "users": 30}
    teacher.facts["training"] = {**teacher.facts["training"], "parts": parts}
    distil.distil(teacher, DATA, fast, QUICK, False)
    training = json.loads((fast / "model.json").read_text())["training"]
    assert trained_on_validation(training) and validated(training) == {}
    card = (fast / "README.md").read_text()
    assert "None were recorded." in card and "0.9876" not in card


def test_a_large_catalogue_is_drawn_from(teach, monkeypatch):
    monkeypatch.setattr(task_module, "_MOST_ITEMS", 7)
    task = task_of(teach())
    one, two = task.batch(np.arange(4)), task.batch(np.arange(4))
    assert len(set(one.items.tolist())) == len(set(two.items.tolist())) == 7 and not torch.equal(one.items, two.items)
    task.start(lambda: None)
    assert torch.isfinite(task.loss(one, np.arange(4))["loss"])
    monkeypatch.undo()
    assert task.batch(np.arange(4)).items is None


def test_its_rate_warms_up_and_falls(teach):
    phase = distil_phase(task_of(teach()))
    assert phase.cosine_decay and 0 < phase.warmup_fraction <= 0.5 and not phase.validates
