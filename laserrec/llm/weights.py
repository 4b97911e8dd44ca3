"""Where a backbone's files lie, which weights they are, and its tokenizer: all without loading the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laserrec.config import BackboneConfig
from laserrec.llm.fetch import DEFAULT_NAME, fetch_default
from laserrec.util.errors import UserError, reading

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Weights:
    """The weight files of a backbone on this machine."""

    folder: Path | None
    """None: they come from the hub and are not in its cache yet."""
    revision: str | None
    """The commit, if they come from the hub: a branch's name tells nothing of tomorrow's weights."""
    sha256: str
    """Over the weight files; "" without a folder."""


def source(config: BackboneConfig) -> str:
    """What transformers' from_pretrained takes: a folder, or an id of the hub. Fetches the default LLM if need be."""
    return str(fetch_default()) if config.name == DEFAULT_NAME else config.name


def find_weights(config: BackboneConfig) -> Weights:
    """The files of `config.name`, hashed."""
    path = source(config)
    if Path(path).is_dir():
        with reading(path):
            return Weights(Path(path), None, _files_sha256(Path(path)))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=config.revision)
    if not isinstance(found, str):
        return Weights(None, config.revision, "")
    folder = Path(found).parent
    return Weights(folder, folder.name, _files_sha256(folder))  # .../snapshots/COMMIT/config.json


def load_tokenizer(config: BackboneConfig, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of the backbone. Raises UserError if it can't be loaded."""
    from transformers import AutoTokenizer

    with loading(config):
        if not trust_remote_code:
            _refuse_foreign_parts(config)
        return AutoTokenizer.from_pretrained(source(config), revision=config.revision,
                                             trust_remote_code=trust_remote_code)


@contextmanager
def loading(config: BackboneConfig) -> Iterator[None]:
    """transformers' errors in here become UserErrors, and its progress bars and warnings stay quiet: it reports the
    unused output layer (missing weights are checked by the loader)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"backbone {config.name!r} could not be loaded: {_reason(config, error)}") from None
    finally:
        logging.set_verbosity(verbosity)


def _reason(config: BackboneConfig, error: Exception) -> str:
    text = str(error).strip()
    if "custom code" in text:
        return ("it comes with Python code of its own, which is not run. If you trust its source, load it with "
                "load_backbone(..., trust_remote_code=True)")
    folder = Path(config.name)
    if (folder.is_absolute() or config.name.startswith((".", "~"))) and not folder.exists():
        return ("there is no such folder; give the LLM's folder, and for a model whose LLM has moved, its new one: "
                "backbone")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES) if folder.is_dir() else []
    if pickles and not any(folder.glob("*.safetensors")):
        return (f"its weights are in {pickles[0]}, a pickle, which can run code when it is opened. Convert them to "
                "safetensors (transformers: save_pretrained of the model that you trust)")
    return (f"{text.splitlines()[0] if text else type(error).__name__}. Give `{DEFAULT_NAME}`, a Hugging Face id that "
            "this machine can reach, or a folder with config.json, tokenizer and safetensors")


def _refuse_foreign_parts(config: BackboneConfig) -> None:
    """Raises UserError for a model that would bring in more than its own files: code for its attention from the hub,
    or the weights of another model below an adapter."""
    from transformers import PreTrainedConfig

    path = source(config)
    settings, _ = PreTrainedConfig.get_config_dict(path, revision=config.revision)
    kernels = [value for name, value in settings.items() if name.endswith("attn_implementation") and "/" in str(value)]
    if kernels:
        raise UserError(f"backbone {config.name!r} asks for attention code from {kernels[0]!r}, which is not run. If "
                        "you trust both, load it with load_backbone(..., trust_remote_code=True)")
    if (Path(path) / "adapter_config.json").exists():
        raise UserError(f"backbone {config.name!r} holds an adapter for another model; merge the two (PEFT's "
                        "merge_and_unload) and give the merged folder")


def _files_sha256(folder: Path) -> str:
    digest, files = hashlib.sha256(), sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else ""
