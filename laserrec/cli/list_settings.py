"""`laserrec settings`."""

from __future__ import annotations

import textwrap
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from laserrec.cli.options import ConfigFile, JsonFile, Preset, finish, say
from laserrec.cli.options import settings as load
from laserrec.cli.output import print_table
from laserrec.config import load_config
from laserrec.config.described import SECTIONS, Setting, described, matching

Words = Annotated[str, Parameter(help="Sections, or parts of settings' names; without any, the sections are listed.")]


def settings(*words: Words, preset: Preset = "small", config: ConfigFile = None, json_file: JsonFile = None) -> None:
    """List the settings: their values, and what they mean.

    Example: laserrec settings train dropout --preset paper
    """
    tree, usual = load(preset, config, None), load_config()
    found = matching(words, tree, usual) if words else [*described(tree, usual)]
    finish([vars(setting) for setting in found], json_file)
    if words:
        say("\n\n".join(map(_entry, found)))
        return
    counts = {name: sum(setting.name.startswith(f"{name}.") for setting in found) for name in SECTIONS}
    print_table("settings", ("section", "settings", "what"), (
        (name, counts[name], " ".join((section.__doc__ or "").split())) for name, section in SECTIONS.items()), "what")
    say("laserrec settings SECTION lists a section's settings; those of laserrec distil are in its --help")


def _entry(setting: Setting) -> str:
    """The flag and its value, and what it means below."""
    changed = "" if setting.value == setting.default else f" (default: {setting.default})"
    kind, width = f"{setting.kind[0].upper()}{setting.kind[1:]}.", Console().width
    below = [textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ")
             for text in (setting.description, kind)]
    return "\n".join([f"{', '.join(setting.flags)}  {setting.value}{changed}", *below])
