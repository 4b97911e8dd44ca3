"""Histories -> embeddings: independent of batch and order, the right text, the right ID states."""

import numpy as np
import pytest
import tiny
import torch

from laserrec.config import ItemSide, Layout, Prefix, Template
from laserrec.util.errors import UserError

ROWS = tiny.histories([1, 2, 3], [7], [4, 9, 2, 5, 8], [11, 12])
WAYS = [("llama", "native", Layout.PREFIX_FIRST), ("llama", "transformers", Layout.PREFIX_FIRST),
        ("gpt2", "auto", Layout.PREFIX_FIRST), ("llama", "native", Layout.TEXT_FIRST),
        ("qwen3", "native", Layout.TEXT_FIRST)]


@pytest.mark.parametrize(("family", "engine", "layout"), WAYS)
def test_an_embedding_does_not_depend_on_its_batch(llm, family, engine, layout):
    encoder = tiny.encoder(llm(family, engine=engine), prompt={"layout": layout})
    together = encoder.encode(ROWS, 4)
    for batch_size in (1, 2):
        torch.testing.assert_close(encoder.encode(ROWS, batch_size), together, rtol=1e-4, atol=1e-4)
    backwards = encoder.encode(ROWS[::-1], 3)
    torch.testing.assert_close(backwards.flip(0), together, rtol=1e-4, atol=1e-4)
    assert torch.pdist(together).min() > 1e-2


def test_both_engines_give_the_same_embedding(llm):
    ours, theirs = (tiny.encoder(llm(engine=e)).encode(ROWS, 4) for e in ("native", "transformers"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.NATIVE)
@pytest.mark.parametrize("template", [Template.PAPER, Template.NO_INSTRUCTION])
def test_text_first_with_one_item_is_text_prefix_suffix(llm, family, template):
    """With one item nothing is shared out of place: the cache must give the plain pass over the whole."""
    encoder = tiny.encoder(llm(family), prompt={"layout": Layout.TEXT_FIRST, "template": template})
    laser, prompt = encoder.laser.eval(), encoder.catalogue.prompt
    for row in tiny.histories([3], [8]):
        text = np.concatenate([prompt.instruction, prompt.block(encoder.catalogue.tokens[row[0] - 1])])
        prefix, _ = laser.prefix(*encoder.states([row]))
        embeds = torch.cat([laser.backbone.embed(torch.as_tensor(text).long()), prefix[0], laser.suffix])
        want = laser.backbone.decoder(embeds[None])[0, -1].detach()
        torch.testing.assert_close(encoder.encode([row], 1)[0], want, rtol=1e-4, atol=1e-4)


def test_text_first_knows_the_order_of_items(llm):
    encoder = tiny.encoder(llm(), prompt={"layout": Layout.TEXT_FIRST}, mformer={"prefix": Prefix.NONE})
    there, back = encoder.encode(tiny.histories([3, 8], [8, 3]), 2)
    assert not torch.allclose(there, back, atol=1e-3)


@pytest.mark.parametrize("layout", list(Layout))
def test_text_is_the_last_max_items(llm, layout):
    encoder = tiny.encoder(llm(), prompt={"layout": layout}, mformer={"prefix": Prefix.NONE})
    long, last, other = encoder.encode(tiny.histories([9, 9, 1, 2, 3, 4], [1, 2, 3, 4], [9, 1, 2, 3]), 3)
    torch.testing.assert_close(long, last, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(last, other, atol=1e-3)


def test_states_are_the_id_models_and_leave_out_unknown_items(llm):
    encoder = tiny.encoder(llm(), n=12, n_known=9)
    rows = tiny.histories([1, 11, 2], [10, 12], [5], [1, 2, 3, 4, 5, 6, 7, 8])
    states, mask = encoder.states(rows)
    assert mask.sum(dim=1).tolist() == [2, 0, 1, 6]
    for row, known in enumerate(([1, 2], [], [5], [3, 4, 5, 6, 7, 8])):
        if known:
            want = encoder.id_model.states(torch.tensor([known]))[0]
            torch.testing.assert_close(states[row, : len(known)], want)
        assert not mask[row, len(known) :].any()
    assert torch.isfinite(encoder.encode(rows, 4)).all()


def test_hidden_states_are_those_of_nobody(llm):
    encoder = tiny.encoder(llm())
    encoder.laser.eval()
    outputs, route = encoder.outputs(ROWS, hide_states=torch.tensor([True, False, False, True]))
    shown, _ = encoder.outputs(ROWS)
    assert route.mask.any(dim=1).tolist() == [False, True, True, False]
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, shown, strict=True)]
    assert same == [False, True, True, False]


def test_id_part_is_the_next_items_state_and_an_items_own_row(llm):
    encoder = tiny.encoder(llm(), n=12, n_known=9)
    rows = tiny.histories([1, 11, 2], [10, 12], [5])
    part = encoder.id_part(rows)
    torch.testing.assert_close(part[0], encoder.id_model.states(torch.tensor([[1, 2]]))[0, 1])
    assert not part[1].any()
    items = encoder.id_part(tiny.histories([3], [12]), as_item=True)
    assert torch.equal(items[0], encoder.id_model.item_embeddings()[2]) and not items[1].any()


def test_scores_weigh_text_and_id_by_their_shares(llm):
    cosine = torch.nn.functional.cosine_similarity
    text, both = (tiny.encoder(llm(), head={"id_share": share}) for share in (0.0, 0.3))
    items = tiny.histories([1], [2], [3], [4])
    got = cosine(both.encode(ROWS, 4), both.encode(items, 4, as_item=True))
    want = 0.7 * cosine(text.encode(ROWS, 4), text.encode(items, 4, as_item=True))
    want += 0.3 * cosine(text.id_part(ROWS), text.id_part(items, as_item=True))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", list(Layout))
def test_items_are_histories_of_themselves(llm, layout):
    encoder = tiny.encoder(llm(), prompt={"layout": layout})
    items = encoder.encode_items(5)
    assert items.shape == (12, 32)
    torch.testing.assert_close(items, encoder.encode(tiny.histories(*([i] for i in range(1, 13))), 12),
                               rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.encode_items(4, first=10), items[9:], rtol=1e-4, atol=1e-4)


def test_an_items_own_instruction_changes_items_only(llm):
    paper, own = (tiny.encoder(llm(), prompt={"template": t}) for t in (Template.PAPER, Template.ITEM_INSTRUCTION))
    torch.testing.assert_close(paper.encode(ROWS, 4), own.encode(ROWS, 4))
    assert not torch.allclose(paper.encode_items(4), own.encode_items(4), atol=1e-3)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("side", list(ItemSide))
def test_plain_items_stand_still(llm, layout, side):
    encoder = tiny.encoder(llm(), prompt={"layout": layout, "item_side": side}, head={"projection": True})
    if side == ItemSide.MEAN:  # it starts without a say
        torch.nn.init.normal_(encoder.laser.head.added.weight)
    items, users = encoder.encode_items(4), encoder.encode(ROWS, 4)
    with torch.no_grad():
        encoder.laser.suffix += 0.5
    assert torch.allclose(encoder.encode_items(4), items, atol=1e-5) == (side != ItemSide.TRAINED)
    assert not torch.allclose(encoder.encode(ROWS, 4), users, atol=1e-3)


@pytest.mark.parametrize("layout", list(Layout))
def test_added_items_leave_the_others_alone(llm, layout):
    encoder = tiny.encoder(llm(), prompt={"layout": layout})
    users, items = encoder.encode(ROWS, 4), encoder.encode_items(4)
    new = tiny.items(15).tail(3)
    encoder.catalogue.add(new)
    assert len(encoder.catalogue) == 15
    torch.testing.assert_close(encoder.encode(ROWS, 4), users)
    torch.testing.assert_close(encoder.encode_items(4)[:12], items, rtol=1e-4, atol=1e-4)
    at_once = tiny.encoder(llm(), n=15, n_known=12, prompt={"layout": layout})
    torch.testing.assert_close(encoder.encode_items(4, first=13), at_once.encode_items(4, first=13),
                               rtol=1e-4, atol=1e-4)


def test_encoding_is_without_dropout_and_gradient_and_leaves_the_mode(llm):
    encoder = tiny.encoder(llm(), mformer={"dropout": 0.5})
    encoder.laser.train()
    first = encoder.encode(ROWS, 4)
    assert torch.equal(first, encoder.encode(ROWS, 4)) and not first.requires_grad
    assert encoder.laser.training
    assert encoder.embed(ROWS)[0].requires_grad


def test_the_id_model_is_frozen_whatever_training_does(llm):
    encoder = tiny.encoder(llm())
    encoder.laser.train()
    assert not encoder.id_model.training
    encoder.embed(ROWS)[0].sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in encoder.id_model.parameters())
    held = {p.data_ptr() for p in encoder.id_model.parameters()}
    assert not held & {t.data_ptr() for t in encoder.laser.state_dict().values()}


def test_text_first_needs_the_native_decoder(llm):
    for settings in ({"family": "gpt2"}, {"family": "llama", "engine": "transformers"}):
        with pytest.raises(UserError, match="text_first needs the native decoder"):
            tiny.encoder(llm(**settings), prompt={"layout": Layout.TEXT_FIRST})
