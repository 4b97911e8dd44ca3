"""LRURec: its recurrence against a loop over complex numbers, what a state may depend on, and a planted order."""

import numpy as np
import pytest
import tiny
import torch

from laserrec.config import LruRecConfig
from laserrec.methods import lrurec
from laserrec.methods.lrurec import LinearRecurrence, LRURec
from laserrec.methods.sequence_task import SequenceTask
from laserrec.training.trainer import Pace, Trainer

N = 30


def make(**settings) -> LRURec:
    torch.manual_seed(1)
    model = LRURec(LruRecConfig(**{"d_id": 16, "max_history": 8} | settings), N)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.item.weight[N].zero_()
    return model.eval()


@pytest.mark.parametrize("seq", [1, 2, 5, 8, 13])
@torch.no_grad()
def test_the_recurrence_is_the_loop_over_complex_states(seq):
    torch.manual_seed(seq)
    unit, x = LinearRecurrence(6), torch.randn(3, seq, 6)
    real, imaginary = unit.into(x).chunk(2, dim=-1)
    given = torch.complex(real, imaginary) * unit.gamma.exp()
    decay = torch.exp(torch.complex(-unit.nu.exp(), unit.theta.exp()))
    state, outputs = torch.zeros(3, 12, dtype=torch.complex64), []
    for t in range(seq):
        state = decay * state + given[:, t]
        outputs.append(unit.out(torch.cat([state.real, state.imag], dim=-1)))
    torch.testing.assert_close(unit(x), torch.stack(outputs, dim=1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decays_start_within_the_ring_and_inputs_keep_the_states_size():
    unit = LinearRecurrence(200)
    size = (-unit.nu.exp()).exp()
    assert size.min() >= 0.8 - 1e-4 and size.max() <= 0.99 + 1e-4
    torch.testing.assert_close(unit.gamma.exp() ** 2, 1 - size**2, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_output_depends_on_what_stands_before_it_alone():
    model = make()
    first, second = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 4, 5, 9]])
    torch.testing.assert_close(model.states(first)[:, :3], model.states(second)[:, :3])
    assert not torch.allclose(model.states(torch.tensor([[4, 3, 5]]))[:, 2], model.states(first)[:, 2], atol=1e-4)
    together = model.score(tiny.histories([3, 4, 5, 6, 7], [8], [9, 3]))
    torch.testing.assert_close(together[1:2], model.score(tiny.histories([8])), rtol=1e-4, atol=1e-5)


def test_a_planted_order_is_learnt(tmp_path):
    """Item i is always followed by i + 1."""
    torch.manual_seed(0)
    data = tiny.planted(N, 80)
    config = LruRecConfig(d_id=32, blocks=1, dropout=0.0, lr=1e-2, batch_size=16, max_epochs=25, eval_every=5)
    fit = Trainer(lrurec.phases(LRURec(config, N), config, data), data, tmp_path, "x", Pace(progress=False))
    fit.run()
    assert isinstance(fit.phase.task, SequenceTask) and fit.place.best > 0.9


@torch.no_grad()
def test_its_loss_is_over_all_items_with_the_seen_offset_where_one_is_learnt():
    large = LRURec(LruRecConfig(d_id=4, seen_offset=True), 20_000)
    assert large.sampler(tiny.histories([1, 2, 3])) is None and not large.item.sparse
    plain, model = make(), make(seen_offset=True)
    model.load_state_dict(plain.state_dict() | {"seen.offset": torch.tensor(-3.0)})
    asked = tiny.histories([3, 4, 3], [9])
    gap = model.score(asked) - plain.score(asked)
    assert gap.nonzero().tolist() == [[0, 3], [0, 4], [1, 9]] and gap[0, 3] == pytest.approx(-3, abs=1e-4)


def test_its_settings_are_those_of_the_authors():
    config = LruRecConfig()
    assert (config.d_id, config.blocks, config.dropout, config.weight_decay, config.lr) == (64, 2, 0.2, 0.01, 1e-3)
    shapes = lrurec.shapes(LruRecConfig(), N)
    weights = {name: tuple(w.shape) for name, w in LRURec(LruRecConfig(), N).state_dict().items()}
    assert all(weights[name] == shape for name, shape in shapes.items())
    assert np.prod(shapes["item.weight"]) == (N + 2) * 64
