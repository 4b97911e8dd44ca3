"""A model folder from a stranger: none of its code runs, no pickle of it is opened, unless the caller allows it."""

import json
import shutil

import pytest
import tiny
import torch
from pydantic import ValidationError

from laserrec.config import BackboneConfig
from laserrec.llm.backbone import load_backbone
from laserrec.llm.weights import load_tokenizer
from laserrec.util.device import CPU
from laserrec.util.errors import UserError

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")
class EvilConfig(LlamaConfig):
    model_type = {kind!r}
class EvilModel(LlamaModel):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def evil(tmp_path):
    """(kind, tokenizer too) -> (folder with code that leaves a file behind, that file)."""

    def make(kind: str = "llama", tokenizer: bool = False):
        folder, marker = tiny.save_llm(tmp_path / "evil", "llama"), tmp_path / "ran"
        (folder / "evil.py").write_text(CODE.format(marker=str(marker), kind=kind))
        edit(folder / "config.json", model_type=kind, auto_map={
            "AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel", "AutoModelForCausalLM": "evil.EvilModel"})
        if tokenizer:
            edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer",
                 auto_map={"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]})
        return folder, marker

    return make


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(folder, **more):
    return load_backbone(BackboneConfig(name=str(folder), precision="fp32"), CPU, **more)


def test_a_known_kind_loads_without_its_code(evil):
    folder, marker = evil()
    assert load(folder).native and not marker.exists()


@pytest.mark.parametrize(("kind", "tokenizer"), [("evil", False), ("llama", True), ("evil", True)])
def test_what_needs_its_code_is_refused(evil, kind, tokenizer):
    folder, marker = evil(kind, tokenizer)
    with pytest.raises(UserError, match=r"evil.*Python code of its own, which is not run.*trust_remote_code=True"):
        load(folder)
    assert not marker.exists()


def test_a_tokenizers_code_is_refused_alone(evil):
    folder, marker = evil("llama", True)
    with pytest.raises(UserError, match="Python code of its own"):
        load_tokenizer(BackboneConfig(name=str(folder)))
    assert not marker.exists()


def test_the_caller_may_allow_it(evil):
    folder, marker = evil("evil")
    load(folder, trust_remote_code=True)
    assert marker.read_text() == "ran"


def test_no_setting_allows_it():
    with pytest.raises(ValidationError, match=r"trust_remote_code is not a setting.*no file can allow"):
        BackboneConfig.model_validate({"name": "x", "trust_remote_code": True})
    assert BackboneConfig.model_validate({"name": "x", "trust_remote_code": False}) == BackboneConfig(name="x")
    assert "trust_remote_code" not in BackboneConfig().model_dump()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_not_opened(llm_folder, tmp_path, name):
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(llm_folder(), folder)
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"model.embed_tokens.weight": Evil()}, folder / name)
    with pytest.raises(UserError, match=rf"weights are in {name}, a pickle.*Convert them to safetensors"):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("setting", ["attn_implementation", "_attn_implementation"])
def test_attention_code_from_elsewhere_is_refused(llm_folder, tmp_path, setting):
    shutil.copytree(llm_folder(), tmp_path / "model")
    edit(tmp_path / "model" / "config.json", **{setting: "evil/attention"})
    with pytest.raises(UserError, match=r"attention code from 'evil/attention', which is not run"):
        load(tmp_path / "model")


def test_an_adapter_for_another_model_is_refused(llm_folder, tmp_path):
    shutil.copytree(llm_folder(), tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(UserError, match="adapter for another model; merge the two"):
        load(tmp_path / "model")
