"""LlamaRec: the low-rank updates against merged weights, the prompt, the order of scores, and a planted case."""

import copy
import dataclasses

import numpy as np
import polars as pl
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.methods import llamarec
from laserrec.methods.llamarec import LlamaRec, RankerTask, RetrieverTask
from laserrec.methods.protocol import TwoTower
from laserrec.training.trainer import Pace, Trainer
from laserrec.util.errors import UserError

N = 12
SMALL = {"candidates": 5, "max_history": 3, "title_tokens": 6, "lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.0,
         "epoch_examples": None}


def config(backbone, **own):
    tree = tiny.config(backbone.name, llamarec={**SMALL, **own}, lrurec={"d_id": 16, "blocks": 1, "max_history": 6})
    return tree.model_copy(update={"backbone": backbone.config})


def make(backbone, n: int = N, items: pl.DataFrame | None = None, **own) -> LlamaRec:
    """Its updates are far from zero."""
    torch.manual_seed(1)
    model = LlamaRec(config(backbone, **own), n, tiny.items(n) if items is None else items, backbone)
    with torch.no_grad():
        for parameter in model.lora.parameters():
            parameter.normal_(std=0.2)
    model.ranks.fill_(True)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_updates_are_those_of_merged_weights(llm, family):
    backbone = llm(family)
    model, prompts = make(backbone), [[3, 4, 5, 6, 9], [7, 8]]
    embeds = backbone.embed(torch.tensor([*prompts[0], *prompts[1]]))
    merged, shape = copy.deepcopy(backbone.decoder), backbone.decoder.shape
    for layer, update in zip(merged.layers, model.lora, strict=True):
        q_dim = shape.heads * shape.head_dim
        layer.qkv[:q_dim] += 4.0 / 2 * update.q_up @ update.q_down
        layer.qkv[q_dim + shape.kv_dim :] += 4.0 / 2 * update.v_up @ update.v_down
    want = merged.read_rows(embeds.split([5, 2]), last_only=True)
    torch.testing.assert_close(model._read(embeds, [5, 2]), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want, backbone.decoder.read_rows(embeds.split([5, 2]), last_only=True), atol=1e-2)


def test_fresh_updates_change_nothing_and_alone_are_trained(llm):
    backbone = llm()
    model = LlamaRec(config(backbone), N, tiny.items(N), backbone)
    embeds = backbone.embed(torch.tensor([3, 4, 5]))
    torch.testing.assert_close(model._read(embeds, [3]), backbone.decoder.read_rows([embeds], last_only=True),
                               rtol=1e-5, atol=1e-6)
    before = backbone.tensor_hash()
    model.ranks.fill_(True)
    model.letter_logits(tiny.histories([0, 1]), torch.tensor([[3, 4, 5]])).logsumexp(dim=1).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} >= {"lora.0.q_up", "lora.2.v_up"}
    assert all(p.grad is None for p in model.retriever.parameters()) and backbone.tensor_hash() == before


def test_the_prompt_has_titles_behind_numbers_and_letters(llm):
    prompts = make(llm()).prompts
    titles = tiny.items(N)["title"].to_list()
    text = llm().tokenizer.decode(prompts([9, 0, 1, 2], [4, 3]))
    assert "User history:\n(1) " + titles[0][:3] in text and "\n(3) " in text and "\n(4) " not in text
    assert "\nCandidates:\n(A) " in text and "\n(B) " in text and "\n(C) " not in text
    assert text.index("(A) " + titles[4][:3]) < text.index("(B) " + titles[3][:3])
    assert text.endswith("### Response:\n") and max(map(len, prompts.titles)) <= SMALL["title_tokens"]
    assert llm().tokenizer.decode(prompts.letters) == "ABCDE"


@torch.no_grad()
def test_candidates_stand_first_in_the_llms_order_and_the_rest_keeps_the_retrievers(llm):
    model, asked = make(llm()), tiny.histories([0, 1, 2], [5], [7, 8, 9, 10])
    retrieved, scores = model.retriever.score(asked), model.score(asked)
    assert isinstance(model, TwoTower)
    for user in range(3):
        first = retrieved[user].argsort(descending=True)[:5]
        logits = model.letter_logits(asked.take([user]), first[None])[0]
        want = [*first[logits.argsort(descending=True)].tolist(),
                *[i for i in retrieved[user].argsort(descending=True).tolist() if i not in first]]
        assert scores[user].argsort(descending=True).tolist() == want
        assert len(set(scores[user].tolist())) == N, "no ties"
    applied, plain = model.on(asked), model.users(asked) @ model.items().T
    torch.testing.assert_close(applied.to_all(plain.clone()), scores)
    rows = torch.tensor([11, 3, 0])
    torch.testing.assert_close(applied.to_some(1, rows, plain[1, rows]), scores[1, rows])
    assert applied.rows(1).tolist() == sorted(retrieved[1].argsort(descending=True)[:5].tolist())
    model.ranks.fill_(False)
    assert torch.equal(model.score(asked), retrieved) and not model.terms


@pytest.mark.parametrize("ranks", [False, True])
@torch.no_grad()
def test_the_retrievers_seen_offset_is_a_term_too(llm, ranks):
    """So that a retrieval by vectors, which applies the terms, finds what the model's own scores say."""
    backbone, asked = llm(), tiny.histories([0, 1, 2], [5], [7, 8, 9, 10])
    tree = config(backbone)
    tree = tree.model_copy(update={"lrurec": tree.lrurec.model_copy(update={"seen_offset": True})})
    model = LlamaRec(tree, N, tiny.items(N), backbone).eval()
    model.ranks.fill_(ranks)
    model.retriever.seen.offset.fill_(-1e3)
    scores = model.users(asked) @ model.items().T
    for term in model.terms:
        scores = term.on(asked).to_all(scores)
    assert torch.equal(scores, model.score(asked))
    assert all(set(row.topk(3).indices.tolist()) == {0, 1, 2} for row in -scores[:1])


@torch.no_grad()
def test_logits_do_not_depend_on_the_batch_and_fewer_items_than_letters_are_fine(llm):
    model = make(llm())
    asked, rows = tiny.histories(*([[i % N, 1] for i in range(20)])), torch.arange(20)[:, None] % 7 + torch.arange(5)
    together = model.letter_logits(asked, rows)
    alone = model.letter_logits(asked.take([17]), rows[17:18])
    torch.testing.assert_close(together[17:18], alone, rtol=1e-3, atol=1e-4)
    few = make(llm(), n=3)
    assert len(set(few.score(tiny.histories([0]))[0].tolist())) == 3


def test_examples_hide_the_answer_among_items_that_are_not_in_the_history(llm):
    model, data = make(llm()), tiny.planted(N, 30)
    task = RankerTask(model, data)
    examples = task.begin_epoch(1)
    assert len(examples.lengths) == int((data.train_sequences.lengths - 1).sum())
    torch.manual_seed(5)
    batch = examples.batch(np.arange(len(examples.lengths)))
    answers = batch.candidates.gather(1, batch.answers[:, None])[:, 0]
    assert [h[-1] for h in batch.histories.lists()] == [(i - 1) % N for i in answers.tolist()]
    for history, row in zip(batch.histories.lists(), batch.candidates.tolist(), strict=True):
        assert len(set(row)) == 5 and not set(row) & set(history)
    assert set(batch.answers.tolist()) == set(range(5))
    prompts = [model.prompts(h, c) for h, c in zip(batch.histories.lists(), batch.candidates.tolist(), strict=True)]
    assert np.abs(examples.lengths / [len(p) for p in prompts] - 1).max() < 0.3
    few = RankerTask(make(llm(), epoch_examples=7), data)
    assert len(few.begin_epoch(1).lengths) == 7 and not np.array_equal(few.begin_epoch(1).cut, few.begin_epoch(2).cut)


@torch.no_grad()
def test_the_loss_is_the_letters_cross_entropy_in_any_partition(llm):
    model = make(llm())
    task = RankerTask(model, tiny.planted(N, 20))
    batch = task.begin_epoch(1).batch(np.arange(6))
    model.eval()
    want = [float(F.cross_entropy(model.letter_logits(batch.histories.take([i]), batch.candidates[[i]]),
                                  batch.answers[[i]])) for i in range(6)]
    assert float(task.loss(batch, np.arange(6))["loss"]) == pytest.approx(np.mean(want), rel=1e-4)
    parts = sum(float(task.loss(batch, rows)["loss"]) for rows in (np.array([4, 0]), np.array([1, 2, 3, 5])))
    assert parts == pytest.approx(np.mean(want), rel=1e-4)


def test_the_ranker_finds_what_only_the_titles_tell(llm, tmp_path, monkeypatch):
    """After a wooden item comes one of the two called steel. The retriever is hardly trained, and in training chance
    places the answer among the candidates."""
    for name in ("_INSTRUCTION", "_CANDIDATES", "_RESPONSE"):  # short prompts, to be quick
        monkeypatch.setattr(llamarec, name, "\n")
    rng, n = np.random.default_rng(0), 8
    data = tiny.dataset([[rng.integers(2, n), rng.integers(0, 2), 0, 0] for _ in range(160)], n)
    titles = pl.Series("title", ["steel"] * 2 + ["wood"] * 6)
    data = dataclasses.replace(data, items=data.items.with_columns(titles))
    tree = config(llm(), candidates=2, max_history=1, lora_rank=8, lora_alpha=32.0, lr=1e-2, max_epochs=6,
                  batch_size=16)
    tree = tree.model_copy(update={"lrurec": tree.lrurec.model_copy(update={"max_epochs": 1, "lr": 1e-6})})
    torch.manual_seed(0)
    model = LlamaRec(tree, n, data.items, llm())
    fit = Trainer(llamarec.phases(model, tree, data), data, tmp_path, "x", Pace(progress=False, validates=False))
    assert [entry["phase"] for entry in fit.run()] == ["retriever", *["ranker"] * 6]
    assert model.eval().sizes() == {"llm_ranks": 1}
    asked = tiny.histories(*([item] for item in range(2, n)))
    for first, second in ((0, 7), (7, 0), (1, 2), (2, 1)):  # as the retriever places them
        with torch.no_grad():
            model.retriever.bias.zero_()[[first, second]] = torch.tensor([9.0, 8.0])
        best = model.score(asked).argmax(dim=1)
        assert (best == min(first, second)).float().mean() > 0.9, (first, second)


def test_the_retriever_alone_is_kept_where_it_is_better(llm, tmp_path):
    data = tiny.planted(N, 30)
    tree = config(llm(), lr=1e-9)
    tree = tree.model_copy(update={"lrurec": tree.lrurec.model_copy(
        update={"max_epochs": 30, "lr": 1e-2, "batch_size": 8, "eval_every": 10, "dropout": 0.0})})
    torch.manual_seed(0)
    model = LlamaRec(tree, N, data.items, llm())
    fit = Trainer(llamarec.phases(model, tree, data), data, tmp_path, "x", Pace(progress=False))
    fit.run()
    assert model.sizes() == {"llm_ranks": 0} and fit.summary()["kept"]["phase"] == "retriever"
    assert isinstance(fit.phases[0].task, RetrieverTask)


def test_an_llm_that_can_not_rank_is_refused(llm):
    with pytest.raises(UserError, match="llamarec needs the native decoder"):
        make(llm("gpt2"))


def test_forged_sizes_are_found_before_anything_is_allocated(llm):
    model = make(llm())
    weights = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    shapes = llamarec.shapes(config(llm()), N)
    assert all(weights[name] == shape for name, shape in shapes.items())
    assert llamarec.shapes(config(llm(), lora_rank=10**7), N) != shapes
