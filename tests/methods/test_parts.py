"""What rivals over sequences share, and what each of them must hold: causality, batches, settings, sizes."""

import planted_texts
import polars as pl
import pytest
import tiny
import torch
from torch import nn

from laserrec.config import Config, SequenceRivalConfig, load_config
from laserrec.data.histories import Histories
from laserrec.llm.text_features import whitened
from laserrec.methods.all import METHODS, Given
from laserrec.methods.parts import CausalEncoder, ItemVectors, vectors_of_texts
from laserrec.presets import RIVAL_SIZES

RIVALS = ("fdsa", "zesrec", "kar", "recguru")
N = 12


def make(name: str, llm, **settings):
    config = tiny.config("x", **{name: tiny.RIVALS[name] | settings})
    torch.manual_seed(3)
    model = METHODS[name].make(Given(config, tiny.items(N), N, tiny.features(llm())))
    with torch.no_grad():  # fresh weights are so small that everything would look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


ASKED = [[0, 3, 5], [2], [7, 8, 9, 10, 1, 4, 6, 11], [5, 5]]


@pytest.mark.parametrize("name", RIVALS)
@torch.no_grad()
def test_a_score_does_not_depend_on_its_batch_and_order_counts(name, llm):
    model = make(name, llm)
    together = model.score(Histories.of(ASKED))
    for row, history in enumerate(ASKED):
        torch.testing.assert_close(model.score(Histories.of([history]))[0], together[row], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], model.score(Histories.of([[3, 0, 5]]))[0], atol=1e-4)
    assert torch.equal(model.score(Histories.of([ASKED[2]])), model.score(Histories.of([ASKED[2][-6:]])))


@pytest.mark.parametrize("name", RIVALS)
@torch.no_grad()
def test_a_state_sees_nothing_behind_it(name, llm):
    model = make(name, llm)
    first, second = (model.states(torch.tensor([[3, 4, 5, last]])) for last in (6, 9))
    torch.testing.assert_close(first[:, :3], second[:, :3], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first[:, 3], second[:, 3], atol=1e-3)


@pytest.mark.parametrize("name", RIVALS[:-1])
@torch.no_grad()
def test_the_loss_is_that_of_predicting_each_item_from_those_before_it(name, llm):
    model, histories = make(name, llm, seen_offset=True), [row for row in ASKED if 1 < len(row) < 7]
    losses = []
    for row in histories:
        for cut in range(1, len(row)):
            scores = model.score(Histories.of([row[:cut]]))
            losses.append(float(nn.functional.cross_entropy(scores, torch.tensor([row[cut]]))))
    found = model.loss(model.targets(Histories.of(histories).padded(model.pad)))
    assert float(found) == pytest.approx(sum(losses), rel=1e-4)


@pytest.mark.parametrize("name", RIVALS)
def test_settings_and_sizes(name):
    """Published values are the defaults; the small ones are laid on all presets but `paper`; sizes are checked."""
    section = Config.model_fields[name].annotation
    assert getattr(load_config("paper", method=name), name) == section()
    for key, value in RIVAL_SIZES[name][name].items():
        assert getattr(getattr(load_config(method=name), name), key) == value
    with pytest.raises(ValueError, match="is not a multiple of heads"):
        section(d_model=33, heads=2)


@pytest.mark.parametrize("name", RIVALS)
def test_the_sizes_that_are_checked_are_those_of_its_weights(name, llm):
    config = tiny.config("x", **{name: tiny.RIVALS[name] | {"blocks": 2, "heads": 1}})
    model = METHODS[name].make(Given(config, tiny.items(N), N, tiny.features(llm())))
    weights, wanted = model.state_dict(), METHODS[name].shapes(config, N)
    assert wanted and {key: tuple(weights[key].shape) for key in wanted} == wanted
    for size in ("d_model", "blocks"):
        other = tiny.config("x", **{name: tiny.RIVALS[name] | {"blocks": 2, "heads": 1, size: 7}})
        assert METHODS[name].shapes(other, N) != wanted


@pytest.mark.parametrize(("name", "least"), [("fdsa", 0.5), ("zesrec", 0.9)])
def test_what_texts_tell_reaches_items_that_nobody_had(name, least):
    """Classes follow each other, and only the texts tell the class of an item without interactions. FDSA has vectors of
    IDs too, which tell nothing of such items."""
    items = planted_texts.items()
    assert planted_texts.learnt(name, items) > least
    assert planted_texts.learnt(name, items.with_columns(pl.col("title").shuffle(seed=1)), seeds=2) < 0.4


def test_the_encoder_in_plain_steps():
    """Positions, norm, then blocks whose every position reads those up to itself."""
    torch.manual_seed(0)
    config = SequenceRivalConfig(d_model=6, heads=1, blocks=1, d_inner=5, max_history=4, dropout=0.0)
    encoder, x = CausalEncoder(config).eval(), torch.randn(1, 3, 6)
    block = encoder.blocks[0]
    h = encoder.norm(x + encoder.position.weight[:3])[0]
    q, k, v = (h @ part.T + bias for part, bias in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True))
    for t in range(3):
        weights = torch.stack([q[t] @ k[s] for s in range(t + 1)]).div(6**0.5).softmax(0)
        read = block.out(sum(weights[s] * v[s] for s in range(t + 1)))
        y = block.attention_norm(h[t] + read)
        y = block.feed_norm(y + block.feed(y))
        torch.testing.assert_close(encoder(x)[0, t], y, atol=1e-5, rtol=1e-4)


def test_item_vectors_are_made_anew_while_they_are_trained():
    layer, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    vectors = ItemVectors(layer, (inputs,))
    rows = torch.tensor([[1, 1], [4, 5]])  # row 5: padding
    torch.testing.assert_close(vectors(rows)[0, 1], layer(inputs[1]))
    assert vectors(rows).shape == (2, 2, 3) and vectors().requires_grad
    with torch.no_grad():
        layer.bias.add_(1)
    torch.testing.assert_close(vectors(rows)[1, 0], layer(inputs[4]))
    layer.requires_grad_(False)
    kept = vectors()
    assert vectors() is kept and vectors.inputs == ()
    torch.testing.assert_close(vectors(rows)[1, 0], kept[4])


def test_equal_texts_are_read_once_and_missing_ones_are_zeros(llm, monkeypatch):
    features, read = tiny.features(llm()), []
    monkeypatch.setattr(features, "llm_means", lambda frame: read.append(frame) or torch.eye(frame.height, 4))
    vectors, known = vectors_of_texts(features, ["saw", None, "drill", "saw"])
    assert known.tolist() == [True, False, True, True] and [frame["title"].to_list() for frame in read] == [["saw",
                                                                                                           "drill"]]
    assert torch.equal(vectors, whitened(torch.eye(2, 4), 1)[[0, 0, 1, 0]] * known[:, None])
    with pytest.raises(ValueError, match="no texts"):
        vectors_of_texts(features, [None, None])
