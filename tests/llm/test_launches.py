"""A small batch on a GPU takes as long as its launches: no more of them than transformers'."""

import pytest
import tiny
import torch
from gpu_kernels import computed_as_on_gpu, counted

from laserrec.llm.attention import Past, TextCache
from laserrec.llm.decoder import NativeDecoder

LENGTHS = (9, 4, 30, 31, 70, 12, 3, 2)


def launches(layers: int, read) -> tuple[int, int]:
    """Forward and backward of what `read` makes of transformers' model."""
    model = tiny.make_llm("llama", num_hidden_layers=layers).model.requires_grad_(False).eval()
    work = read(model)
    with counted() as forward:
        out = work()
    weighted = (out * torch.randn_like(out)).sum()
    with counted() as backward:
        weighted.backward()
    return forward.count, backward.count


def rows() -> list[torch.Tensor]:
    return [torch.randn(n, 32).requires_grad_() for n in LENGTHS]


def whole_texts(model):
    decoder, given = NativeDecoder(model, torch.float32), rows()
    return lambda: decoder.read_rows(given, last_only=False)


def new_tokens(model):
    decoder, given = NativeDecoder(model, torch.float32), torch.randn(24, 32).requires_grad_()
    kept = torch.randn(2, len(decoder.layers), 40, decoder.shape.kv_dim)
    past = Past(TextCache(*kept), torch.arange(40).view(8, 5), torch.arange(8) % 5 + 1)
    return lambda: decoder.read(given, decoder.behind(past, 3))


def theirs(model):
    padded = torch.nn.utils.rnn.pad_sequence(rows(), batch_first=True)
    return lambda: model(inputs_embeds=padded, use_cache=False).last_hidden_state


@pytest.mark.parametrize(("way", "read", "bounds"), [
    ("unpadded", whole_texts, (14, 17)), ("unpadded", new_tokens, (16, 17)),
    ("padded", whole_texts, (18, 28)), ("padded", new_tokens, (18, 19))])
def test_a_layer_takes_few_launches(way, read, bounds):
    """bounds: of one more layer, forward and backward. transformers takes 34 and 56."""
    with computed_as_on_gpu(way):
        few, many = launches(2, read), launches(3, read)
    reference = [b - a for a, b in zip(launches(2, theirs), launches(3, theirs), strict=True)]
    for fewer, more, bound, allowed, own in zip(few, many, bounds, reference, launches(3, theirs), strict=True):
        assert more - fewer <= bound < allowed
        assert more <= own
