"""`laserrec push` and `laserrec card`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from laserrec.cli.options import JsonFile, finish, say

Licence = Annotated[str | None, Parameter(name=["--licence", "--license"])]


def push(model: Path, repo: str, *, private: bool | None = None, revision: str | None = None,
         message: str | None = None, licence: Licence = None, data_name: str | None = None,
         json_file: JsonFile = None) -> None:
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
    from laserrec.recommender.folder import tell_card
    from laserrec.recommender.hub import names_a_local_backbone, push_folder

    tell_card(model, licence, data_name)
    if path := names_a_local_backbone(model):
        print(f"warning: the LLM of this model is the local folder {path}, and model.json names that path; who loads "
              "the model must have the same weights and give --backbone FOLDER", file=sys.stderr)
    commit = push_folder(model, repo, private, None, revision, message)
    say(f"{commit}\nload it with LaserRecommender.from_pretrained({repo!r}) or laserrec recommend {repo}")
    finish({"repo": repo, "commit": commit}, json_file)


def card(model: Path, *, licence: Licence = None, data_name: str | None = None) -> None:
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
    say(f"{model / 'README.md'}{kept}")
