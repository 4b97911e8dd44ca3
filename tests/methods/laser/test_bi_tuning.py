"""[prefix][text][suffix]: the order, what is pooled, what is trained, and that the frozen LLM stays as it is."""

import dataclasses

import pytest
import tiny
import torch
from torch import nn

from laserrec.config import ItemSide, Layout, Pooling, Prefix, Template
from laserrec.data.histories import Histories
from laserrec.data.prompt import INSTRUCTIONS
from laserrec.util.errors import UserError

ROWS = tiny.histories([0, 1, 2], [6], [3, 8, 1, 4, 7], [10, 11])
LAYOUTS = [Layout.PREFIX_FIRST, Layout.TEXT_FIRST]
WAYS = [("llama", "native", Layout.PREFIX_FIRST), ("llama", "transformers", Layout.PREFIX_FIRST),
        ("gpt2", "auto", Layout.PREFIX_FIRST), ("llama", "native", Layout.TEXT_FIRST),
        ("qwen3", "native", Layout.TEXT_FIRST)]


class Recorder(nn.Module):
    """A decoder that keeps what it was given and answers with each token's place."""

    def read_rows(self, rows, last_only):
        self.rows = [row.detach() for row in rows]
        outputs = [row + torch.arange(len(row))[:, None] for row in rows]
        return torch.stack([out[-1] for out in outputs]) if last_only else torch.cat(outputs)

    def behind(self, past, seq):
        self.past, self.seq = past, seq

    def read(self, embeds, attention, last_only):
        self.rows = embeds.detach().split(self.seq)
        return embeds.view(-1, self.seq, 32)[:, -1] + self.seq - 1


def recorded(llm, **sections):
    """A Laser whose texts are real, and whose reader's decoder is a recorder from now on."""
    laser, recorder = tiny.laser(llm(), **sections).eval(), Recorder()
    laser.reader.backbone = dataclasses.replace(llm(), decoder=recorder)
    laser.texts.decoder = recorder  # layout text_first reads by it
    return laser, laser.reader, recorder


def outputs(laser, histories: Histories, **options) -> torch.Tensor:
    """The LLM's, at the suffix."""
    with torch.no_grad():
        return laser.eval().reader.read(histories, **options)[0]


@pytest.mark.parametrize("prefix", list(Prefix))
def test_prefix_then_text_then_suffix(llm, prefix):
    laser, reader, recorder = recorded(llm, mformer={"prefix": prefix})
    pooled, _ = reader.read(ROWS)
    own, _ = reader.prefix(*laser.ids.states(ROWS))
    assert own.shape == (4, 0 if prefix == Prefix.NONE else 2, 32)
    for row, text in enumerate(laser.texts.texts(ROWS, as_item=False)):
        want = torch.cat([own[row], llm().embedding[torch.as_tensor(text).long()], reader.suffix])
        torch.testing.assert_close(recorder.rows[row], want)
        torch.testing.assert_close(pooled[row], reader.suffix[0] + len(want) - 1)
    assert reader.overhead == len(recorder.rows[1]) - int(laser.texts.lengths()[6])


def test_text_first_adds_prefix_and_suffix_behind_the_past(llm):
    laser, reader, recorder = recorded(llm, prompt={"layout": Layout.TEXT_FIRST, "max_items": 4})
    pooled, _ = reader.read(ROWS)
    want = torch.cat([reader.prefix(*laser.ids.states(ROWS))[0], reader.suffix.expand(4, 1, -1)], dim=1)
    torch.testing.assert_close(torch.stack(recorder.rows), want)
    torch.testing.assert_close(pooled, reader.suffix.expand(4, -1) + 2)
    lengths, start = laser.texts.lengths(), len(laser.texts.prompt.instruction)
    assert recorder.past.length.tolist() == [start + sum(lengths[i] for i in row[-4:]) for row in ROWS.lists()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_leaves_out_all_that_is_trained(llm, layout):
    laser, reader, recorder = recorded(llm, prompt={"layout": layout})
    each = tiny.histories([3], [5])
    reader.read_items(each, plain=True)
    eos = llm().embedding[llm().tokenizer.eos_token_id]
    for row, text in enumerate(laser.texts.texts(each, as_item=True)):
        start = llm().embedding[torch.as_tensor(text).long()] if layout == Layout.PREFIX_FIRST else eos[:0, None].T
        torch.testing.assert_close(recorder.rows[row][-1], eos)
        assert len(recorder.rows[row]) == (len(start) if layout == Layout.PREFIX_FIRST else 0) + 1


def test_mean_pooling_leaves_out_suffix_and_padding(llm):
    laser, reader, _ = recorded(llm, head={"pooling": Pooling.MEAN}, mformer={"prefix": Prefix.NONE})
    pooled, _ = reader.read(ROWS)
    for row, text in enumerate(laser.texts.texts(ROWS, as_item=False)):
        embeds = llm().embedding[torch.as_tensor(text).long()] + torch.arange(len(text))[:, None]
        torch.testing.assert_close(pooled[row], embeds.mean(0))


def test_eos_pooling_and_eos_start(llm):
    eos = llm().embedding[llm().tokenizer.eos_token_id]
    frozen, start, random = (tiny.laser(llm(), head=h).reader
                             for h in ({"pooling": Pooling.EOS}, {"suffix_from_eos": True}, {}))
    assert torch.equal(frozen.suffix[0], eos) and not frozen.suffix.requires_grad
    assert torch.equal(start.suffix[0], eos) and start.suffix.requires_grad
    assert not torch.equal(random.suffix[0], eos) and random.suffix.requires_grad
    with torch.no_grad():
        start.suffix += 1
    assert torch.equal(llm().embedding[llm().tokenizer.eos_token_id], frozen.suffix[0])


def test_zero_init_starts_as_the_instructions_words(llm):
    laser = tiny.laser(llm(), mformer={"zero_init": True, "queries": 3})
    ids = llm().tokenizer(INSTRUCTIONS[Template.PAPER])["input_ids"][:3]
    prefix, _ = laser.reader.prefix(*laser.ids.states(ROWS))
    assert torch.equal(prefix, llm().embedding[torch.tensor(ids)].expand(4, -1, -1))


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("prefix", list(Prefix))
def test_what_is_trained(llm, prefix, pooling):
    laser = tiny.laser(llm(), mformer={"prefix": prefix}, head={"pooling": pooling, "projection": True}).train()
    out, route = laser.user_side.text(ROWS)
    out.square().sum().backward()
    assert (route is None) == (prefix != Prefix.MFORMER)
    reached = {name for name, p in laser.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {"head.projection.weight"} | ({"reader.suffix"} if pooling == Pooling.SUFFIX else set())
    if prefix == Prefix.LEARNED:
        expected |= {"reader.learned_prefix"}
    parts = {"experts", "projection.weight", "blocks.0.cross_attention.key_value.weight"}
    if prefix in (Prefix.MFORMER, Prefix.ONE_EXPERT):
        assert {f"reader.mformer.{part}" for part in parts} <= reached
        reached = {name for name in reached if not name.startswith("reader.mformer.")}
    assert reached == expected


@pytest.mark.parametrize(("family", "engine"), [("llama", "native"), ("llama", "transformers"), ("gpt2", "auto")])
def test_training_leaves_the_llm_and_the_id_model_alone_and_out_of_the_state(llm, family, engine):
    backbone = llm(family, engine=engine)
    before, laser = backbone.tensor_hash(), tiny.laser(backbone).train()
    optimizer = torch.optim.Adam([p for p in laser.parameters() if p.requires_grad], lr=0.1)
    start = laser.reader.suffix.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        laser.user_side.text(ROWS)[0].square().sum().backward()
        optimizer.step()
    assert not torch.equal(laser.reader.suffix, start)
    assert backbone.tensor_hash() == before
    model = laser.ids.model
    assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    held = {t.data_ptr() for t in [*backbone.decoder.parameters(), *backbone.decoder.buffers(), backbone.embedding,
                                   *model.parameters()]}
    assert not held & {t.data_ptr() for t in laser.state_dict().values()}
    assert {name.split(".")[1] for name in laser.state_dict()} == {"mformer", "suffix"}


@pytest.mark.parametrize(("family", "engine", "layout"), WAYS)
def test_an_output_does_not_depend_on_its_batch(llm, family, engine, layout):
    laser = tiny.laser(llm(family, engine=engine), prompt={"layout": layout})
    together = outputs(laser, ROWS)
    for row in range(4):
        torch.testing.assert_close(outputs(laser, ROWS.take([row]))[0], together[row], rtol=1e-4, atol=1e-4)
    backwards = outputs(laser, ROWS.take([3, 2, 1, 0]))
    torch.testing.assert_close(backwards.flip(0), together, rtol=1e-4, atol=1e-4)
    assert torch.pdist(together).min() > 1e-2


def test_both_engines_give_the_same_output(llm):
    ours, theirs = (outputs(tiny.laser(llm(engine=e)), ROWS) for e in ("native", "transformers"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.NATIVE)
@pytest.mark.parametrize("template", [Template.PAPER, Template.NO_INSTRUCTION])
def test_text_first_with_one_item_is_text_prefix_suffix(llm, family, template):
    """With one item nothing is shared out of place: the cache must give the plain pass over the whole."""
    laser = tiny.laser(llm(family), prompt={"layout": Layout.TEXT_FIRST, "template": template}).eval()
    for row in (tiny.histories([2]), tiny.histories([7])):
        text = laser.texts.texts(row, as_item=False)[0]
        prefix, _ = laser.reader.prefix(*laser.ids.states(row))
        embeds = torch.cat([llm(family).embed(torch.as_tensor(text).long()), prefix[0], laser.reader.suffix])
        want = llm(family).decoder(embeds[None])[0, -1].detach()
        torch.testing.assert_close(outputs(laser, row)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_items_counts_and_text_is_the_last_max_items(llm, layout):
    laser = tiny.laser(llm(), prompt={"layout": layout, "max_items": 4}, mformer={"prefix": Prefix.NONE})
    there, back = outputs(laser, tiny.histories([2, 7], [7, 2]))
    assert not torch.allclose(there, back, atol=1e-3)
    long, last, other = outputs(laser, tiny.histories([8, 8, 0, 1, 2, 3], [0, 1, 2, 3], [8, 0, 1, 2]))
    torch.testing.assert_close(long, last, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(last, other, atol=1e-3)


def test_states_are_the_id_models_and_leave_out_unknown_items(llm):
    laser = tiny.laser(llm(), n=12, n_known=9)
    rows = tiny.histories([0, 10, 1], [9, 11], [4], [0, 1, 2, 3, 4, 5, 6, 7])
    states, mask = laser.ids.states(rows)
    assert mask.sum(dim=1).tolist() == [2, 0, 1, 6]
    for row, known in enumerate(([0, 1], [], [4], [2, 3, 4, 5, 6, 7])):
        if known:
            torch.testing.assert_close(states[row, : len(known)], laser.ids.model.states(torch.tensor([known]))[0])
        assert not mask[row, len(known) :].any()
    assert torch.isfinite(outputs(laser, rows)).all()
    nobody, none = laser.ids.states(tiny.histories([9], [11]))
    assert not none.any() and nobody.shape[0] == 2


def test_hidden_states_are_those_of_nobody(llm):
    laser = tiny.laser(llm()).eval()
    hidden, route = laser.reader.read(ROWS, torch.tensor([True, False, False, True]))
    assert route.mask.any(dim=1).tolist() == [False, True, True, False]
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(hidden, outputs(laser, ROWS), strict=True)]
    assert same == [False, True, True, False]
    assert route.users_per_expert().sum() == 2


def test_an_items_own_instruction_changes_items_only(llm):
    paper, own = (tiny.laser(llm(), prompt={"template": t}) for t in (Template.PAPER, Template.ITEM_INSTRUCTION))
    torch.testing.assert_close(outputs(paper, ROWS), outputs(own, ROWS))
    rows = torch.arange(12)
    assert not torch.allclose(paper.item_outputs(rows), own.item_outputs(rows), atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", list(ItemSide))
def test_plain_items_stand_still(llm, layout, side):
    laser = tiny.laser(llm(), prompt={"layout": layout, "item_side": side}, head={"projection": True}).eval()
    if side == ItemSide.MEAN:  # the reader starts without a part in it
        torch.nn.init.normal_(laser.added.map.weight)
    items, users = laser.item_outputs(torch.arange(12)), laser.read(ROWS)[0]
    with torch.no_grad():
        laser.reader.suffix += 0.5
    assert torch.allclose(laser.item_outputs(torch.arange(12)), items, atol=1e-5) == (side != ItemSide.TRAINED)
    assert not torch.allclose(laser.read(ROWS)[0], users, atol=1e-3)


def test_text_first_needs_the_native_decoder_and_keeps_no_text_outputs(llm):
    for settings in ({"family": "gpt2"}, {"family": "llama", "engine": "transformers"}):
        with pytest.raises(UserError, match="text_first needs the native decoder"):
            tiny.laser(llm(**settings), prompt={"layout": Layout.TEXT_FIRST})
    with pytest.raises(ValueError, match=r"mean needs prompt\.layout prefix_first"):
        tiny.config("x", head={"pooling": Pooling.MEAN}, prompt={"layout": Layout.TEXT_FIRST})
