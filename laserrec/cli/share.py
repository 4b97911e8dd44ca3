"""`laserrec push` and `laserrec card`. Thin, as cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from laserrec.util.io import write_json

push_app = App(name="push")
card_app = App(name="card")
out_console = Console()
_Licence = Annotated[str | None, Parameter(name=["--licence", "--license"])]


@push_app.default
def push(model: Path, repo: str, *, private: bool | None = None, revision: str | None = None,
         message: str | None = None, licence: _Licence = None, data_name: str | None = None,
         json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """Upload a model folder, with its card, to the Hugging Face Hub; the LLM is named in it, not copied.

    The token is that of `hf auth login` or the environment variable HF_TOKEN.

    Example: laserrec push runs/model my-shop/laser-tools --private --licence mit

    Parameters
    ----------
    model
        A model folder.
    repo
        ORG/NAME; made if it isn't there.
    private
        Whether a new repository can be seen by you alone; else as your account has it.
    revision
        A branch, made if it isn't there; else main.
    message
        Of the commit.
    licence
        Of the adapter, for its card, such as apache-2.0.
    data_name
        Of the data set, for the card.
    json_file
        Write {"repo", "commit"} to this file.
    """
    from laserrec.recommender.hub import names_a_local_backbone, push_folder
    from laserrec.recommender.folder import tell_card

    tell_card(model, licence, data_name)
    if path := names_a_local_backbone(model):
        Console(stderr=True).print(f"[yellow]warning:[/] the LLM of this model is the local folder {path}, and "
                                   "model.json names that path; who loads the model must have the same weights and "
                                   "give backbone=FOLDER", soft_wrap=True)
    commit = push_folder(model, repo, private, None, revision, message)
    out_console.print(f"{commit}\nload it with LaserRecommender.from_pretrained({repo!r}) or laserrec recommend {repo}",
                      highlight=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, {"repo": repo, "commit": commit})


@card_app.default
def card(model: Path, *, licence: _Licence = None, data_name: str | None = None) -> None:
    """Write a model folder's card (README.md) anew; a card that a person wrote is left alone.

    Example: laserrec card runs/model --licence apache-2.0 --data-name amazon-scientific

    Parameters
    ----------
    model
        A model folder.
    licence
        Of the adapter, such as apache-2.0; kept in model.json for later cards.
    data_name
        Of the data set; kept too.
    """
    from laserrec.recommender.folder import tell_card

    kept = "" if tell_card(model, licence, data_name) else " (a person's; left as it is)"
    out_console.print(f"{model / 'README.md'}{kept}", highlight=False, soft_wrap=True)
