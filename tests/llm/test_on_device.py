"""The LLM on a device that this machine pretends to have: all goes there, nothing waits, numbers are the CPU's."""

import pytest
import tiny
import torch
from devices import DevicesMetError, pretended

from laserrec.config import BackboneConfig, PromptConfig
from laserrec.llm.attention import Past, TextCache
from laserrec.llm.backbone import Backbone, load_backbone
from laserrec.llm.text_features import TextFeatures
from laserrec.llm.whitening import fit_whitening, whiten
from laserrec.util.device import CPU, move

ENGINES = [("llama", "native"), ("qwen2", "native"), ("qwen3", "native"), ("llama", "transformers"), ("gpt2", "auto")]


def load(llm_folder, device: torch.device, family: str = "llama", engine: str = "native", **settings) -> Backbone:
    config = BackboneConfig(name=str(llm_folder(family)), engine=engine, precision="fp32", **settings)
    return load_backbone(config, device)


def lines(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(300, (n,), generator=generator) for n in lengths]


def outputs_and_gradient(backbone: Backbone, tokens: list[torch.Tensor], last_only: bool) -> tuple[torch.Tensor, ...]:
    """Of whole sequences whose embeddings want a gradient."""
    rows = backbone.embed(backbone.tokens(torch.cat(tokens))).float().clone().requires_grad_()
    out = backbone.decoder.read_rows(rows.split([len(t) for t in tokens]), last_only)
    out.square().sum().backward()
    return out.detach(), rows.grad


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.cpu() - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("family", "engine"), ENGINES)
def test_forward_and_backward(llm_folder, family, engine, last_only):
    tokens = lines(9, 2, 40, 8, 1)
    want = outputs_and_gradient(load(llm_folder, CPU, family, engine), tokens, last_only)
    with pretended() as gpu:
        backbone = load(llm_folder, gpu.device, family, engine)
        assert backbone.device == gpu.device
        gpu.clear()
        got = outputs_and_gradient(backbone, tokens, last_only)
        assert [t.device for t in got] == [gpu.device] * 2
        if engine == "native":
            assert gpu.syncs == []
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize("recompute", [False, True])
def test_new_tokens_behind_a_cache(llm_folder, recompute):
    """As training reads a history: texts cached once, trained tokens behind them."""
    def read(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
        texts = backbone.tokens(torch.stack(lines(6, 6, 6)))
        keys, values = backbone.decoder.encode_text(backbone.embed(texts))
        index, length = torch.arange(18).view(3, 6), torch.tensor([6, 4, 0])
        past = Past(TextCache(keys.flatten(1, 2), values.flatten(1, 2)), move(index, backbone.device),
                    move(length, backbone.device))
        k, v = backbone.decoder.encode_text(backbone.embed(texts), past)
        new = backbone.embed(texts[:, :2]).clone().requires_grad_()
        out = backbone.decoder.read(new.flatten(0, 1), backbone.decoder.behind(past, 2), last_only=True)
        (out.square().sum() + k.sum() + v.sum()).backward()
        return out.detach(), new.grad

    want = read(load(llm_folder, CPU, gradient_checkpointing=recompute))
    with pretended() as gpu:
        backbone = load(llm_folder, gpu.device, gradient_checkpointing=recompute)
        gpu.clear()
        got = read(backbone)
        assert gpu.syncs == []
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize(("engine", "depths"), [("native", ()), ("native", (1, 3)), ("transformers", (1, 3))])
def test_means_and_vectors(llm_folder, tmp_path, engine, depths):
    config = BackboneConfig(name=str(llm_folder()), engine=engine, precision="fp32", mean_layers=depths)
    prompt, items = PromptConfig(layout="text_first"), tiny.items(70)
    own = TextFeatures(config, prompt, CPU)
    with pretended() as gpu:
        there = TextFeatures(config, prompt, gpu.device, tmp_path)
        there.backbone  # noqa: B018 (loads it)
        gpu.clear()
        means = there.means(items)
        assert means.device == gpu.device
        if engine == "native":
            assert all(sync.startswith("cpu at") for sync in gpu.syncs)  # it is written to the folder
        assert_close(means, own.means(items))
        vectors = there.vectors(items)
        assert vectors.device == gpu.device and vectors.shape == (70, 32 * max(1, len(depths)))
        assert_close(TextFeatures(config, prompt, gpu.device, tmp_path).means(items), own.means(items))


def test_whitening(llm_folder):
    outputs = torch.randn(50, 12) + 3
    want = whiten(outputs, *fit_whitening(outputs, 4, 2), 2)
    with pretended() as gpu:
        there = move(outputs, gpu.device)
        assert torch.equal(whiten(there, *fit_whitening(there, 4, 2), 2).cpu(), want)


def test_a_tensor_that_was_left_behind_fails(llm_folder):
    """The tests above can fail: each of these is one tensor on the wrong device."""
    with pretended() as gpu:
        backbone = load(llm_folder, gpu.device)
        with pytest.raises(DevicesMetError, match=r"laserrec/llm/backbone\.py"):
            backbone.embed(torch.arange(3)[None])
        with pytest.raises(DevicesMetError, match=r"laserrec/llm/decoder\.py"):
            backbone.decoder(torch.zeros(1, 3, 32))
        keys, values = backbone.decoder.encode_text(backbone.embed(backbone.tokens([[1, 2, 3]])))
        past = Past(TextCache(keys[:, 0], values[:, 0]), torch.arange(3)[None], torch.tensor([3]))
        with pytest.raises(DevicesMetError, match=r"laserrec/llm/attention\.py"):
            backbone.decoder(backbone.embed(backbone.tokens([[4]])), past)
        backbone.decoder.layers[1].down = backbone.decoder.layers[1].down.cpu()
        with pytest.raises(DevicesMetError, match=r"laserrec/llm/decoder\.py"):
            backbone.decoder(backbone.embed(backbone.tokens([[4]])))
