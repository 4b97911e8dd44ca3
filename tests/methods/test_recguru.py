"""RecGURU: losses against plain loops, the game of encoder and discriminator, a planted order, resuming."""

import signal

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from laserrec.config import RecGURUConfig
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods import recguru
from laserrec.methods.recguru import Adversary, Autoencoding, Decoder, RecGURU, Reconstruction, phases
from laserrec.training.trainer import Pace, Trainer
from laserrec.util.device import CPU

N = 12
SMALL = RecGURUConfig(**{**tiny.RIVALS["recguru"], "d_model": 8, "dropout": 0.0})


def make(n: int = N, seed: int = 1, **settings) -> RecGURU:
    torch.manual_seed(seed)
    model = RecGURU(SMALL.model_copy(update=settings), n)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def test_attention_over_copies_of_one_vector_is_a_linear_map_of_it():
    """Why the decoder adds a layer's output in place of attending to the user's vector."""
    torch.manual_seed(0)
    attention, user = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 1, 8)
    out, _ = attention(torch.randn(1, 5, 8), user.expand(1, 4, 8), user.expand(1, 4, 8))
    value = attention.in_proj_weight[16:] @ user[0, 0] + attention.in_proj_bias[16:]
    wanted = attention.out_proj.weight @ value + attention.out_proj.bias
    torch.testing.assert_close(out, wanted.expand(1, 5, 8))
    decoder, x = Decoder(SMALL).eval(), torch.randn(1, 3, 8)
    assert not torch.allclose(decoder(x, user), decoder(x, -user))


@torch.no_grad()
def test_bpr_compares_each_target_with_sampled_items():
    model, histories = make(bpr_negatives=3), [[3, 4, 9], [1, 0], [5, 6, 7, 8]]
    cuts = [(row[:at], row[at]) for row in histories for at in range(1, len(row))]
    torch.manual_seed(4)
    sampled = torch.randint(0, N, (len(cuts), 3))
    wanted = 0.0
    for (history, target), others in zip(cuts, sampled.tolist(), strict=True):
        scores = model.score(tiny.histories(history))[0]
        wanted -= sum(float(F.logsigmoid(scores[target] - scores[other])) for other in others) / 3
    torch.manual_seed(4)
    found = model.loss(model.targets(Histories.of(histories).padded(N)))
    assert float(found) == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def test_reconstruction_tells_each_item_from_sampled_ones():
    model, extra, rows = make(), Reconstruction(SMALL, 0).eval(), [[3, 4, 9], [1, 0]]
    items, user = Histories.of(rows).padded(N), torch.randn(2, 8)
    torch.manual_seed(4)
    sampled = iter(torch.randint(0, N, (5, 4)))
    wanted = 0.0
    for row, who in zip(rows, user, strict=True):
        before = torch.cat([extra.start[None], model.item.weight[row[:-1]]])
        states = extra.decoder(before[None], who[None, None])[0]
        for state, item in zip(states, row, strict=True):
            logits = model.item.weight[torch.cat([torch.tensor([item]), next(sampled)])] @ state
            wanted -= float(logits.log_softmax(0)[0])
    torch.manual_seed(4)
    assert float(extra.loss(items, user, model.item, 4)) == pytest.approx(wanted, rel=1e-4)


def test_the_recommender_does_not_change_the_encoder():
    model = make()
    model.loss(model.targets(torch.tensor([[3, 4, 5]]))).backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and model.item.weight.grad.abs().sum() > 0


def test_the_discriminator_learns_to_tell_domains():
    torch.manual_seed(0)
    adversary = Adversary(SMALL.model_copy(update={"adversary_lr": 1e-2}), CPU)
    own, other = torch.randn(64, 8) + 1, torch.randn(64, 8) - 1
    for _ in range(30):
        adversary.learn(own, other)
    assert (adversary.logits(own) > 0).float().mean() > 0.9 and (adversary.logits(other) < 0).float().mean() > 0.9


def task(other=True, **settings) -> Autoencoding:
    return Autoencoding(make(**settings), tiny.planted(N, 20), tiny.planted(15, 30, seed=5) if other else None)


def test_the_encoder_is_led_to_mislead_the_discriminator():
    """A step down the loss moves both domains' users to the other side."""
    made = task()
    made.adversary.learn(torch.randn(8, 8) + 1, torch.randn(8, 8) - 1)
    batch = made.begin_epoch(1).batch(np.arange(20))
    users = made.users(batch.own, made.model.item)
    gradient = torch.autograd.grad(F.softplus(made.adversary.logits(users)).mean(), users)[0]
    assert made.adversary.logits(users - 10 * gradient).mean() < made.adversary.logits(users).mean()
    domain = made.loss(batch, np.arange(20))["domain"]
    other = made.users(batch.other, made.extra.other)
    wanted = F.softplus(made.adversary.logits(users)).mean() + F.softplus(-made.adversary.logits(other)).mean()
    torch.testing.assert_close(domain, wanted.detach())


def told_apart(made: Autoencoding) -> float:
    """How well a fresh probe tells the domains by user vectors: the share that a least-squares plane has right."""
    with torch.no_grad():
        made.module.eval()
        own = made.users(made.own.padded(N), made.model.item)
        other = made.users(made.others.padded(15), made.extra.other)
    x = torch.cat([torch.cat([own, other]), torch.ones(len(own) + len(other), 1)], dim=1)
    y = torch.cat([torch.ones(len(own)), -torch.ones(len(other))])
    weights = torch.linalg.lstsq(x.T @ x + 1e-3 * torch.eye(9), (x.T @ y)[:, None]).solution
    return float(((x @ weights)[:, 0].sign() == y).float().mean())


def trained(made: Autoencoding, epochs: int = 40) -> Autoencoding:
    optimizer = torch.optim.AdamW(made.module.parameters(), lr=1e-2)
    for epoch in range(1, epochs + 1):
        batch = made.begin_epoch(epoch).batch(np.arange(len(made.lengths)))
        optimizer.zero_grad()
        made.loss(batch, np.arange(len(batch.own)))["loss"].backward()
        optimizer.step()
    return made


def test_a_batch_in_parts_has_the_loss_of_the_whole():
    made = task(negatives=1)
    batch = made.begin_epoch(1).batch(np.arange(20))
    whole = made.loss(batch, np.arange(20))["domain"]
    parts = [made.loss(batch, rows)["domain"] for rows in (np.arange(7), np.arange(7, 20))]
    torch.testing.assert_close(sum(parts), whole)


def test_the_other_domains_users_are_drawn_anew_each_epoch_and_the_same_when_resumed():
    made = task()
    first, again, later = (made.begin_epoch(n).batch(np.array([3, 1, 2])).other.tolist() for n in (1, 1, 2))
    assert first == again and first != later


def fit(folder, other=None, epochs=2, **settings):
    data = tiny.planted(N, 40)
    config = SMALL.model_copy(update={"other": other, "max_epochs": epochs, **settings})
    torch.manual_seed(0)
    model = RecGURU(config, N)
    trainer = Trainer(phases(model, data), data, folder, "planted", Pace(progress=False))
    trainer.run()
    return model, trainer, data


def test_a_planted_order_is_learnt(tmp_path):
    model, trainer, data = fit(tmp_path, epochs=40, autoencoder_epochs=5, d_model=16, d_inner=32)
    assert [entry["phase"] for entry in trainer.log][:6] == ["autoencoder"] * 5 + ["recommender"]
    assert evaluate("recguru", model.eval(), data, "test", k=3).plain.recall > 0.8
    rebuilt = [entry["loss"] for entry in trainer.log[:5]]
    assert rebuilt[-1] < rebuilt[0]


def test_users_of_two_domains_become_alike():
    """The domains' items differ, and so do their users; less so where the encoder plays against the discriminator."""
    alone, both = (task(dropout=0.1, adversary_lr=1e-2) for _ in range(2))
    with torch.no_grad():
        for made in (alone, both):
            made.extra.other.weight[:, :4] += 1
    alone.adversary.learn = lambda own, other: None
    nn.init.zeros_(alone.adversary.net[2].weight)  # whose gradient is zero then
    assert told_apart(trained(alone)) > 0.95 and told_apart(trained(both)) < 0.9


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_stopped_training_with_two_domains_goes_on_to_the_same_model(tmp_path, monkeypatch, at):
    """In the first phase, with the discriminator's own optimiser, and in the second."""
    monkeypatch.setattr(recguru.Dataset, "load", staticmethod(lambda folder: tiny.planted(15, 30, seed=5)))
    want = fit(tmp_path / "whole", "elsewhere", dropout=0.2)[0].state_dict()
    step, left = Trainer._step, [at]

    def stopping(self, *arguments):
        step(self, *arguments)
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "m", "elsewhere", dropout=0.2)
    monkeypatch.setattr(Trainer, "_step", step)
    torch.manual_seed(99)
    tiny.assert_same(fit(tmp_path / "m", "elsewhere", dropout=0.2)[0].state_dict(), want)


def test_a_seen_offset_is_refused():
    with pytest.raises(ValueError, match="BPR compares two items"):
        RecGURUConfig(seen_offset=True)
