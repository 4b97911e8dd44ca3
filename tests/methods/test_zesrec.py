"""ZESRec against plain loops, and on items and catalogues that it was not trained on."""

import planted_texts
import polars as pl
import pytest
import tiny
import torch

from laserrec.config import ZESRecConfig
from laserrec.methods.all import METHODS, Given
from laserrec.methods.protocol import Growing, Transferable
from laserrec.methods.zesrec import Recurrent


@pytest.fixture(scope="module")
def fitted():
    config = tiny.config("x", zesrec=tiny.RIVALS["zesrec"] | {"dropout": 0.0})
    torch.manual_seed(0)
    made = METHODS["zesrec"].make(Given(config, planted_texts.items(), planted_texts.N, planted_texts.Texts()))
    return planted_texts.trained(made, epochs=25)


def test_the_recurrence_in_plain_steps():
    """Reset and update gate, candidate, and the mix of old and new (Cho et al. 2014)."""
    torch.manual_seed(0)
    body, x = Recurrent(ZESRecConfig(d_model=4, heads=1, blocks=1, dropout=0.0)).eval(), torch.randn(1, 3, 4)
    w_in, w_state, b_in, b_state = (getattr(body.gru, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0",
                                                                        "bias_hh_l0"))
    state = torch.zeros(4)
    for t in range(3):
        given, old = w_in @ body.norm(x[0, t]) + b_in, w_state @ state + b_state
        reset, update = (torch.sigmoid(given[part] + old[part]) for part in (slice(0, 4), slice(4, 8)))
        new = torch.tanh(given[8:] + reset * old[8:])
        state = (1 - update) * new + update * state
        torch.testing.assert_close(body(x)[0, t], state, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_item_is_one_layer_over_its_whitened_text(fitted):
    means = planted_texts.Texts().means(planted_texts.items())
    white = (means - means.mean(dim=0)) @ fitted.matrix
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(12), atol=1e-3, rtol=1e-3)
    item = fitted.adaptor.weight @ white[7] + fitted.adaptor.bias
    torch.testing.assert_close(fitted.items()[7], item, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(fitted.score(tiny.histories([3, 9]))[0, 7], fitted.users(tiny.histories([3, 9]))[0]
                               @ item, atol=1e-3, rtol=1e-3)


def test_another_catalogue_is_scored_unchanged(fitted):
    """Other items, in another order and number, with the same kinds of texts."""
    assert isinstance(fitted, Transferable)
    before = fitted.items().clone()
    other = planted_texts.items("other").sample(fraction=1.0, shuffle=True, seed=3).head(31)
    moved = fitted.transferred(other)
    classes = torch.tensor([planted_texts.WORDS.index(title.split()[-1]) for title in other["title"]])
    scores = moved.score(tiny.histories(*([row] for row in range(31))))
    assert scores.shape == (31, 31)
    assert (classes[scores.argmax(dim=1)] == (classes + 1) % 5).float().mean() > 0.9
    assert torch.equal(fitted.items(), before) and fitted.pad == planted_texts.N
    # the training catalogue's statistics: one item alone has the vector that it has among others
    torch.testing.assert_close(fitted.transferred(planted_texts.items().head(1)).items(), before[:1])


def test_new_items_are_taken(fitted):
    assert isinstance(fitted, Growing)
    new = pl.DataFrame({"item_id": ["a", "b"], "title": [f"new {planted_texts.WORDS[1]}", f"new {tiny.WORDS[4]}"]})
    first = fitted.items().clone()
    try:
        vectors = fitted.add_items(new)
        assert torch.equal(fitted.items(), torch.cat([first, vectors]))
        assert fitted.score(tiny.histories([0]))[0].topk(12).indices.tolist().count(planted_texts.N) == 1
        assert fitted.score(tiny.histories([planted_texts.N])).shape == (1, planted_texts.N + 2)
        fitted.take_items(first)
        assert torch.equal(fitted.add_items(new, vectors), vectors)
    finally:
        fitted.take_items(first)


def test_a_transformer_may_stand_in_place_of_the_gru():
    config = tiny.config("x", zesrec=tiny.RIVALS["zesrec"] | {"body": "transformer"})
    made = METHODS["zesrec"].make(Given(config, planted_texts.items(), planted_texts.N, planted_texts.Texts()))
    weights = made.state_dict()
    assert all(tuple(weights[name].shape) == shape for name, shape in METHODS["zesrec"].shapes(config, 1).items())
    assert planted_texts.learnt("zesrec", planted_texts.items(), seeds=1, body="transformer") > 0.9
