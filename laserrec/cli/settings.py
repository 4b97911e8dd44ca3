"""The config tree as command-line flags: every field optional, checked only after preset and file are merged in."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from laserrec.config import Config, StudentConfig


def _partial(model: type[BaseModel], tell_defaults: bool = False) -> type[BaseModel]:
    """The same fields without defaults' cross-checks; a field that was not given stays unset. tell_defaults: in the
    descriptions; where presets may say otherwise they would mislead."""
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            part = _partial(annotation)
            fields[name] = (part, Field(default=part()))
        else:
            if isinstance(annotation, type) and issubclass(annotation, Enum):
                # Of an enum, --help would show the members' names in the command line's spelling, which are no values.
                annotation = Literal[tuple(member.value for member in annotation)]
            told = (info.description or "") + (f" [default: {info.default}]" if tell_defaults else "")
            fields[name] = (annotation | None, Field(default=None, description=told))
    return create_model(f"{model.__name__}Flags", __config__=ConfigDict(frozen=True, extra="forbid"), **fields)


Settings = _partial(Config)
"""`Settings().model_dump(exclude_unset=True)` is the nested dict of the flags that were given."""
StudentSettings = _partial(StudentConfig, tell_defaults=True)
"""The same of what `laserrec distil` takes."""
