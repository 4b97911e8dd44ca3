"""Settings in words: what `laserrec settings` and the documentation tell of each."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from laserrec.config import Config
from laserrec.util.errors import UserError

SECTIONS: dict[str, type[BaseModel]] = {
    name: info.annotation for name, info in Config.model_fields.items() if isinstance(info.annotation, type)}
"""The sections of the settings; `student`, which is optional, is set by `laserrec distil` alone."""
_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "none"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """One setting and its value."""

    name: str
    """Section and name, as in a TOML file: train.lr."""
    flags: tuple[str, ...]
    """As on the command line: --train.lr; of a switch both."""
    kind: str
    """Type and bounds in words."""
    value: str
    default: str
    """Where no other preset, file or flag says otherwise."""
    description: str


def described(config: Config, usual: Config) -> Iterator[Setting]:
    """All settings with their values in `config`, section by section. usual: those of the default preset."""
    for section, model in SECTIONS.items():
        values, defaults = getattr(config, section), getattr(usual, section)
        for name, info in model.model_fields.items():
            yield Setting(f"{section}.{name}", flags(section, name, info), kind(info), in_words(getattr(values, name)),
                          in_words(getattr(defaults, name)), " ".join((info.description or "").split()))


def matching(words: Sequence[str], config: Config, usual: Config) -> list[Setting]:
    """The settings of which one of `words` is the section, or a part of the name; as names or as flags. Raises
    UserError for a word that matches none."""
    everything, wanted = list(described(config, usual)), set[str]()
    for word in words:
        plain = word.lstrip("-").replace("-", "_").lower()
        hits = {s.name for s in everything if plain in (s.name.split(".")[0], s.name)}
        hits = hits or {s.name for s in everything if plain in s.name.split(".")[1]}
        if not hits:
            raise UserError(f"no setting has {word!r} in its name; the sections are {', '.join(SECTIONS)}")
        wanted |= hits
    return [setting for setting in everything if setting.name in wanted]


def flags(section: str, name: str, info: FieldInfo) -> tuple[str, ...]:
    """Of the command line; of a switch both of its flags."""
    section, name = section.replace("_", "-"), name.replace("_", "-")
    off = (f"--{section}.no-{name}",) if info.annotation is bool else ()
    return f"--{section}.{name}", *off


def kind(info: FieldInfo, quote: str = "") -> str:
    """Type and bounds in words. quote: stands on both sides of the values to choose from."""
    limits = [f"{words} {getattr(m, key):g}" for m in info.metadata for key, words in _BOUNDS.items()
              if hasattr(m, key)]
    return ", ".join([_type(info.annotation, quote), *limits])


def _type(annotation: Any, quote: str) -> str:
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(f"{quote}{member.value}{quote}" for member in annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type(part, quote) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type(typing.get_args(annotation)[0], quote)} (repeat the flag)"
    return _NAMES[annotation]


def in_words(value: Any) -> str:
    """As one would write it: true, none, 1e-3, lists with commas."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, tuple | list):
        return ", ".join(map(in_words, value)) or "empty"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float) and 0 < abs(value) < 1e-2 and float(f"{value:.0e}") == value:
        return f"{value:.0e}".replace("e-0", "e-")
    return str(value)
