"""Texts for KAR, written once by an LLM and kept where a person can read, correct and replace them.

Folder (JSON lines, UTF-8; either file may be missing, and other programs may write them):
  items.jsonl      {"item_id": "...", "text": "what is known of the item"}
  histories.jsonl  {"history": ["item_id", ...], "text": "what its buyer prefers"}; the first items of a training
                   sequence, oldest first, at most 10

A text about a history is made of the first half of a training sequence and of nothing else, so that it knows neither
the rest of that sequence nor anything of validation and test.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laserrec.config import BackboneConfig, PromptConfig
from laserrec.data.dataset import Dataset
from laserrec.data.losses import LOUD, LossWarning, mismatch
from laserrec.data.prompt import item_line
from laserrec.llm.weights import load_tokenizer, loading, source
from laserrec.util.errors import UserError, reading
from laserrec.util.io import check_folder, write_text
from laserrec.util.progress import Progress

LONGEST = 10
"""Items of a history that a text is made of, at most."""
_ITEMS, _HISTORIES = "items.jsonl", "histories.jsonl"
_AT_ONCE = 16
"""Texts that the LLM writes together."""
_KEPT_EVERY = 8
"""Batches between two writings of the file."""
_ABOUT_ITEM = "Describe in one sentence what this product is, and who buys it: {}"
_ABOUT_HISTORY = ("A customer bought these products, in this order:\n{}\nDescribe in one sentence what this customer "
                  "likes, and what they may buy next.")

Beginning = tuple[str, ...]
"""The first item ids of a history, oldest first."""


@dataclass(frozen=True)
class Knowledge:
    """What a folder of texts holds."""

    items: dict[str, str]
    histories: dict[Beginning, str]
    sha256: str
    """Over both files."""

    def about(self, catalogue: Collection[str], folder: Path) -> Knowledge:
        """Texts about these items and about histories of them alone. Raises UserError where there are none, and warns
        where many are about others. folder: where they are from."""
        items = {name: text for name, text in self.items.items() if name in catalogue}
        histories = {begun: text for begun, text in self.histories.items() if all(name in catalogue for name in begun)}
        there, left = len(self.items) + len(self.histories), len(items) + len(histories)
        others = [name for name in chain(self.items, *self.histories) if name not in catalogue]
        if there and not left:
            raise UserError(f"{folder}: none of its {there:,} texts is about these items: "
                            f"{mismatch(others, catalogue)} Give the texts of this data folder, or set kar.knowledge "
                            "to none")
        if there - left > LOUD * there:
            warnings.warn(f"{folder}: {there - left:,} of {there:,} texts are about other items and are not used: "
                          f"{mismatch(others, catalogue)}", LossWarning, stacklevel=2)
        return replace(self, items=items, histories=histories)


NOTHING = Knowledge({}, {}, "")


def read_knowledge(folder: Path) -> Knowledge:
    """Raises UserError where there are no such files, and for a line that is not as it should be."""
    with reading(folder):
        there = [name for name in (_ITEMS, _HISTORIES) if (folder / name).is_file()]
    if not there:
        raise UserError(f"{folder} holds neither {_ITEMS} nor {_HISTORIES}; make it with laserrec knowledge, or set "
                        "kar.knowledge to none")
    digest = hashlib.sha256()
    for name in there:
        with reading(folder / name):
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    items = {row["item_id"]: row["text"] for row in _lines(folder / _ITEMS, "item_id", str)}
    histories = {tuple(row["history"]): row["text"] for row in _lines(folder / _HISTORIES, "history", list)}
    return Knowledge(items, histories, digest.hexdigest())


def _lines(file: Path, key: str, kind: type) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    # Not splitlines, which also cuts at characters that may stand within a text. Editors may put a mark in front.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{file}, line {number}, is no JSON; correct or delete the line") from None
        good = isinstance(row, dict) and isinstance(row.get(key), kind) and isinstance(row.get("text"), str)
        if good and kind is list:
            good = 0 < len(row[key]) <= LONGEST and all(isinstance(item, str) for item in row[key])
        if not good:
            wanted = "text" if kind is str else f"list of 1 to {LONGEST} item ids"
            raise UserError(f"{file}, line {number}, needs {key} (a {wanted}) and text (a text); correct or delete it")
        yield row


def write_knowledge(dataset: Dataset, folder: Path, backbone: BackboneConfig, prompt: PromptConfig,
                    device: torch.device, items: int | None = None, histories: int = 1000, tokens: int = 40,
                    progress: bool = True) -> Knowledge:
    """Have the LLM write texts about the data folder's items and training histories; texts that are in `folder`
    already stay, so that an interrupted call goes on and a larger one adds.

    items, histories: about so many, drawn in a fixed random order; None: about all. tokens: of each text, at most.
    Raises UserError where the LLM can't be loaded or the folder can't be written.
    """
    check_folder(folder)
    lines = [item_line(row, prompt.attributes) for row in dataset.items.iter_rows(named=True)]
    ids = dataset.items["item_id"].to_list()
    begun = _beginnings(dataset)
    kept = read_knowledge(folder) if (folder / _ITEMS).is_file() or (folder / _HISTORIES).is_file() else None
    about_items = {} if kept is None else dict(kept.items)
    about_histories = {} if kept is None else dict(kept.histories)
    writer = Writer(backbone, device, tokens)

    def listed(rows: tuple[int, ...]) -> str:
        return "\n".join(f"{number}. {lines[row]}" for number, row in enumerate(rows, 1))

    wanted = [row for row in _drawn(len(ids), items) if ids[row] not in about_items]
    _write(writer, [_ABOUT_ITEM.format(lines[row]) for row in wanted], [ids[row] for row in wanted], about_items,
           folder / _ITEMS, "item_id", progress)
    chosen = [begun[number] for number in _drawn(len(begun), histories)]
    named = {tuple(ids[row] for row in rows): rows for rows in chosen}
    missing = [name for name in named if name not in about_histories]
    _write(writer, [_ABOUT_HISTORY.format(listed(named[name])) for name in missing], missing, about_histories,
           folder / _HISTORIES, "history", progress)
    return read_knowledge(folder)


def _beginnings(dataset: Dataset) -> list[tuple[int, ...]]:
    """The first half, at most LONGEST items, of each training sequence, each once, in item rows."""
    halves = (rows[: min(LONGEST, max(1, len(rows) // 2))] for rows in dataset.train_sequences.lists())
    return [*dict.fromkeys(map(tuple, halves))]


def _drawn(count: int, wanted: int | None) -> list[int]:
    """The first `wanted` of a fixed random order: more begin with the same."""
    return np.random.default_rng(0).permutation(count)[:wanted].tolist()


def _write(write: Callable[[list[str]], list[str]], prompts: list[str], names: list[Any], kept: dict[Any, str],
           file: Path, key: str, progress: bool) -> None:
    """Add a text for each prompt to `kept` and keep them in the file, also where it is interrupted."""
    try:
        with Progress(f"writing {file.name}", len(prompts), progress) as bar:
            for number, at in enumerate(range(0, len(prompts), _AT_ONCE), 1):
                part = slice(at, at + _AT_ONCE)
                kept |= zip(names[part], write(prompts[part]), strict=True)
                if number % _KEPT_EVERY == 0:
                    _keep(kept, file, key)
                bar.advance(len(prompts[part]))
    finally:
        _keep(kept, file, key)


def _keep(kept: dict[Any, str], file: Path, key: str) -> None:
    if kept:
        write_text(file, "".join(json.dumps({key: name, "text": text}, ensure_ascii=False) + "\n"
                                 for name, text in kept.items()))


class Writer:
    """Prompts -> texts by greedy decoding of the config's LLM, loaded at the first use."""

    def __init__(self, config: BackboneConfig, device: torch.device, tokens: int):
        self.config, self.device, self.tokens = config, device, tokens
        self._model: Any = None

    def __call__(self, prompts: list[str]) -> list[str]:
        """One text of one line for each."""
        if self._model is None:
            self._load()
        if self.tokenizer.chat_template:
            prompts = [self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                          add_generation_prompt=True) for prompt in prompts]
        given = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(self.device)
        with torch.no_grad():
            out = self._model.generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"],
                                       max_new_tokens=self.tokens, do_sample=False,
                                       pad_token_id=self.tokenizer.pad_token_id)
        texts = self.tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _load(self) -> None:
        from transformers import AutoModelForCausalLM

        self.tokenizer = load_tokenizer(self.config)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        with loading(self.config):
            model = AutoModelForCausalLM.from_pretrained(source(self.config), revision=self.config.revision,
                                                         dtype=torch.float32, use_safetensors=True)
        self._model = model.to(self.device).eval()
