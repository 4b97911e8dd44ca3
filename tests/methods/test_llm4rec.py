"""LLM4REC: the LLM's own outputs without edges, edges against naive loops, who is known, and a planted order."""

import itertools
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.config import LLM4RecConfig
from laserrec.methods import llm4rec
from laserrec.methods.llm4rec import Edges, LLM4Rec, LLM4RecTask, prefix_hashes
from laserrec.methods.protocol import TwoTower
from laserrec.training.trainer import Pace, Trainer
from laserrec.util.errors import UserError

N = 20
ROWS = [[0, 1, 2, 3], [0, 1, 5], [1, 5, 0, 0], [7, 8, 9]]


def make(llm, family: str = "llama", **own) -> LLM4Rec:
    torch.manual_seed(1)
    return LLM4Rec(LLM4RecConfig(**{"max_history": 6} | own), N, tiny.items(N), llm(family)).eval()


@pytest.mark.parametrize("family", tiny.NATIVE)
@torch.no_grad()
def test_without_edges_its_layers_are_the_llms(llm, family):
    model, backbone = make(llm, family), llm(family)
    model.know(tiny.histories(*ROWS))
    model.edges = Edges(N)
    items = torch.tensor([[3, 4, 5]])
    embeds = torch.cat([model.front, model.user[[2]], model.back, model.item[items[0]]])
    want = backbone.decoder(embeds[None])[0, -3:]
    torch.testing.assert_close(model.states(items, torch.tensor([2]))[0], want, rtol=1e-3, atol=1e-4)


def test_an_items_token_starts_from_its_title(llm):
    model, backbone = make(llm), llm()
    title = backbone.tokenizer(tiny.items(N)["title"][4], add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(model.item[4].detach(), backbone.embedding[title].mean(dim=0))
    before = backbone.tensor_hash()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert backbone.tensor_hash() == before, "the LLM that others use stays as it is"


def test_edges_are_counted_as_by_loops():
    edges = Edges(N)
    edges.fit(tiny.histories(*ROWS))
    items = torch.tensor([[0, 1, 5, 9, 0]])
    got = edges(items)[0]
    for (a, i), (b, j) in itertools.product(enumerate(items[0].tolist()), repeat=2):
        both = sum(i in row and j in row for row in ROWS)
        assert float(got[a, b]) == pytest.approx(math.log(both) if both and i != j else 0.0, abs=1e-6)
    assert Edges(N)(items).abs().sum() == 0


@torch.no_grad()
def test_an_edges_weight_is_added_to_the_attention(llm):
    """With a huge weight of the edges between items an item reads its neighbour in the graph alone."""
    model = make(llm)
    model.know(tiny.histories(*ROWS))
    unknown, items, other = torch.tensor([4]), torch.tensor([[1, 9, 5]]), torch.tensor([[1, 7, 5]])
    assert not torch.allclose(model.states(items, unknown)[0, 2], model.states(other, unknown)[0, 2], atol=1e-3)
    for layer in model.layers:
        layer.edge[1] = 1e4
    torch.testing.assert_close(model.states(items, unknown)[0, 2], model.states(other, unknown)[0, 2])
    layer = model.layers[0]
    x, edges = torch.randn(1, 4, 32), torch.zeros(2, 1, 4, 4)
    rotary = llm4rec.rotary_tables(torch.arange(4), model.inverse_frequency)
    layer.edge[:] = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 0.3, 0.0, 4.0]])
    edges[0, 0, 3, 1], edges[1, 0, 3, 2] = 1.0, 0.7
    torch.testing.assert_close(layer(x, rotary, edges), naive(layer, x[0], rotary, edges[:, 0])[None], rtol=1e-4,
                               atol=1e-4)


def naive(layer, x, rotary, edges):
    """One layer, token by token and head by head."""
    def norm(t):
        return t / (t.square().mean(dim=-1, keepdim=True) + s.norm_eps).sqrt()

    def turn(t, p):
        first, second = t.chunk(2)
        return torch.cat([first * rotary[0][p] - second * rotary[1][p], second * rotary[0][p] + first * rotary[1][p]])

    s = layer.shape
    qkv, out = (norm(x) @ layer.qkv.T).view(len(x), -1, s.head_dim), torch.zeros(len(x), s.heads, s.head_dim)
    for t, h in itertools.product(range(len(x)), range(s.heads)):
        key = s.heads + h // s.groups
        logits = [float(turn(qkv[t, h], t) @ turn(qkv[p, key], p)) / s.head_dim**0.5
                  + sum(float(edges[k, t, p] * layer.edge[k, h]) for k in range(2)) for p in range(t + 1)]
        weights = torch.tensor(logits).softmax(dim=0)
        out[t, h] = sum(w * qkv[p, key + s.kv_heads] for p, w in enumerate(weights))
    x = x + out.flatten(1) @ layer.out.T
    gate, up = (norm(x) @ layer.gate_up.T).chunk(2, dim=-1)
    return x + (F.silu(gate) * up) @ layer.down.T


@torch.no_grad()
def test_a_user_is_known_by_a_whole_training_sequence(llm):
    model = make(llm)
    model.know(tiny.histories([0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 9, 9], [9, 9, 9], [0, 1, 2, 5]))
    asked = tiny.histories([0, 1, 2], [0, 1, 2, 9], [1, 0, 2], [3, 4, 5], [5, 6, 7], [5, 6, 7, 8, 1], [9, 9, 9],
                           [0, 1, 2, 5, 4])
    users, taken = model.known_users(asked)
    assert users.tolist() == [0, 0, 6, 6, 6, 2, 6, 5]
    assert [row[flags].tolist() for row, flags in zip(asked, taken.split(asked.lengths.tolist()), strict=True)] == [
        [0, 1, 2], [0, 1, 2], [], [], [], [5, 6, 7, 8], [], [0, 1, 2, 5]]
    again = model.known_users(tiny.histories([3, 4], [0, 1, 2, 9, 1]))[1]
    assert again.tolist() == [False, False, True, True, True, False, True], "taken in training, and once more"
    hashes = prefix_hashes(tiny.histories(*itertools.permutations(range(5))))
    assert len(hashes.unique()) == 5 + 20 + 60 + 120 + 120


@torch.no_grad()
def test_an_output_depends_on_nothing_behind_it_nor_on_the_batch(llm):
    model = make(llm)
    model.know(tiny.histories(*ROWS))
    users = torch.tensor([1])
    first, second = (model.states(torch.tensor([[3, 4, 5, last]]), users) for last in (6, 9))
    torch.testing.assert_close(first[:, :3], second[:, :3])
    asked = tiny.histories([3, 4, 5, 6, 7], [8], [0, 1, 2, 3, 9])
    scores = model.score(asked)
    assert isinstance(model, TwoTower)
    torch.testing.assert_close(scores[1:2], model.score(tiny.histories([8])), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, model.users(asked) @ model.items().T)
    with pytest.raises(UserError, match=r"history 1 .*empty"):
        model.users(tiny.histories([1], []))


def walk(shift: int = 0):
    """Users who walk up the items; `shift` changes validation and test items and nothing else."""
    rng = np.random.default_rng(0)
    rows = [[int(start + p) % N for p in range(length)]
            for start, length in zip(rng.integers(0, N, 40), rng.integers(5, 9, 40), strict=True)]
    return tiny.dataset([[*row[:-2], *((i + shift) % N for i in row[-2:])] for row in rows], N)


def test_the_graph_and_the_examples_are_of_the_training_split_alone(llm):
    models = [make(llm), make(llm)]
    tasks = [LLM4RecTask(model, walk(shift)) for model, shift in zip(models, (0, 7), strict=True)]
    for name in ("edges.pairs", "edges.weights", "known_hashes", "known_rows"):
        assert torch.equal(models[0].state_dict()[name], models[1].state_dict()[name]), name
    examples = [task.begin_epoch(1) for task in tasks]
    assert examples[0].sequences.lists() == examples[1].sequences.lists() == walk().train_sequences.lists()


def test_the_loss_is_that_of_each_next_item_in_any_partition(llm):
    model = make(llm, user_dropout=0.0)
    task = LLM4RecTask(model, tiny.dataset([[*row, 1, 2] for row in ROWS], N))
    batch = task.begin_epoch(1).batch(np.arange(4))
    assert batch.users.tolist() == [0, 1, 2, 3]
    want = []
    for user, row in enumerate(ROWS):
        for cut in range(1, len(row)):
            states = model.states(torch.tensor([row[:cut]]), torch.tensor([user]), torch.ones(1, cut).bool())
            want.append(float(F.cross_entropy(states[0, -1] @ model.items().T, torch.tensor(row[cut])).detach()))
    assert float(task.loss(batch, np.arange(4))["loss"].detach()) == pytest.approx(np.mean(want), rel=1e-4)
    parts = sum(float(task.loss(batch, rows)["loss"].detach()) for rows in (np.array([3, 0]), np.array([1, 2])))
    assert parts == pytest.approx(np.mean(want), rel=1e-4)
    task.loss(batch, np.arange(4))["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters()), "all of it is trained"


@torch.no_grad()
def test_a_learnt_seen_offset_is_in_the_loss_and_in_the_scores(llm):
    plain, model = make(llm, user_dropout=0.0), make(llm, user_dropout=0.0, seen_offset=True)
    tasks = [LLM4RecTask(one, tiny.dataset([[*row, 1, 2] for row in ROWS], N)) for one in (plain, model)]
    model.load_state_dict(plain.state_dict() | {"seen.offset": torch.tensor(-3.0)})
    want = []
    for user, row in enumerate(ROWS):
        for cut in range(1, len(row)):
            states = plain.states(torch.tensor([row[:cut]]), torch.tensor([user]), torch.ones(1, cut).bool())
            logits = states[0, -1] @ plain.items().T
            for item in set(row[:cut]):
                logits[item] -= 3
            want.append(float(F.cross_entropy(logits, torch.tensor(row[cut]))))
    loss = tasks[1].loss(tasks[1].begin_epoch(1).batch(np.arange(4)), np.arange(4))["loss"]
    assert float(loss) == pytest.approx(np.mean(want), rel=1e-4)
    gap = model.eval().score(tiny.histories([3, 4, 3])) - plain.eval().score(tiny.histories([3, 4, 3]))
    assert gap.round(decimals=3).nonzero().tolist() == [[0, 3], [0, 4]]


@pytest.mark.parametrize("edges", [True, False])
def test_a_planted_order_is_learnt_and_new_users_are_served(llm, tmp_path, edges):
    data = tiny.planted(N, 60)
    torch.manual_seed(0)
    model = LLM4Rec(LLM4RecConfig(max_history=8, lr=3e-3, batch_size=16, max_epochs=12, eval_every=4, edges=edges), N,
                    data.items, llm())
    fit = Trainer(llm4rec.phases(model, tiny.config("x"), data), data, tmp_path, "x", Pace(progress=False))
    fit.run()
    assert fit.place.best > 0.8
    new = model.eval().score(tiny.histories(*([(s + p) % N for p in range(3)] for s in range(N)))).argmax(dim=1)
    assert (new == (torch.arange(N) + 3) % N).float().mean() > 0.8
    again = llm4rec.restore(make(llm, max_history=8, edges=edges), model.state_dict())
    asked = data.cases("test").histories
    assert torch.equal(again.score(asked), model.score(asked)) and not any(p.requires_grad for p in again.parameters())


def test_an_llm_that_can_not_be_trained_is_refused(llm):
    with pytest.raises(UserError, match="llm4rec trains the weights of a native decoder"):
        make(llm, "gpt2")
