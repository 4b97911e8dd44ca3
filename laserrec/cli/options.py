"""Options that several commands share, and what every command does with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from pydantic import BaseModel
from rich.console import Console

from laserrec.cli.settings import DataSettings, RefitSettings, Settings
from laserrec.config import Config, load_config, merge, seeds
from laserrec.presets import PRESETS
from laserrec.util.io import check_file, write_json

if TYPE_CHECKING:
    from laserrec.data.files import FileOptions
    from laserrec.recommender.recommender import LaserRecommender

Data = Annotated[Path, Parameter(help="A data folder.")]
Model = Annotated[Path, Parameter(help="A model folder, or ORG/NAME[@REVISION] on the Hugging Face Hub.")]
ModelOut = Annotated[Path, Parameter(help="The model folder to make.")]
Index = Annotated[Path | None, Parameter(help="Folder that laserrec index build made of MODEL; else all items are "
                                         "compared.")]
SETTINGS = Group("Settings", help="They are flags too, --SECTION.NAME VALUE; laserrec settings lists them.")
Preset = Annotated[str, Parameter(group=SETTINGS, help=f"Starting point of all settings: {', '.join(PRESETS)}.")]
ConfigFile = Annotated[Path | None, Parameter(name="--config", group=SETTINGS,
                                              help="TOML file with settings, laid on the preset.")]
Flags = Annotated[Settings | None, Parameter(name="*", show=False)]
"""Settings as flags. There are too many for --help."""
RefitFlags = Annotated[RefitSettings | None, Parameter(name="*", show=False)]
DataFlags = Annotated[DataSettings | None, Parameter(name="*", group=SETTINGS, show_default=False)]
Switch = Annotated[bool, Parameter(negative="")]
"""A flag that is off unless it is given."""


def writable(kind: Any, file: Path | None) -> None:
    """Validator of files to write: a place that can't be written is told before the work."""
    if file is not None:
        check_file(file)


JsonFile = Annotated[Path | None, Parameter(name="--json", help="Write the numbers to this file.", validator=writable)]
Quiet = Annotated[bool, Parameter(negative="", help="Show no progress.")]
Device = Annotated[str, Parameter(help="Where to compute: auto, cpu, cuda, cuda:N or mps. auto takes a GPU if there "
                                  "is one.")]
TrustRemoteCode = Annotated[bool, Parameter(negative="", help="Let the LLM run Python code that comes with its weights "
                                            "(ChatGLM2 needs it). Only for sources you trust.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Opening:
    """How a model folder is opened."""

    device: Device = "auto"
    backbone: Annotated[str | None, Parameter(help="Folder or name of the LLM, in place of the one that the model "
                                              "names; for an LLM folder that has moved.")] = None
    trust_remote_code: TrustRemoteCode = False

    def open(self, model: Path | str) -> LaserRecommender:
        """A model folder, or ORG/NAME[@REVISION] on the Hugging Face Hub."""
        from laserrec.recommender.recommender import LaserRecommender

        return LaserRecommender.from_pretrained(model, self.backbone, device=self.device,
                                                trust_remote_code=self.trust_remote_code)


@Parameter(name="*")
@dataclass(frozen=True)
class Reading:
    """How text files are read."""

    separator: Annotated[str | None, Parameter(help="Of delimited text, such as ; (a comma if not given, a tab in "
                                               ".tsv).")] = None
    encoding: Annotated[str, Parameter(help="Of text files, such as cp1252 or utf-16.")] = "utf-8"

    def options(self) -> FileOptions:
        """For the functions that read them."""
        from laserrec.data.files import FileOptions

        return FileOptions(separator=self.separator, encoding=self.encoding)


@Parameter(name="*")
@dataclass(frozen=True)
class Fitting:
    """How a method is fitted."""

    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    preset: Preset = "small"
    config: ConfigFile = None
    seed: Annotated[int | None, Parameter(help="Random seed of all parts but those that have a flag of their own "
                                          "(train.seed, id_model.seed).")] = None
    quiet: Quiet = False
    json_file: JsonFile = None
    flags: Flags = None

    def settings(self, method: str) -> Config:
        """Of preset, file, seed and flags, for one method; later ones win."""
        own = {} if self.seed is None else seeds(self.seed)
        return load_config(self.preset, self.config, merge(own, given(self.flags)), method)


OPENING, READING, FITTING = Opening(), Reading(), Fitting()
"""The defaults."""


def given(flags: BaseModel | None) -> dict[str, Any]:
    """The settings that were given as flags, as a nested dict."""
    return {} if flags is None else flags.model_dump(exclude_unset=True)


def settings(preset: str, file: Path | None, flags: BaseModel | None) -> Config:
    """Preset, then TOML file, then flags; later ones win."""
    return load_config(preset, file, given(flags))


def say(text: str) -> None:
    """Print a line as it is: no wrapping, no colours, brackets are no markup."""
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def finish(numbers: Any, file: Path | None) -> None:
    """Write a command's numbers where `--json` asks for them."""
    if file is not None:
        write_json(file, numbers)


def item_ids(text: str) -> list[str]:
    """The ids of `ID,ID,...`."""
    return [part for part in map(str.strip, text.split(",")) if part]
