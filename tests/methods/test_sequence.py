"""SASRec and BERT4Rec: what a state may depend on, the losses against naive loops, and a planted order."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from laserrec.config import IdModelConfig
from laserrec.methods.sequence import load_weights, make_id_model, pad_histories
from laserrec.util.errors import UserError

N = 30
KINDS = ["sasrec", "bert4rec"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(kind: str, **settings):
    torch.manual_seed(1)
    config = IdModelConfig(**{"kind": kind, "d_id": 16, "blocks": 2, "heads": 2, "max_history": 8, "dropout": 0.3}
                           | settings)
    model = make_id_model(config, N, None if config.items == "ids" else torch.randn(N, 12))
    with torch.no_grad():  # fresh weights are so small that everything would look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.item.weight[0].zero_()
    return model.eval()


def histories(seed: int = 0, count: int = 9, longest: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, N + 1, rng.integers(1, longest + 1)).astype(np.int32) for _ in range(count)]


def test_padding_is_on_the_right_and_keeps_the_newest():
    padded = pad_histories([np.array([1, 2, 3, 4]), np.array([5])], 3)
    assert padded.tolist() == [[2, 3, 4], [5, 0, 0]]
    with pytest.raises(UserError, match=r"history 1 .*empty"):
        pad_histories([np.array([1]), np.array([], np.int32)], 3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_output_does_not_depend_on_its_batch(kind):
    model, given = make(kind), histories()
    together, scores = model.states(pad_histories(given, 8)), model.score(given)
    wide = F.pad(pad_histories(given[:1], 8), (0, 8 - len(given[0])))  # padded more than any other row asks for
    assert torch.allclose(model.scores(wide), scores[:1], atol=1e-5)
    for row, history in enumerate(given):
        alone = model.states(pad_histories([history], 8))[0]
        assert torch.allclose(together[row, : len(history)], alone, atol=1e-5)
        assert torch.allclose(model.score([history])[0], scores[row], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_only_the_window_is_read_and_order_counts(kind):
    model = make(kind)
    long = np.arange(1, 21, dtype=np.int32)
    assert torch.equal(model.score([long]), model.score([long[-8:]]))
    changed = long.copy()
    changed[-8] = 29
    assert not torch.allclose(model.score([long]), model.score([changed]), atol=1e-4)
    assert not torch.allclose(model.score([long[:5]]), model.score([long[:5][[1, 0, 2, 3, 4]]]), atol=1e-4)


@torch.no_grad()
def test_sasrec_is_causal_and_bert4rec_is_not():
    first, second = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 4, 5, 9]])
    sasrec, bert = make("sasrec"), make("bert4rec")
    assert torch.allclose(sasrec.states(first)[:, :3], sasrec.states(second)[:, :3], atol=1e-6)
    assert (bert.states(first)[:, :3] - bert.states(second)[:, :3]).abs().amax(dim=-1).min() > 1e-3


@torch.no_grad()
def test_bert4rec_asks_a_mask_token_behind_the_history():
    model = make("bert4rec")
    by_hand = model.states(torch.tensor([[3, 4, N + 1]]))[:, 2]
    assert torch.allclose(model.next_item_state(torch.tensor([[3, 4, 0, 0]])), by_hand, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_are_products_with_the_items_embeddings(kind):
    model, given = make(kind), pad_histories(histories(), 8)
    table = model.item_embeddings()
    assert table.shape == (N, 16)
    state = model.next_item_state(given)[2]
    expected = [float(state @ model.item.weight[item] + model.bias[item - 1]) for item in range(1, N + 1)]
    assert torch.allclose(model.scores(given)[2], torch.tensor(expected), atol=1e-4)


@torch.no_grad()
def test_cross_entropy_trains_what_is_asked_later():
    """The loss is that of predicting each item from the history before it, by the very call used at inference."""
    model = make("sasrec")
    given = [h for h in histories() if len(h) > 1]
    losses = [F.cross_entropy(model.score([h[:cut]]), torch.tensor([int(h[cut]) - 1]))
              for h in given for cut in range(1, len(h))]
    assert torch.allclose(model.loss(pad_histories(given, 8)), torch.stack(losses).mean(), atol=1e-4)


@torch.no_grad()
def test_bce_takes_one_negative_per_position():
    model = make("sasrec", loss="bce")
    given = [h for h in histories() if len(h) > 1]
    pairs = [(h[:cut], int(h[cut])) for h in given for cut in range(1, len(h))]
    torch.manual_seed(5)
    negatives = torch.randint(1, N + 1, (len(pairs),)).tolist()
    expected = 0.0
    for (history, positive), negative in zip(pairs, negatives, strict=True):
        logits = model.score([history])[0]
        expected -= float(F.logsigmoid(logits[positive - 1]) + F.logsigmoid(-logits[negative - 1])) / len(pairs)
    torch.manual_seed(5)
    assert float(model.loss(pad_histories(given, 8))) == pytest.approx(expected, rel=1e-4)


def test_cloze_hides_what_it_asks_for(monkeypatch):
    model = make("bert4rec", mask_probability=0.3)
    given, seen, asked = pad_histories(histories(count=400), 8), [], []
    states, logits = model.states, model.logits
    monkeypatch.setattr(model, "states", lambda items: seen.append(items) or states(items))
    monkeypatch.setattr(model, "logits", lambda s: asked.append(s) or logits(s))
    model.loss(given)
    hidden, kept = seen[0] == N + 1, seen[0] > 0
    assert torch.equal(seen[0][~hidden & kept], given[~hidden & kept])
    assert (kept[:, :-1] >= kept[:, 1:]).all() and not kept[given == 0].any(), "the start of the history, no gap"
    assert hidden.any(dim=1).all()
    assert len(asked[0]) == int(hidden.sum()), "one prediction per hidden item, none elsewhere"
    given_length, length = (given > 0).sum(dim=1), kept.sum(dim=1)
    assert (length >= given_length.clamp(max=2)).all()
    long = given_length > 4
    cut = (length < given_length)[long]
    last_alone = (hidden[torch.arange(len(given)), length - 1] & (hidden.sum(dim=1) == 1))[long]
    assert last_alone[cut].all() and set(length[long][cut].tolist()) >= {2, 3, 4}
    assert 0.3 < last_alone.float().mean() < 0.7, "the task of inference must be practised, and the cloze too"


@pytest.mark.parametrize(("kind", "loss"), [("sasrec", "cross_entropy"), ("sasrec", "bce"),
                                            ("bert4rec", "cross_entropy")])
def test_a_planted_order_is_learnt(kind, loss):
    """Item i is always followed by i + 1 (the last by the first)."""
    torch.manual_seed(0)
    model = make_id_model(IdModelConfig(kind=kind, loss=loss, d_id=32, blocks=1, max_history=8, dropout=0.0), N)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for _ in range(150 if (kind, loss) == ("sasrec", "cross_entropy") else 500):
        starts = rng.integers(0, N, 32)
        loss_value = model.loss(torch.as_tensor((starts[:, None] + np.arange(rng.integers(3, 8))) % N + 1))
        optimizer.zero_grad()
        loss_value.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        best = model.score([(s + np.arange(4)) % N + 1 for s in range(N)]).argmax(dim=1)
    assert (best == (torch.arange(N) + 4) % N).float().mean() > 0.95


@torch.no_grad()
def test_a_seen_offset_is_in_every_logit_of_the_loss_and_in_the_scores():
    model, given = make("sasrec", seen_offset=True), histories()
    model.seen_offset.fill_(-1.7)
    losses = []
    for history in given:
        for t in range(1, len(history)):
            logits = model.logits(model.states(torch.tensor([history[:t].tolist()]))[0, -1])
            logits[torch.tensor(sorted(set(history[:t].tolist()))) - 1] -= 1.7
            losses.append(float(F.cross_entropy(logits[None], torch.tensor([int(history[t]) - 1]))))
    assert float(model.loss(pad_histories(given, 8))) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    scores = model.score(given)
    model.seen_offset.fill_(0.0)
    moved = (model.score(given) - scores) > 1.6
    assert [sorted((row.nonzero()[:, 0] + 1).tolist()) for row in moved] == [sorted(set(h.tolist())) for h in given]


def test_bert4rec_has_seen_what_is_not_hidden():
    model, items = make("bert4rec", seen_offset=True), torch.tensor([[3, 5, 3, 8]])
    visible = []
    add = model._add_seen_offset
    model._add_seen_offset = lambda logits, seen: visible.append(seen) or add(logits, seen)
    model.loss(items)
    for row in visible[0]:
        assert 0 in row.tolist() and set(row.tolist()) <= {0, 3, 5, 8}
        assert all(shown in (0, item) for shown, item in zip(row.tolist(), items[0].tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_item_tables_made_from_text(kind):
    text = torch.randn(N, 12) * torch.linspace(2, 0.5, 12)
    settings = {"kind": kind, "d_id": 16, "heads": 2, "max_history": 8}
    started = make_id_model(IdModelConfig(**settings, items="llm_start"), N, text)
    cosine = F.cosine_similarity(started.item_embeddings()[:, :12], text)
    assert cosine.min() > 0.999 and float(started.item_embeddings()[:, :12].detach().std()) == pytest.approx(0.02)
    model = make_id_model(IdModelConfig(**settings, items="text"), N, text)
    torch.testing.assert_close(model.item_embeddings(), text @ model.adaptor.weight.T)
    model.loss(torch.tensor([[1, 2, 3, 4]])).backward()
    assert model.adaptor.weight.grad.abs().sum() > 0
    assert not model.item.weight.grad[1 : N + 1].any() if model.item.weight.grad is not None else True
    again = load_weights(model.config, N, model.state_dict())
    assert torch.equal(again.score([np.array([3, 4])]), model.eval().score([np.array([3, 4])]))
    once_more = load_weights(started.config, N, started.state_dict())
    assert torch.equal(once_more.item.weight, started.item.weight)


def test_item_tables_made_from_text_need_it():
    with pytest.raises(ValueError, match="made from text vectors"):
        make_id_model(IdModelConfig(items="text"), N)
    with pytest.raises(ValueError, match="seen_offset needs loss"):
        IdModelConfig(loss="bce", seen_offset=True)
