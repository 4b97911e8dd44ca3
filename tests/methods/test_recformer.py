"""RECFORMER: sliding attention against a dense mask, its stages, pre-training, and items known by their text alone."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.config import RecFormerConfig
from laserrec.data.dataset import Dataset
from laserrec.methods import recformer
from laserrec.methods.all import METHODS
from laserrec.methods.attribute_text import CLS, Attributes
from laserrec.methods.protocol import Growing, TwoTower
from laserrec.methods.recformer import PretrainTask, RecFormer, RecFormerTask, sliding_attention
from laserrec.training.trainer import Pace, Trainer
from laserrec.util.errors import UserError

N = 12
SMALL = {"d_model": 32, "blocks": 2, "heads": 2, "dropout": 0.0, "window": 8, "max_items": 3, "max_tokens": 64,
         "attribute_tokens": 10, "lr": 3e-3, "batch_size": 16, "eval_every": 1}


def config(**own) -> RecFormerConfig:
    return RecFormerConfig(**SMALL | own)


def make(llm, items: pl.DataFrame | None = None, **own) -> RecFormer:
    torch.manual_seed(1)
    return RecFormer(config(**own), tiny.items(N) if items is None else items, llm()).eval()


def dense(q, k, v, real, half):
    """The same by one mask over all pairs."""
    place = torch.arange(q.shape[2])
    near = (place[:, None] - place).abs() <= half
    near[0], near[:, 0] = True, True
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~(near & real[:, None, None]), -torch.inf).softmax(dim=-1) @ v


@pytest.mark.parametrize(("seq", "half"), [(1, 2), (3, 2), (8, 4), (17, 4), (20, 3), (9, 16)])
def test_sliding_attention_is_dense_attention_under_a_mask(seq, half):
    torch.manual_seed(seq)
    parts = [torch.randn(3, 2, seq, 5, requires_grad=True) for _ in range(3)]
    real = torch.arange(seq) < torch.tensor([[seq], [max(1, seq - 2)], [1]])
    gradients = []
    for attend in (sliding_attention, dense):
        out = attend(*parts, real, half)
        kept = out.transpose(1, 2)[real]
        gradients.append([kept, *torch.autograd.grad((kept * torch.arange(kept.numel()).view_as(kept)).sum(), parts)])
    for mine, want in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_embedding_does_not_depend_on_its_batch_and_knows_order_and_keys(llm):
    model = make(llm)
    together = model.users(tiny.histories([0, 1, 2], [3], [4, 5]))
    torch.testing.assert_close(together[1:2], model.users(tiny.histories([3])), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert not torch.allclose(model.users(tiny.histories([2, 1, 0])), together[:1], atol=1e-4)
    torch.testing.assert_close(model.users(tiny.histories([7, 0, 1, 2])), together[:1])  # three items are read
    texts = model.attributes.read(tiny.histories([0]))
    plain = model.states(texts)
    for name, other in (("types", torch.where(texts.types == 1, 2, texts.types)), ("places", texts.places * 2)):
        assert not torch.allclose(plain, model.states(dataclasses.replace(texts, **{name: other})), atol=1e-4), name


def test_items_are_encoded_anew_in_stage_one_and_fixed_in_stage_two(llm):
    model, data = make(llm), tiny.planted(N, 20)
    first, second = (RecFormerTask(model, data, fixed) for fixed in (False, True))
    first.start(lambda: None)
    start = model.vectors.clone()
    examples = first.begin_epoch(1)
    assert torch.equal(model.vectors, start)
    with torch.no_grad():
        model.word.weight.add_(torch.randn_like(model.word.weight))
    again = RecFormerTask(model, data, fixed=False)  # a resumed epoch
    again.load({name: tensor.clone() for name, tensor in first.state().items()})
    again.begin_epoch(1)
    assert torch.equal(model.vectors, start)
    first.begin_epoch(2)
    moved = model.vectors.clone()
    assert not torch.allclose(moved, start, atol=1e-3)
    with torch.no_grad():
        model.word.weight.add_(torch.randn_like(model.word.weight))
    second.start(lambda: None)
    second.begin_epoch(3)
    assert torch.equal(model.vectors, moved)
    batch, model = examples.batch(np.arange(5)), model.eval()
    with torch.no_grad():
        want = [float(F.cross_entropy(model.users(batch.histories.take([i])) @ moved.T / 0.05, batch.targets[[i]]))
                for i in range(5)]
        told = float(first.loss(batch, np.arange(5))["loss"])
    assert told == pytest.approx(np.mean(want), rel=1e-3)


def kinds(users: int = 150, n: int = 40, seed: int = 0) -> Dataset:
    """Each user stays with one of four kinds of items. An item's title holds one of the two words of its kind, so that
    likeness of texts alone does not tell which two words belong together."""
    rng = np.random.default_rng(seed)
    word = rng.integers(0, 8, n)
    rows = [rng.choice(np.flatnonzero(word % 4 == rng.integers(0, 4)), 5).tolist() for _ in range(users)]
    data, titles = tiny.dataset(rows, n), [f"{tiny.WORDS[w]} {i}" for i, w in enumerate(word)]
    return dataclasses.replace(data, items=data.items.with_columns(pl.Series("title", titles)))


@torch.no_grad()
def own_kind_first(model: RecFormer, titles: list[str], first: int = 0) -> float:
    """Share of users of one item whose best item, of those from `first` on with another word, is of the same kind. One
    in seven by chance."""
    word = torch.tensor([tiny.WORDS.index(title.split()[0]) for title in titles])
    scores = model.score(tiny.histories(*([i] for i in range(len(titles)))))
    scores = scores.masked_fill(word[:, None] == word, -2.0)
    best = scores[:, first:].argmax(dim=1) + first
    return float((word[best] % 4 == word % 4).float().mean())


def test_what_only_titles_tell_is_learnt_and_carried_to_new_items(llm, tmp_path):
    data = kinds()
    model = make(llm, data.items, blocks=1, batch_size=8, max_epochs=8, stage_two_epochs=1)
    assert isinstance(model, TwoTower) and isinstance(model, Growing)
    fit = Trainer(recformer.phases(model, tiny.config("x"), data), data, tmp_path, "x", Pace(progress=False))
    log = fit.run()
    model.eval().requires_grad_(False)
    titles = data.items["title"].to_list()
    assert {entry["phase"] for entry in log} == {"stage 1", "stage 2"} and own_kind_first(model, titles) > 0.9
    new = kinds(users=1, n=24, seed=7).items
    old = model.vectors.clone()
    vectors = model.add_items(new)
    assert vectors.shape == (24, 32) and torch.equal(model.vectors[:40], old)
    assert own_kind_first(model, titles + new["title"].to_list(), first=40) > 0.9
    elsewhere = model.transferred(new)
    torch.testing.assert_close(elsewhere.items(), vectors)
    torch.testing.assert_close(elsewhere.users(tiny.histories([3, 5])), model.users(tiny.histories([43, 45])))
    model.attributes.truncate(40)
    model.vectors = old
    torch.testing.assert_close(model.add_items(new, vectors), vectors)
    saved, kept = model.state_dict(), model.item_tensors()
    grown = pl.concat([data.items, new.select(data.items.columns)])
    again = recformer.restore(make(llm, grown, blocks=1), saved, kept)
    asked = tiny.histories([0, 45], [3])
    torch.testing.assert_close(again.score(asked), model.score(asked))
    with pytest.raises(RuntimeError, match="embeddings of shape"):
        recformer.restore(make(llm, data.items, blocks=1), saved, kept)


@pytest.fixture
def elsewhere(monkeypatch):
    """Another data folder, in memory."""
    other = kinds(seed=3)
    monkeypatch.setattr(recformer.Dataset, "load", staticmethod(lambda folder: other))
    return other


def test_pretraining_elsewhere_serves_this_catalogue_without_training(llm, tmp_path, elsewhere):
    data = kinds()
    model = make(llm, data.items, pretrain_on=("other",), pretrain_epochs=8, max_epochs=0, stage_two_epochs=0)
    fit = Trainer(recformer.phases(model, tiny.config("x"), data), data, tmp_path, "x", Pace(progress=False))
    log = fit.run()
    assert [entry["phase"] for entry in log] == ["pre-training"] * 8 + ["stage 1"]
    assert own_kind_first(model.eval(), data.items["title"].to_list()) > 0.9
    assert log[-1]["validation_ndcg@10"] == fit._validate(fit.phase).ndcg


def test_pretraining_on_ones_own_and_another_catalogue_keeps_each_items_text(llm, elsewhere):
    data = kinds()
    for given, sources in (({"pretrain_own": True}, [data]), ({"pretrain_on": ("other",)}, [elsewhere]),
                           ({"pretrain_own": True, "pretrain_on": ("other",)}, [data, elsewhere])):
        model = make(llm, data.items, **given)
        task = recformer.phases(model, tiny.config("x"), data)[0].task
        read = task.attributes.read(task.sequences).tokens
        own = [Attributes(model.backbone, model.config, s.items).read(s.train_sequences).tokens for s in sources]
        assert isinstance(task, PretrainTask) and len(read) == sum(map(len, own))
        for row, one in zip(read, (row for rows in own for row in rows), strict=True):
            assert row[:len(one)].equal(one[:len(row)])
    assert [phase.name for phase in recformer.phases(make(llm), tiny.config("x"), data)] == ["stage 1", "stage 2"]


def test_pretraining_hides_tokens_and_never_reads_the_other_catalogues_tests(llm, elsewhere):
    model = make(llm, pretrain_on=("other",), mask_probability=0.5)
    task = PretrainTask(model, tiny.planted(N, 20), [elsewhere])
    assert [row[:3] for row in task.sequences.lists()] == [row[:3] for row in elsewhere.train_sequences.lists()]
    texts = task.attributes.read(task.sequences.take(np.arange(60)))
    asked = texts.real & (texts.types != CLS) & (torch.rand(texts.tokens.shape) < 0.5)
    hidden = task._hidden(texts.tokens, asked)
    assert torch.equal(hidden[~asked], texts.tokens[~asked])
    masked = (hidden == task.attributes.cls + 1)[asked].float().mean()
    assert 0.7 < masked < 0.9 and 0.05 < (hidden == texts.tokens)[asked].float().mean() < 0.25
    model.train()
    told = task.loss(task.begin_epoch(1).batch(np.arange(9)), np.arange(9))
    loss, contrast, hidden = (float(told[name].detach()) for name in ("loss", "contrast", "hidden"))
    assert loss == pytest.approx(contrast + 0.1 * hidden, rel=1e-5) and hidden > 1
    told["loss"].backward()
    assert model.mask_head.weight.grad.abs().sum() > 0 and model.special.weight.grad[1].abs().sum() > 0


def test_forged_sizes_are_found_before_anything_is_allocated(llm):
    weights = {name: tuple(w.shape) for name, w in make(llm).state_dict().items()}
    shapes = recformer.shapes(config())
    assert all(weights[name] == shape for name, shape in shapes.items())
    assert recformer.shapes(config(max_tokens=10**9))["position.weight"] != weights["position.weight"]


def test_an_attribute_that_no_item_has_is_told(llm):
    model = make(llm, attributes=("title", "colour"))
    with pytest.raises(UserError, match=r"recformer\.attributes names 'colour'.*there are: title, brand, category"):
        recformer.phases(model, tiny.config("x"), tiny.planted(N, 9))


def test_other_pretraining_data_make_another_fit(elsewhere):
    reads = METHODS["recformer"].reads
    assert reads(tiny.config("x")) == ""
    assert reads(tiny.config("x", recformer={"pretrain_on": ("other",)})) == elsewhere.fingerprint
