"""SASRec, BERT4Rec and GRU4Rec: what a state may depend on, the losses against naive loops, and a planted order."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.config import IdModelConfig
from laserrec.data.histories import Histories
from laserrec.methods.all import METHODS, Given
from laserrec.methods.bert4rec import BERT4Rec
from laserrec.methods.gru4rec import GRU4Rec
from laserrec.methods.sasrec import SASRec
from laserrec.methods.sequence import by_length
from laserrec.methods.sequence_task import SequenceTask
from laserrec.util.errors import UserError

N = 30
PAD, MASK = N, N + 1
KINDS = {"sasrec": SASRec, "bert4rec": BERT4Rec, "gru4rec": GRU4Rec}


def make(kind: str, **settings):
    torch.manual_seed(1)
    config = IdModelConfig(**{"kind": kind, "d_id": 16, "blocks": 2, "heads": 2, "max_history": 8, "dropout": 0.3}
                           | settings)
    model = KINDS[kind](config, N, None if config.items == "ids" else torch.randn(N, 12))
    with torch.no_grad():  # fresh weights are so small that everything would look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.item.weight[PAD].zero_()
    return model.eval()


def histories(seed: int = 0, count: int = 9, longest: int = 8) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, N, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def score(model, *rows) -> torch.Tensor:
    return model.score(Histories.of(rows))


def loss(model, rows) -> float:
    """The mean over all targets."""
    targets = model.targets(Histories.of(rows).padded(PAD))
    return float(model.loss(targets)) / len(targets.places)


def test_padding_is_on_the_right_and_keeps_the_newest():
    model = make("sasrec", max_history=3)
    assert model.pad_histories(tiny.histories([1, 2, 3, 4], [5])).tolist() == [[2, 3, 4], [5, PAD, PAD]]
    with pytest.raises(UserError, match=r"history 1 .*empty"):
        model.pad_histories(tiny.histories([1], []))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_output_does_not_depend_on_its_batch(kind):
    model, given = make(kind), histories()
    together, scores = model.states(Histories.of(given).padded(PAD)), score(model, *given)
    for row, history in enumerate(given):
        alone = model.states(torch.tensor([history]))[0]
        assert torch.allclose(together[row, : len(history)], alone, atol=1e-5)
        assert torch.allclose(score(model, history)[0], scores[row], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_last_states_are_those_of_the_padded_batch(kind):
    """Found in groups of like length, in whatever order the lengths come."""
    model, given = make(kind, max_history=20), Histories.of(histories(count=40, longest=30))
    padded = model.next_item_state(model.pad_histories(given))
    assert torch.allclose(model.last_states(given), padded, atol=1e-5)
    widths = []
    by_length(torch.zeros(5, 20, dtype=torch.long), torch.tensor([20, 0, 9, 3, 10]),
              lambda rows, lengths: widths.append((rows.shape[1], lengths.tolist())) or lengths.float())
    assert widths == [(3, [0, 3]), (10, [9, 10]), (20, [20])]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_only_the_window_is_read_and_order_counts(kind):
    model = make(kind)
    long = list(range(20))
    assert torch.equal(score(model, long), score(model, long[-8:]))
    changed = [29 if place == 12 else item for place, item in enumerate(long)]
    assert not torch.allclose(score(model, long), score(model, changed), atol=1e-4)
    assert not torch.allclose(score(model, long[:5]), score(model, [1, 0, 2, 3, 4]), atol=1e-4)


@torch.no_grad()
def test_sasrec_and_gru4rec_are_causal_and_bert4rec_is_not():
    first, second = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 4, 5, 9]])
    bert = make("bert4rec")
    for causal in (make("sasrec"), make("gru4rec")):
        assert torch.allclose(causal.states(first)[:, :3], causal.states(second)[:, :3], atol=1e-6)
        assert not torch.allclose(causal.states(first)[:, 3], causal.states(second)[:, 3], atol=1e-3)
    assert (bert.states(first)[:, :3] - bert.states(second)[:, :3]).abs().amax(dim=-1).min() > 1e-3


@torch.no_grad()
def test_bert4rec_asks_a_mask_token_behind_the_history():
    model = make("bert4rec")
    by_hand = model.states(torch.tensor([[3, 4, MASK]]))[:, 2]
    assert torch.allclose(model.next_item_state(torch.tensor([[3, 4, PAD, PAD]])), by_hand, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_are_products_with_the_items_embeddings(kind):
    model, given = make(kind), Histories.of(histories())
    assert model.item_embeddings().shape == (N, 16) and model.items().shape == (N, 17)
    state = model.next_item_state(given.padded(PAD))[2]
    expected = [float(state @ model.item.weight[item] + model.bias[item]) for item in range(N)]
    assert torch.allclose(model.score(given)[2], torch.tensor(expected), atol=1e-4)
    assert torch.allclose(model.users(given) @ model.items(torch.tensor([4])).T, model.score(given)[:, 4:5], atol=1e-4)


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec"])
@torch.no_grad()
def test_cross_entropy_trains_what_is_asked_later(kind):
    """The loss is that of predicting each item from the history before it, by the very call used at inference."""
    model = make(kind)
    given = [h for h in histories() if len(h) > 1]
    losses = [float(F.cross_entropy(score(model, h[:cut]), torch.tensor([h[cut]])))
              for h in given for cut in range(1, len(h))]
    assert loss(model, given) == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_whole(kind):
    sequences = [h for h in histories() if len(h) > 1]
    model = make(kind, seen_offset=True, dropout=0.0)
    task = SequenceTask(model, tiny.dataset([[*h, 0, 1] for h in sequences], N))
    torch.manual_seed(3)
    batch = model.targets(Histories.of(sequences).padded(PAD))
    gradients = []
    for parts in ([np.arange(len(sequences))], [np.array([4, 1]), np.array([0]), np.array([2, 3, 5])]):
        assert len(sequences) >= 6
        parts = [*parts, *([np.arange(6, len(sequences))] if len(parts) > 1 and len(sequences) > 6 else [])]
        model.zero_grad()
        losses = [task.loss(batch, rows)["loss"] for rows in parts]
        sum(losses).backward()
        gradients.append([sum(losses).detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for whole, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_bce_takes_one_negative_per_position():
    model = make("sasrec", loss="bce")
    given = [h for h in histories() if len(h) > 1]
    pairs = [(h[:cut], h[cut]) for h in given for cut in range(1, len(h))]
    torch.manual_seed(5)
    negatives = torch.randint(0, N, (len(pairs),)).tolist()
    expected = 0.0
    for (history, positive), negative in zip(pairs, negatives, strict=True):
        logits = score(model, history)[0]
        expected -= float(F.logsigmoid(logits[positive]) + F.logsigmoid(-logits[negative])) / len(pairs)
    torch.manual_seed(5)
    assert loss(model, given) == pytest.approx(expected, rel=1e-4)


def test_cloze_hides_what_it_asks_for():
    model = make("bert4rec", mask_probability=0.3)
    given = Histories.of(histories(count=400)).padded(PAD)
    targets = model.targets(given)
    hidden, kept = targets.inputs == MASK, targets.inputs != PAD
    assert torch.equal(targets.inputs[~hidden & kept], given[~hidden & kept])
    assert (kept[:, :-1] >= kept[:, 1:]).all() and not kept[given == PAD].any(), "the start of the history, no gap"
    assert hidden.any(dim=1).all()
    assert torch.equal(targets.places, hidden.flatten().nonzero()[:, 0]), "one prediction per hidden item, none else"
    assert torch.equal(targets.items, given[hidden])
    given_length, length = (given != PAD).sum(dim=1), kept.sum(dim=1)
    assert (length >= given_length.clamp(max=2)).all()
    long = given_length > 4
    cut = (length < given_length)[long]
    last_alone = (hidden[torch.arange(len(given)), length - 1] & (hidden.sum(dim=1) == 1))[long]
    assert last_alone[cut].all() and set(length[long][cut].tolist()) >= {2, 3, 4}
    assert 0.3 < last_alone.float().mean() < 0.7, "the task of inference must be practised, and the cloze too"


@pytest.mark.parametrize(("kind", "objective"), [("sasrec", "cross_entropy"), ("sasrec", "bce"),
                                                 ("bert4rec", "cross_entropy"), ("gru4rec", "cross_entropy")])
def test_a_planted_order_is_learnt(kind, objective):
    """Item i is always followed by i + 1 (the last by the first)."""
    torch.manual_seed(0)
    config = IdModelConfig(kind=kind, loss=objective, d_id=32, blocks=1, max_history=8, dropout=0.0)
    model = KINDS[kind](config, N)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for _ in range(150 if (kind, objective) == ("sasrec", "cross_entropy") else 500):
        starts = rng.integers(0, N, 32)
        targets = model.targets(torch.as_tensor((starts[:, None] + np.arange(rng.integers(3, 8))) % N))
        optimizer.zero_grad()
        (model.loss(targets) / len(targets.places)).backward()
        optimizer.step()
    best = score(model.eval(), *((s + np.arange(4)) % N for s in range(N))).argmax(dim=1)
    assert (best == (torch.arange(N) + 4) % N).float().mean() > 0.95


@torch.no_grad()
def test_a_seen_offset_is_in_every_logit_of_the_loss_and_in_the_scores():
    model, given = make("sasrec", seen_offset=True), histories()
    model.seen.offset.fill_(-1.7)
    losses = []
    for history in given:
        for t in range(1, len(history)):
            logits = model.states(torch.tensor([history[:t]]))[0, -1] @ model.item_embeddings().T + model.bias
            logits[sorted(set(history[:t]))] -= 1.7
            losses.append(float(F.cross_entropy(logits[None], torch.tensor([history[t]]))))
    assert loss(model, given) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    scores = score(model, *given)
    model.seen.offset.fill_(0.0)
    moved = (score(model, *given) - scores) > 1.6
    assert [row.nonzero()[:, 0].tolist() for row in moved] == [sorted(set(h)) for h in given]


def test_bert4rec_has_seen_what_is_not_hidden():
    model = make("bert4rec", seen_offset=True)
    for _ in range(20):
        targets = model.targets(torch.tensor([[3, 5, 3, 8]]))
        visible = {i for i in targets.inputs[0].tolist() if i not in (PAD, MASK)}
        for target in range(len(targets.places)):
            assert set(targets.seen.items[targets.seen.users == target].tolist()) == visible


@pytest.mark.parametrize("kind", KINDS)
def test_item_tables_made_from_text(kind, llm):
    text = torch.randn(N, 12) * torch.linspace(2, 0.5, 12)
    settings = {"kind": kind, "d_id": 16, "heads": 2, "max_history": 8}
    started = KINDS[kind](IdModelConfig(**settings, items="llm_start"), N, text)
    cosine = F.cosine_similarity(started.item_embeddings()[:, :12], text)
    assert cosine.min() > 0.999 and float(started.item_embeddings()[:, :12].detach().std()) == pytest.approx(0.02)
    model = KINDS[kind](IdModelConfig(**settings, items="text"), N, text)
    torch.testing.assert_close(model.item_embeddings(), text @ model.adaptor.weight.T)
    model.loss(model.targets(torch.tensor([[1, 2, 3, 4]]))).backward()
    assert model.adaptor.weight.grad.abs().sum() > 0
    assert not model.item.weight.grad[:N].any()
    for made in (started, model):
        config = tiny.config("x", id_model=made.config.model_dump())
        given = Given(config, tiny.items(N), N, tiny.features(llm()))
        again = METHODS[kind].restore(given, made.state_dict(), {})
        assert torch.equal(score(again, [3, 4]), score(made.eval(), [3, 4]))
        assert not any(p.requires_grad for p in again.parameters())


def test_item_tables_made_from_text_need_it():
    with pytest.raises(ValueError, match="made from text vectors"):
        SASRec(IdModelConfig(items="text"), N)
    with pytest.raises(ValueError, match="seen_offset needs loss"):
        IdModelConfig(loss="bce", seen_offset=True)


# -- what it trains on ------------------------------------------------------------------------------------------


def walk(shift: int = 0):
    """40 users who walk up the items; `shift` changes test items and nothing else."""
    rng = np.random.default_rng(0)
    rows = [[int(start + p) % N for p in range(length)]
            for start, length in zip(rng.integers(0, N, 40), rng.integers(4, 10, 40), strict=True)]
    return tiny.dataset([[*row[:-1], (row[-1] + shift) % N] for row in rows], N)


def epochs(model, dataset, count: int) -> list[list[tuple[int, ...]]]:
    """The sequences of the first epochs."""
    task = SequenceTask(model, dataset)
    return [[tuple(row) for row in task.begin_epoch(n).sequences.lists()] for n in range(1, count + 1)]


def test_training_examples_are_training_sequences_only():
    dataset = walk()
    got = epochs(make("sasrec", max_history=10), dataset, 1)[0]
    assert got == [tuple(row) for row in dataset.train_sequences.lists() if len(row) > 1]
    assert epochs(make("sasrec"), walk(7), 1) == epochs(make("sasrec"), dataset, 1)


def test_long_sequences_are_learnt_from_as_a_whole():
    dataset = walk()
    first, second = epochs(make("sasrec", max_history=3), dataset, 2)
    want = sorted(pair for row in dataset.train_sequences.lists() for pair in pairwise(row))
    for epoch in (first, second):
        assert max(map(len, epoch)) == 4 and sorted(pair for row in epoch for pair in pairwise(row)) == want
    assert first != second and epochs(make("sasrec", max_history=3), dataset, 2) == [first, second]


@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
def test_all_positions_of_a_full_history_are_trained(kind):
    """The newest state of a long history must not stand where nothing was learnt."""
    model = make(kind, max_history=4)
    task = SequenceTask(model, tiny.dataset([[i % N for i in range(start, start + 15)] for start in range(20)], N))
    for epoch in range(1, 5):
        examples = task.begin_epoch(epoch)
        index = np.arange(len(examples.lengths))
        task.loss(examples.batch(index), index)["loss"].backward()
    read = []
    model.position.register_forward_hook(lambda module, given, out: read.append(given[0].unique()))
    model.eval().users(tiny.histories(list(range(9))))
    trained = model.position.weight.grad.abs().sum(dim=1) > 0
    assert trained[torch.cat(read).unique()].all()


def test_shuffled_sequences_are_the_same_items_in_another_order_each_epoch():
    dataset = walk()
    whole = [tuple(row) for row in dataset.train_sequences.lists() if len(row) > 1]
    first, second = epochs(make("sasrec", max_history=10, shuffle=0.5), dataset, 2)
    for epoch in (first, second):
        assert [sorted(row) for row in epoch] == [sorted(row) for row in whole]
        kept = sum(a == b for a, b in zip(epoch, whole, strict=True))
        assert 0.3 * len(whole) < kept < 0.9 * len(whole)  # half stay, and some of the others by chance
    assert first != second
    assert epochs(make("sasrec", max_history=10, shuffle=0.5), dataset, 2) == [first, second]


def test_users_with_one_interaction_are_nothing_to_learn_from():
    with pytest.raises(UserError, match="nothing to learn"):
        SequenceTask(make("sasrec"), tiny.dataset([[1, 2, 3], [4, 5, 6]], N))
