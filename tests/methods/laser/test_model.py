"""[prefix][text][suffix]: the order, what is pooled, what is trained, and that the frozen LLM stays as it is."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from laserrec.config import Layout, Pooling, Prefix
from laserrec.data.prompt import INSTRUCTIONS, Template
from laserrec.llm.attention import Past, TextCache
from laserrec.methods.laser.model import Laser

D_ID = 16
TEXTS = [np.array([5, 6, 7, 8, 9]), np.array([40, 41]), np.array([99, 98, 97])]


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


@pytest.fixture
def recorded(llm):
    recorder = Recorder()
    return recorder, dataclasses.replace(llm(), decoder=recorder)


def make(backbone, seed: int = 4, **sections) -> Laser:
    torch.manual_seed(seed)
    return Laser(tiny.config(backbone.name, **sections), backbone, D_ID).eval()


def states(*known: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(*known, 1)
    generator = torch.Generator().manual_seed(8)
    return torch.randn(len(known), width, D_ID, generator=generator), torch.arange(width) < torch.tensor(known)[:, None]


@pytest.mark.parametrize("prefix", list(Prefix))
def test_prefix_then_text_then_suffix(recorded, prefix):
    recorder, backbone = recorded
    laser, given = make(backbone, mformer={"prefix": prefix}), states(3, 1, 2)
    pooled, _ = laser(TEXTS, *given)
    own, _ = laser.prefix(*given)
    queries = 0 if prefix == Prefix.NONE else 2
    assert own.shape == (3, queries, 32)
    for row, text in enumerate(TEXTS):
        want = torch.cat([own[row], backbone.embedding[torch.as_tensor(text)], laser.suffix])
        torch.testing.assert_close(recorder.rows[row], want)
        torch.testing.assert_close(pooled[row], laser.suffix[0] + len(want) - 1)


def empty_past(rows):
    nothing, none = torch.zeros(3, 0, 16), torch.zeros(rows, dtype=torch.long)
    return Past(TextCache(nothing, nothing), none.reshape(rows, -1)[:, :0], none)


def test_text_first_adds_prefix_and_suffix_behind_the_past(recorded):
    recorder, backbone = recorded
    laser, given, past = make(backbone), states(3, 1), empty_past(2)
    pooled, _ = laser.read_past(past, *given)
    want = torch.cat([laser.prefix(*given)[0], laser.suffix.expand(2, 1, -1)], dim=1)
    torch.testing.assert_close(torch.stack(recorder.rows), want)
    assert recorder.past is past
    torch.testing.assert_close(pooled, laser.suffix.expand(2, -1) + 2)


def test_plain_leaves_out_all_that_is_trained(recorded, llm):
    recorder, backbone = recorded
    laser, given = make(backbone), states(3, 1, 2)
    _, route = laser(TEXTS, *given, plain=True)
    eos = backbone.embedding[backbone.tokenizer.eos_token_id]
    for row, text in enumerate(TEXTS):
        want = torch.cat([backbone.embedding[torch.as_tensor(text)], eos[None]])
        torch.testing.assert_close(recorder.rows[row], want)
    assert route is None
    laser.read_past(empty_past(3), *given, plain=True)
    torch.testing.assert_close(torch.stack(recorder.rows), eos.expand(3, 1, -1))


def test_mean_pooling_leaves_out_suffix_and_padding(recorded):
    _, backbone = recorded
    laser = make(backbone, head={"pooling": Pooling.MEAN}, mformer={"prefix": Prefix.NONE})
    pooled, _ = laser(TEXTS, *states(3, 1, 2))
    for row, text in enumerate(TEXTS):
        embeds = backbone.embedding[torch.as_tensor(text)] + torch.arange(len(text))[:, None]
        torch.testing.assert_close(pooled[row], embeds.mean(0))


def test_eos_pooling_and_eos_start(llm):
    backbone = llm()
    eos = backbone.embedding[backbone.tokenizer.eos_token_id]
    frozen, start, random = (make(backbone, head=h) for h in ({"pooling": Pooling.EOS}, {"suffix_from_eos": True}, {}))
    assert torch.equal(frozen.suffix[0], eos) and not frozen.suffix.requires_grad
    assert torch.equal(start.suffix[0], eos) and start.suffix.requires_grad
    assert not torch.equal(random.suffix[0], eos) and random.suffix.requires_grad
    with torch.no_grad():
        start.suffix += 1
    assert not torch.equal(start.suffix[0], eos)
    assert torch.equal(llm().embedding[backbone.tokenizer.eos_token_id], frozen.suffix[0])


def test_zero_init_starts_as_the_instructions_words(llm):
    laser = make(llm(), mformer={"zero_init": True, "queries": 3})
    ids = llm().tokenizer(INSTRUCTIONS[Template.PAPER])["input_ids"][:3]
    prefix, _ = laser.prefix(*states(3, 1, 0))
    assert torch.equal(prefix, llm().embedding[torch.tensor(ids)].expand(3, -1, -1))


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("prefix", list(Prefix))
def test_what_is_trained(llm, prefix, pooling):
    laser = make(llm(), mformer={"prefix": prefix}, head={"pooling": pooling, "projection": True}).train()
    out, route = laser(TEXTS, *states(3, 1, 2))
    laser.head(out).square().sum().backward()
    assert (route is None) == (prefix != Prefix.MFORMER)
    reached = {name for name, p in laser.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {"head.projection.weight"} | ({"suffix"} if pooling == Pooling.SUFFIX else set())
    if prefix == Prefix.LEARNED:
        expected |= {"learned_prefix"}
    parts = {"mformer.experts", "mformer.projection.weight", "mformer.blocks.0.cross_attention.key_value.weight"}
    if prefix in (Prefix.MFORMER, Prefix.ONE_EXPERT):
        assert parts <= reached
        reached = {name for name in reached if not name.startswith("mformer.")}
    assert reached == expected


@pytest.mark.parametrize(("family", "engine"), [("llama", "native"), ("llama", "transformers"), ("gpt2", "auto")])
def test_training_leaves_the_llm_alone_and_out_of_the_state(llm, family, engine):
    backbone = llm(family, engine=engine)
    before = backbone.tensor_hash()
    laser = make(backbone).train()
    optimizer = torch.optim.Adam(laser.parameters(), lr=0.1)
    start = {name: p.detach().clone() for name, p in laser.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        laser(TEXTS, *states(3, 1, 2))[0].square().sum().backward()
        optimizer.step()
    assert not torch.equal(laser.suffix, start["suffix"])
    assert backbone.tensor_hash() == before
    held = {t.data_ptr() for t in [*backbone.decoder.parameters(), *backbone.decoder.buffers(), backbone.embedding]}
    assert not held & {t.data_ptr() for t in laser.state_dict().values()}
    assert {name.split(".")[0] for name in laser.state_dict()} == {"mformer", "suffix"}


@pytest.mark.parametrize(("family", "engine"), [("llama", "native"), ("llama", "transformers"), ("gpt2", "auto")])
@pytest.mark.parametrize("pooling", list(Pooling))
def test_an_output_does_not_depend_on_its_batch(llm, family, engine, pooling):
    laser = make(llm(family, engine=engine), head={"pooling": pooling})
    known, mask = states(3, 1, 2)
    batch, _ = laser(TEXTS, known, mask)
    for row, n in enumerate((3, 1, 2)):
        alone, _ = laser([TEXTS[row]], known[row : row + 1, :n], mask[row : row + 1, :n])
        torch.testing.assert_close(alone[0], batch[row], rtol=1e-4, atol=1e-5)


def test_the_suffix_reads_prefix_and_text(llm):
    laser = make(llm())
    known, mask = states(3, 3, 3)
    base, _ = laser([TEXTS[0]] * 3, known[:1].expand(3, -1, -1), mask)
    assert torch.allclose(base[0], base[1], atol=1e-5)
    other_states, _ = laser([TEXTS[0]] * 3, known, mask)
    assert not torch.allclose(other_states[1], base[1], atol=1e-3)
    other_text, _ = laser(TEXTS, known[:1].expand(3, -1, -1), mask)
    assert not torch.allclose(other_text[1], base[1], atol=1e-3)


def test_text_first_keeps_no_text_outputs_to_average():
    with pytest.raises(ValueError, match=r"mean needs prompt\.layout prefix_first"):
        tiny.config("x", head={"pooling": Pooling.MEAN}, prompt={"layout": Layout.TEXT_FIRST})
