"""The sampled softmax: against a naive loop and the full one, what it draws, and what a step touches."""

import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from laserrec.config import IdModelConfig
from laserrec.data.histories import Histories
from laserrec.methods.bert4rec import BERT4Rec
from laserrec.methods.gru4rec import GRU4Rec
from laserrec.methods.protocol import Phase
from laserrec.methods.sampled_softmax import FULL_ITEMS, Sampler, is_sampled
from laserrec.methods.sasrec import SASRec
from laserrec.methods.sequence_task import SequenceTask
from laserrec.methods.targets import Candidates
from laserrec.training.trainer import Pace, Trainer

N = 60
KINDS = {"sasrec": SASRec, "bert4rec": BERT4Rec, "gru4rec": GRU4Rec}
SETTINGS = {"d_id": 16, "blocks": 1, "heads": 2, "max_history": 8, "dropout": 0.0, "softmax": "sampled"}


def make(kind: str, n: int = N, **settings):
    torch.manual_seed(1)
    config = IdModelConfig(**{"kind": kind, **SETTINGS} | settings)
    model = KINDS[kind](config, n, None if config.items == "ids" else torch.randn(n, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.item.weight[model.pad].zero_()
    return model


def sequences(n: int = N, count: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, n, rng.integers(2, 8)) ** 2 // n).tolist() for _ in range(count)]


def batch_of(model, rows: list[list[int]]):
    """All of them as one batch, as the trainer gets it."""
    task = SequenceTask(model, tiny.dataset([[*row, 0, 1] for row in rows], model.n_items))
    torch.manual_seed(3)
    return task, task.begin_epoch(1).batch(np.arange(len(rows)))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


# -- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_that_of_a_naive_loop(kind):
    model, rows = make(kind, negatives=7, seen_offset=True), sequences()
    model.seen.offset.data.fill_(-1.3)
    _, batch = batch_of(model, rows)
    candidates = batch.candidates.items.tolist()
    taken = rows if kind == "bert4rec" else [row[1:] for row in rows]
    counts = np.bincount(np.concatenate(taken), minlength=N)
    share = counts / counts.sum()
    states = model.states(batch.inputs).flatten(0, 1).detach()
    sequence_of = (batch.places // batch.inputs.shape[1]).tolist()
    expected = 0.0
    for target, (place, item) in enumerate(zip(batch.places.tolist(), batch.items.tolist(), strict=True)):
        own = [i for i, row in zip(batch.items.tolist(), sequence_of, strict=True) if row == sequence_of[target]]
        seen = batch.seen.items[batch.seen.users == target].tolist()
        total = 0.0
        for other in candidates:
            logit = float(states[place] @ model.item.weight[other] + model.bias[other]) - 1.3 * (other in seen)
            missed = (1 - 7 / N) * (1 - share[other]) ** (len(batch.items) - len(own))
            total += math.exp(logit) / (1.0 if other in own else 1 - missed)
            expected -= logit if other == item else 0.0
        expected += math.log(total)
    assert float(model.loss(batch)) == pytest.approx(expected, rel=1e-4)
    assert set(batch.items.tolist()) <= set(candidates) and 7 < len(candidates) < N


@pytest.mark.parametrize("settings", [{}, {"seen_offset": True}, {"items": "text"}])
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_items_drawn_it_is_the_full_softmax(kind, settings):
    found = []
    for softmax in ("sampled", "full"):
        model = make(kind, softmax=softmax, negatives=10 * N, **settings)
        _, batch = batch_of(model, sequences())
        torch.manual_seed(5)
        batch = model.targets(Histories.of(sequences()).padded(model.pad)) if softmax == "full" else batch
        if kind == "bert4rec":  # both hide the same items
            torch.manual_seed(3)
            own = model.targets(Histories.of(sequences()).padded(model.pad))
            batch = own if softmax == "full" else batch
        loss = model.loss(batch)
        found.append((loss.detach(), gradients(model, loss)))
    (sampled, own), (full, want) = found
    torch.testing.assert_close(sampled, full, rtol=1e-5, atol=1e-4)
    assert own.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(own[name], want[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_whole():
    model = make("sasrec", negatives=5, seen_offset=True)
    task, batch = batch_of(model, sequences())
    found = []
    for parts in ([np.arange(12)], [np.array([4, 1]), np.array([0, 11, 7]), np.array([2, 3, 5, 6, 8, 9, 10])]):
        losses = [task.loss(batch, rows)["loss"] for rows in parts]
        found.append({"loss": sum(losses).detach(), **gradients(model, sum(losses))})
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-6)


# -- what is drawn ----------------------------------------------------------------------------------------------


def test_items_are_candidates_as_often_as_the_correction_counts_on():
    """Batches of 20 targets drawn as in the training data, of a catalogue where some items are frequent."""
    rng, n, times = np.random.default_rng(0), 30, 4000
    share = 1 / np.arange(1, n + 1)
    share /= share.sum()
    data = Histories.of([rng.choice(n, 100_000, p=share)])
    sampler, counts = Sampler(data, n, 4), torch.zeros(n)
    torch.manual_seed(0)
    for _ in range(times):
        counts[sampler.draw(torch.from_numpy(rng.choice(n, 20, p=share))).items] += 1
    every = Candidates(torch.arange(n), sampler.share, 4 / n, 20)
    expected = every.log_probability(torch.zeros(1, dtype=torch.long)).exp()[0]
    assert (counts / times - expected).abs().max() < 0.03 and expected.min() < 0.3 and expected.max() > 0.95


def test_the_sum_of_a_softmax_is_estimated_without_bias():
    """Over many draws the mean of the corrected sum is the sum over all items; without the correction it is not."""
    torch.manual_seed(0)
    rng, n = np.random.default_rng(0), 50
    share = 1 / np.arange(1, n + 1) ** 1.2
    share /= share.sum()
    sampler, logits = Sampler(Histories.of([rng.choice(n, 200_000, p=share)]), n, 5), torch.randn(n)
    sums = []
    for _ in range(4000):
        found = sampler.draw(torch.from_numpy(rng.choice(n, 10, p=share)))
        correction = found.log_probability(torch.zeros(1, dtype=torch.long))[0]
        sums.append([float(torch.exp(logits[found.items] - c).sum()) for c in (correction, 0.0)])
    (mean, plain), error = np.mean(sums, axis=0), np.std(sums, axis=0)[0] / len(sums) ** 0.5
    full = float(logits.exp().sum())
    assert abs(mean - full) < 3 * error and error < 0.02 * full and plain < 0.5 * full


def test_negatives_are_drawn_once_each_step_and_differ():
    sampler = Sampler(Histories.of([[1, 2, 3]]), 1000, 50)
    torch.manual_seed(0)
    draws = [sampler.draw(torch.tensor([1, 2, 2])).items for _ in range(2)]
    assert all(len(d) in (50, 51, 52) and (d.diff() > 0).all() and {1, 2} <= set(d.tolist()) for d in draws)
    assert not torch.equal(*(d[:40] for d in draws))
    torch.manual_seed(0)
    assert torch.equal(sampler.draw(torch.tensor([1, 2, 2])).items, draws[0])


def test_what_never_is_a_target_has_no_share():
    model = make("sasrec")
    task, _ = batch_of(model, [[9, 5, 5, 6], [9, 6, 5]])
    assert task.sampler.share.nonzero()[:, 0].tolist() == [5, 6]
    assert float(task.sampler.share[5]) == pytest.approx(3 / 5)


def test_it_is_chosen_above_a_number_of_items():
    for kind, most in FULL_ITEMS.items():
        auto = IdModelConfig(kind=kind)
        assert not is_sampled(auto, most) and is_sampled(auto, most + 1)
    assert is_sampled(IdModelConfig(softmax="sampled"), 3)
    assert not is_sampled(IdModelConfig(softmax="full"), 10**9)
    assert not is_sampled(IdModelConfig(loss="bce"), 10**9)
    with pytest.raises(ValueError, match="'bce' has no softmax"):
        IdModelConfig(loss="bce", softmax="sampled")
    assert SequenceTask(make("sasrec", softmax="full"), tiny.planted(N)).sampler is None


# -- what a step costs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_item_table_gets_gradients_of_inputs_and_candidates_alone(kind):
    model = make(kind, n=500, negatives=9)
    _, batch = batch_of(model, sequences(500))
    model.loss(batch).backward()
    gradient = model.item.weight.grad
    assert gradient.is_sparse and not model.item.weight.data[model.pad].any()
    touched = set(gradient.coalesce().indices()[0].tolist())
    assert touched <= {*batch.inputs.flatten().tolist(), *batch.candidates.items.tolist()}
    assert set(batch.candidates.items.tolist()) <= touched and len(touched) < 200


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:
                self.count = max(self.count, tensor.numel())
        return out


@pytest.mark.parametrize("items", ["ids", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_as_large_as_the_item_table(kind, items):
    """Forward and backward, of a model whose table is far larger than the batch's scores."""
    largest = {}
    for softmax in ("sampled", "full"):
        model = make(kind, n=20_000, softmax=softmax, negatives=32, items=items)
        _, batch = batch_of(model, sequences(20_000, count=3))
        with _Largest() as seen:
            model.loss(batch).backward()
        largest[softmax] = seen.count
    assert largest["sampled"] <= 20_000 < 20_000 * 16 <= largest["full"]


def test_a_planted_order_is_learnt(tmp_path):
    """Item i is followed by i + 1, in a catalogue ten times larger than a step's candidates; by the trainer."""
    def ndcg(softmax: str) -> float:
        data = tiny.planted(100, 200)
        torch.manual_seed(0)
        config = IdModelConfig(**SETTINGS | {"d_id": 32, "softmax": softmax, "negatives": 8})
        phase = Phase("sasrec", SequenceTask(SASRec(config, 100), data), 15, 16, 1e-2)
        fit = Trainer([phase], data, tmp_path / softmax, "planted", Pace(progress=False))
        fit.run()
        return fit.place.best

    assert ndcg("sampled") > 0.95 * ndcg("full") > 0.5


def test_scores_are_those_of_the_full_softmax():
    """The form of the loss changes nothing but the training."""
    given = Histories.of([[3, 4, 5], [7]])
    for items in ("ids", "text"):
        a, b = (make("sasrec", softmax=form, items=items).eval() for form in ("sampled", "full"))
        torch.testing.assert_close(a.score(given), b.score(given))
    assert F.softmax(a.score(given), dim=1).isfinite().all()
