"""Loading a frozen LLM: engines, layers, precision, and the messages when it can't be."""

import shutil

import pytest
import tiny
import torch
from safetensors.torch import save_file

from laserrec.config import BackboneConfig, Engine, Precision
from laserrec.llm.backbone import TransformersDecoder, load_backbone, resolve_precision
from laserrec.llm.check import check_backbone
from laserrec.util import checkpoint
from laserrec.util.errors import UserError

TEXT = "red hammer (brand: blueco)"


def read(backbone, text: str = TEXT) -> torch.Tensor:
    return backbone.decoder(backbone.embed(torch.tensor([backbone.tokenizer(text)["input_ids"]])))


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("family", tiny.NATIVE)
def test_both_engines_give_the_same(llm, family, layers):
    native, theirs = llm(family, layers=layers), llm(family, layers=layers, engine=Engine.TRANSFORMERS)
    assert native.native and not theirs.native
    assert native.sha256 == theirs.sha256 and native.sha256
    torch.testing.assert_close(read(native), read(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fewer_layers_are_another_reading(llm, family):
    settings = {"engine": Engine.TRANSFORMERS}
    one, two, three = (read(llm(family, layers=n, **settings)) for n in (1, 2, None))
    assert not torch.allclose(one, two) and not torch.allclose(two, three)
    assert torch.equal(read(llm(family, layers=3, **settings)), three)


def test_another_family_runs_on_transformers_or_says_why_not(llm, llm_folder):
    assert isinstance(llm("gpt2").decoder, TransformersDecoder)
    with pytest.raises(UserError, match=r"engine = native.*gpt2.*use auto or transformers"):
        load_backbone(BackboneConfig(name=str(llm_folder("gpt2")), engine=Engine.NATIVE, precision=Precision.FP32))


@pytest.mark.parametrize("engine", [Engine.NATIVE, Engine.TRANSFORMERS])
def test_bf16(llm, engine):
    rough, exact = llm(engine=engine, precision="bf16"), llm(engine=engine)
    assert rough.decoder.dtype == rough.embedding.dtype == torch.bfloat16
    assert read(rough).dtype == torch.float32
    assert 0 < (read(rough) - read(exact)).abs().max() < 0.2 * read(exact).abs().max()


def test_nothing_of_it_asks_for_a_gradient(llm):
    for family in ("llama", "gpt2"):
        backbone = llm(family)
        assert not backbone.embedding.requires_grad
        assert all(not p.requires_grad for p in backbone.decoder.parameters())
    assert not llm("gpt2").decoder.model.training  # its dropout is off


def test_layers_beyond_the_models_are_an_error(llm_folder):
    for engine in Engine:
        with pytest.raises(UserError, match=r"layers is 4.* has 3"):
            load_backbone(BackboneConfig(name=str(llm_folder()), layers=4, engine=engine, precision=Precision.FP32))


@pytest.mark.parametrize("broken", ["empty", "no_weights", "no_config"])
def test_a_folder_that_is_no_model_is_an_error(llm_folder, tmp_path, broken):
    folder = tmp_path / "model"
    if broken == "empty":
        folder.mkdir()
    else:
        shutil.copytree(llm_folder(), folder)
        (folder / {"no_weights": "model.safetensors", "no_config": "config.json"}[broken]).unlink()
    with pytest.raises(UserError, match=r"could not be loaded.*Hugging Face id"):
        load_backbone(BackboneConfig(name=str(folder), precision=Precision.FP32))


def test_missing_weights_are_an_error_and_not_made_up(llm_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llm_folder(), folder)
    tensors, _ = checkpoint.load(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, first .*down_proj"):
        load_backbone(BackboneConfig(name=str(folder), precision=Precision.FP32))


def test_loading_says_nothing_of_the_unused_output_layer(llm_folder, caplog, capfd):
    load_backbone(BackboneConfig(name=str(llm_folder()), precision=Precision.FP32))
    assert "lm_head" not in caplog.text + "".join(capfd.readouterr())


def test_a_name_that_is_nowhere_is_an_error():
    with pytest.raises(UserError, match="'nobody/nothing' could not be loaded"):
        load_backbone(BackboneConfig(name="nobody/nothing", precision=Precision.FP32))


def test_hashes_tell_weights_apart(llm_folder, llm, tmp_path):
    other = load_backbone(BackboneConfig(name=str(tiny.save_llm(tmp_path, "llama", seed=9)), precision=Precision.FP32))
    again = load_backbone(BackboneConfig(name=str(llm_folder()), precision=Precision.FP32))
    assert other.sha256 != again.sha256 == llm().sha256
    assert other.tensor_hash() != again.tensor_hash() == llm().tensor_hash()
    again.decoder.layers[1].down[0, 0] += 1e-3
    assert again.tensor_hash() != llm().tensor_hash()


def test_weights_of_the_hub_are_told_by_their_commit(llm_folder, tmp_path, monkeypatch):
    """As the hub's library keeps them: a branch is a file that names a commit, a commit is a folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place, commits = tmp_path / "models--lab--llm", {"main": "a" * 40, "spring": "b" * 40}
    shutil.copytree(llm_folder(), place / "snapshots" / commits["main"])
    tiny.save_llm(place / "snapshots" / commits["spring"], "llama", seed=9)
    (place / "refs").mkdir()
    for branch, commit in commits.items():
        (place / "refs" / branch).write_text(commit)
    main = load_backbone(BackboneConfig(name="lab/llm", precision=Precision.FP32))
    spring = load_backbone(BackboneConfig(name="lab/llm", revision="spring", precision=Precision.FP32))
    own = load_backbone(BackboneConfig(name=str(llm_folder()), precision=Precision.FP32))
    assert (main.revision, spring.revision, own.revision) == (commits["main"], commits["spring"], None)
    assert main.sha256 == own.sha256 != spring.sha256


def test_precision_auto_is_decided_once():
    first = resolve_precision(Precision.AUTO)
    assert first in (Precision.BF16, Precision.FP32)
    assert resolve_precision(Precision.AUTO) == first
    assert resolve_precision(Precision.BF16) == Precision.BF16


def test_check_reports_both_engines(llm_folder):
    facts = check_backbone(str(llm_folder("qwen3")))
    assert (facts["engine"], facts["layers"], facts["width"], facts["vocabulary"]) == ("native", 3, 32, 300)
    assert 0 <= facts["native_error"] < 1e-4
    assert check_backbone(str(llm_folder("gpt2")))["engine"] == "transformers"


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_quantized_llm_is_smaller_and_lets_the_gradient_through(family, kind, bits, tmp_path):
    """A small random model of the family; 64 wide, since weights are quantized in blocks of 64."""
    folder = tiny.save_llm(tmp_path, family, hidden_size=64, intermediate_size=128)
    exact, rough = (load_backbone(BackboneConfig(name=str(folder), precision="fp32", **settings))
                    for settings in ({"engine": "transformers"}, {"quantization": kind}))
    assert not rough.native
    weights = [b.decoder.model.layers[0].mlp.up_proj.weight for b in (exact, rough)]
    assert weights[1].numel() * weights[1].element_size() * 8 == weights[0].numel() * bits
    gradients = []
    for backbone in (exact, rough):
        embeds = backbone.embed(torch.arange(9)[None]).float().clone().requires_grad_()
        outputs = backbone.decoder.read_rows([embeds[0]], last_only=True)
        (outputs * torch.linspace(-1, 1, 64)).sum().backward()
        gradients.append((outputs.detach(), embeds.grad))
        assert all(p.grad is None for p in backbone.decoder.parameters())
    for ours, theirs in zip(*reversed(gradients), strict=True):
        alike = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert (0.99 if bits == 8 else 0.6) < alike < 1 - 1e-6


def test_a_quantized_llm_has_no_native_forward(llm_folder):
    with pytest.raises(UserError, match=r"engine = native.*int8 weights"):
        load_backbone(BackboneConfig(name=str(llm_folder()), quantization="int8", engine="native", precision="fp32"))


def test_without_bitsandbytes_the_extra_is_named(llm_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"laserrec\[quant\]"):
        load_backbone(BackboneConfig(name=str(llm_folder()), quantization="int4", precision="fp32"))


@pytest.mark.parametrize(("family", "engine"), [("llama", "native"), ("llama", "transformers"), ("gpt2", "auto")])
def test_gradient_checkpointing_changes_memory_alone(llm, family, engine):
    results, kept = [], []
    for recompute in (False, True):
        backbone = llm(family, engine=engine, gradient_checkpointing=recompute)
        embeds = backbone.embed(torch.arange(7)).float().clone().requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            outputs = backbone.decoder.read_rows([embeds[:3], embeds[3:]], last_only=True)
        outputs.square().sum().backward()
        results.append((outputs.detach(), embeds.grad))
        kept.append(sum(saved))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert kept[1] < kept[0] / 2
