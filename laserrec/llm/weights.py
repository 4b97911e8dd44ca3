"""Where a backbone's files lie, which weights they are, and its tokenizer: all without loading the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from laserrec.config import BackboneConfig
from laserrec.llm.fetch import DEFAULT_NAME, fetch_default
from laserrec.util.errors import UserError


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
        return Weights(Path(path), None, _files_sha256(Path(path)))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=config.revision)
    if not isinstance(found, str):
        return Weights(None, config.revision, "")
    folder = Path(found).parent
    return Weights(folder, folder.name, _files_sha256(folder))  # .../snapshots/COMMIT/config.json


def load_tokenizer(config: BackboneConfig, trust_remote_code: bool = False) -> object:
    """transformers' tokenizer of the backbone. Raises UserError if it can't be loaded."""
    from transformers import AutoTokenizer

    with loading(config):
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
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"backbone {config.name!r} could not be loaded: {first}. Give `{DEFAULT_NAME}`, a Hugging Face id that "
            "this machine can reach, or a folder with config.json, tokenizer and safetensors"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _files_sha256(folder: Path) -> str:
    digest, files = hashlib.sha256(), sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else ""
