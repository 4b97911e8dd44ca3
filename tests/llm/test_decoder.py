"""The native decoder is transformers' forward; reading cached text is the same as reading the text. Each test runs with
the computation that a CPU gets and with the two that a GPU may get."""

import pytest
import tiny
import torch
from gpu_kernels import WAYS, computed_as_on_gpu

from laserrec.llm.attention import Past, TextCache
from laserrec.llm.decoder import NativeDecoder, native_reason


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def lines(*lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(lengths), max(lengths), 32, generator=generator)


@pytest.fixture(params=WAYS, autouse=True)
def way(request):
    with computed_as_on_gpu(request.param):
        yield request.param


@pytest.fixture(params=tiny.NATIVE)
def model(request):
    return tiny.make_llm(request.param).model.requires_grad_(False).eval()


@pytest.mark.parametrize("layers", [None, 2])
def test_outputs_and_input_gradients_are_transformers(model, layers):
    decoder = NativeDecoder(model, torch.float32, layers)
    embeds = lines(11, 11, 11)
    mine, theirs = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    if layers:
        model.layers = model.layers[:layers]
    ours, reference = decoder(mine), model(inputs_embeds=theirs, use_cache=False).last_hidden_state
    assert relative(ours, reference) < 1e-4
    weight = torch.randn_like(reference)
    (ours * weight).sum().backward()
    (reference * weight).sum().backward()
    assert relative(mine.grad, theirs.grad) < 1e-4


def test_nothing_of_it_can_be_trained(model):
    decoder = NativeDecoder(model, torch.float32)
    assert list(decoder.parameters()) == []
    assert decoder.state_dict() == {}


def test_reading_a_past_is_reading_the_whole_text(model):
    """Two texts of unequal length, cached by themselves, each followed by three new tokens."""
    decoder, lengths, new = NativeDecoder(model, torch.float32), [9, 4], lines(3, 3)
    texts = [lines(n)[0] + i for i, n in enumerate(lengths)]
    parts = [decoder.encode_text(t[None]) for t in texts]
    # The cache's rows are shuffled: an index says where each token is.
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(5))
    place = order.argsort()
    cache = TextCache(*(torch.cat([p[i][:, 0] for p in parts], dim=1)[:, order] for i in (0, 1)))
    index = torch.stack([place[:9], torch.nn.functional.pad(place[9:], (0, 5))])
    mine, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    got = decoder(mine, Past(cache, index, torch.tensor(lengths)))
    want = torch.stack([decoder(torch.cat([t, x])[None])[0, -3:] for t, x in zip(texts, theirs, strict=True)])
    assert relative(got, want) < 1e-5
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert relative(mine.grad, theirs.grad) < 1e-5


def test_text_behind_a_past_is_the_text_in_place(model):
    """encode_text with a past (the instruction) gives the keys and values of one pass over both."""
    decoder, whole = NativeDecoder(model, torch.float32), lines(10, 10)
    keys, values = decoder.encode_text(whole)
    cache = TextCache(keys[:, :, :4].flatten(1, 2), values[:, :, :4].flatten(1, 2))
    index = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    k, v = decoder.encode_text(whole[:, 4:], Past(cache, index, torch.tensor([4, 4])))
    # Keys are kept before rotary embedding, yet depend on what each token attended to.
    assert relative(k, keys[:, :, 4:]) < 1e-5
    assert relative(v, values[:, :, 4:]) < 1e-5
    alone, _ = decoder.encode_text(whole[:, 4:])
    assert relative(alone, keys[:, :, 4:]) > 1e-2


def test_an_empty_past_is_no_past(model):
    decoder, x = NativeDecoder(model, torch.float32), lines(5, 5)
    empty = torch.zeros(3, 0, decoder.shape.kv_dim)
    past = Past(TextCache(empty, empty), torch.zeros(2, 0, dtype=torch.long), torch.tensor([0, 0]))
    assert relative(decoder(x, past), decoder(x)) < 1e-5


def test_padding_on_the_right_is_not_seen(model):
    decoder, x = NativeDecoder(model, torch.float32), lines(8, 8)
    changed = x.clone()
    changed[:, 5:] = 7.0
    assert torch.equal(decoder(x)[:, :5], decoder(changed)[:, :5])
    assert not torch.equal(decoder(x)[:, 5:], decoder(changed)[:, 5:])


def test_bf16_is_as_near_to_the_truth_as_transformers_own(model):
    x = torch.randn(16, 24, 32, generator=torch.Generator().manual_seed(1))
    truth = model(inputs_embeds=x, use_cache=False).last_hidden_state
    rounded = x.bfloat16()
    decoder = NativeDecoder(model, torch.bfloat16)
    keys, values = decoder.encode_text(rounded[:, :12])
    past = Past(TextCache(keys.flatten(1, 2), values.flatten(1, 2)), torch.arange(16 * 12).view(16, 12),
                torch.full((16,), 12))
    ours, behind = decoder(rounded), decoder(rounded[:, 12:], past)
    theirs = model.to(torch.bfloat16)(inputs_embeds=rounded, use_cache=False).last_hidden_state

    def error(y: torch.Tensor, want: torch.Tensor) -> float:
        return float((y.float() - want).square().mean().sqrt())

    assert ours.dtype == torch.float32
    assert 0 < error(ours, truth) < 1.25 * error(theirs, truth)
    assert 0 < error(behind, truth[:, 12:]) < 1.25 * error(theirs[:, 12:], truth[:, 12:])


def test_more_layers_than_there_are_means_all(model):
    assert NativeDecoder(model, torch.float32, 99).shape.layers == 3


def test_what_the_native_forward_does_not_know_is_refused():
    import transformers as t

    assert native_reason(t.LlamaConfig()) is None
    assert "gpt2" in native_reason(t.GPT2Config())
    assert "gelu" in native_reason(t.LlamaConfig(hidden_act="gelu"))
    assert "sliding" in native_reason(t.MistralConfig(sliding_window=16))
    assert "sliding" in native_reason(t.Qwen2Config(use_sliding_window=True, max_window_layers=1))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert "linear" in native_reason(t.LlamaConfig(rope_parameters=scaled))
    assert "sliding" in native_reason(t.Qwen3Config(use_sliding_window=True, max_window_layers=1))


@pytest.mark.parametrize("recompute", [False, True])
def test_packed_rows_are_transformers_each_alone(model, recompute):
    decoder = NativeDecoder(model, torch.float32, recompute=recompute)
    rows = [lines(n)[0] + n / 10 for n in (9, 2, 70, 8, 1)]
    mine, theirs = ([r.clone().requires_grad_() for r in rows] for _ in range(2))
    want = [model(inputs_embeds=r[None], use_cache=False).last_hidden_state[0] for r in theirs]
    assert relative(decoder.read_rows(mine, last_only=False), torch.cat(want)) < 1e-4
    last = decoder.read_rows(mine, last_only=True)
    reference = torch.stack([w[-1] for w in want])
    assert relative(last, reference) < 1e-4
    weight = torch.randn_like(reference)
    (last * weight).sum().backward()
    (reference * weight).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a.grad, b.grad) < 1e-4


def test_the_last_of_new_tokens_behind_a_past(model):
    decoder = NativeDecoder(model, torch.float32)
    keys, values = decoder.encode_text(lines(6, 6))
    past = Past(TextCache(keys.flatten(1, 2), values.flatten(1, 2)), torch.arange(12).view(2, 6), torch.tensor([6, 4]))
    new = lines(3, 3)
    last = decoder.read(new.flatten(0, 1), decoder.behind(past, 3), last_only=True)
    assert relative(last, decoder(new, past)[:, -1]) < 1e-5
