"""The config tree as command-line flags: every field optional, checked only after preset and file are merged in."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal, get_origin

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, create_model

from laserrec.config import Config, StudentConfig


def _partial(model: type[BaseModel], tell_defaults: bool = False, without: tuple[str, ...] = ()) -> Any:
    """The same fields, all optional and without the checks across fields. A field that was not given stays unset.

    tell_defaults: write each default into its description. Leave it off where presets change the defaults.
    without: fields that are no flags.
    """
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if name in without:
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            part = _partial(annotation)
            fields[name] = (part, Field(default=part()))
        else:
            told = " ".join((info.description or "").split()) + (f" [default: {info.default}]" if tell_defaults else "")
            flag: Any = _flag_type(annotation) | None
            if get_origin(annotation) is tuple:  # --prompt.attributes brand price
                flag = Annotated[flag, Parameter(consume_multiple=True)]
            fields[name] = (flag, Field(default=None, description=told))
    return create_model(f"{model.__name__}Flags", __config__=ConfigDict(frozen=True, extra="forbid"), **fields)


def _flag_type(annotation: Any) -> Any:
    """An enum as a Literal of its values: of an enum, `--help` would list member names, which are not accepted."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return Literal.__getitem__(tuple(member.value for member in annotation))
    return annotation


class Settings(_partial(Config, without=("student",))):
    """All settings as flags, but for the student's, which only `laserrec distil` sets.

    `Settings().model_dump(exclude_unset=True)` is the nested dict of the flags given.
    """


class DataSettings(_partial(Config, without=tuple(name for name in Config.model_fields if name != "data"))):
    """The settings that `laserrec prepare` reads, as flags."""


class RefitSettings(_partial(Config, without=("student", "data", "backbone", "prompt", "mformer", "head"))):
    """The settings that `laserrec refit` may change, as flags; some of the ID model's it refuses."""


class StudentSettings(_partial(StudentConfig, tell_defaults=True)):
    """The settings of `laserrec distil` as flags."""
