"""`laserrec knowledge`: texts about items and histories for method kar."""

from __future__ import annotations

from pathlib import Path

from laserrec.cli.options import ConfigFile, Data, Device, Flags, JsonFile, Preset, Quiet, finish, given, say
from laserrec.config import load_config
from laserrec.util.errors import UserError


def knowledge(data: Data, out: Path, *, items: int = 1000, histories: int = 1000, tokens: int = 40,
              device: Device = "auto", preset: Preset = "small", config: ConfigFile = None, quiet: Quiet = False,
              json_file: JsonFile = None, flags: Flags = None) -> None:
    """Have the LLM write texts about items and training histories, for laserrec fit --method kar. Run again to resume,
    or with larger numbers to add.

    Example: laserrec knowledge runs/data runs/texts --items 500 --histories 500

    Parameters
    ----------
    out
        Folder of items.jsonl and histories.jsonl; give it to fit as --kar.knowledge.
    items
        Items to write about.
    histories
        Beginnings of training histories to write about.
    tokens
        Of each text, at most.
    """
    from laserrec.data.dataset import Dataset
    from laserrec.methods.knowledge import write_knowledge
    from laserrec.util.device import choose

    if min(items, histories) < 0 or tokens < 1:
        raise UserError(f"items {items}, histories {histories}, tokens {tokens}: give no negative number, and at least "
                        "one token")
    tree = load_config(preset, config, given(flags), "kar")
    found = write_knowledge(Dataset.load(data), out, tree.backbone, tree.prompt, choose(device), items, histories,
                            tokens, not quiet)
    say(f"{out}: texts about {len(found.items):,} items and {len(found.histories):,} histories")
    finish({"items": len(found.items), "histories": len(found.histories), "sha256": found.sha256}, json_file)
