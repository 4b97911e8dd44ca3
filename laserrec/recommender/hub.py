"""Model folders to and from the Hugging Face Hub (or another of its kind: HF_ENDPOINT), through huggingface_hub.

Who you are comes from `hf auth login` or HF_TOKEN, unless a token is given. Downloads are kept in its cache, so that a
model that was loaded once is loaded without a network too.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laserrec.recommender.card import write_card
from laserrec.recommender.folder import KNOWN_FILES, check_files, read_note, shared_files
from laserrec.util.errors import UserError

_REPO = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def is_repo(name: Path | str) -> bool:
    """Whether `name` is ORG/NAME or ORG/NAME@REVISION, and no folder or file here is called so."""
    return bool(_REPO.fullmatch(Path(name).as_posix())) and not Path(name).exists()


def local_folder(name: Path | str, revision: str | None = None, token: str | None = None) -> Path:
    """The model folder `name`: itself, or the copy in the cache of what the hub has under ORG/NAME[@REVISION].

    Raises UserError for an unknown repository or revision, without permission, and without a network.
    """
    found = _REPO.fullmatch(Path(name).as_posix())
    if found is None or not is_repo(name):
        if revision is not None:
            raise UserError(f"a revision is for a model on the hub, and {name} is not of the form ORG/NAME or is a "
                            "folder here")
        return Path(name)
    repo, revision = found["repo"], revision or found["revision"]
    with _told(repo, revision, "load"):
        folder = Path(_api(token).snapshot_download(repo, revision=revision, allow_patterns=list(KNOWN_FILES)))
    if not (folder / "model.json").is_file():
        raise UserError(f"{repo} on the hub is no model of laserrec: it has no model.json")
    return folder


def push_folder(folder: Path, repo: str, private: bool | None = None, token: str | None = None,
                revision: str | None = None, commit_message: str | None = None) -> str:
    """Upload a model folder to ORG/NAME, which is made if it isn't there; returns the commit's address.

    Only the model's own files go, after their checksums were looked at; files of an earlier upload that the model no
    longer has are deleted in the same commit. private: of a new repository. revision: a branch, made if need be.
    Raises UserError for a folder that is no model or has changed, and for what the hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is no name on the hub; give ORG/NAME, such as my-shop/laser-tools")
    note = read_note(folder)
    check_files(folder, note, links=False)
    write_card(folder, note, repo)
    with _told(repo, revision, "push"):
        api = _api(token)
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, allow_patterns=shared_files(folder),
            delete_patterns=list(KNOWN_FILES), commit_message=commit_message or "A model of laserrec")
    return str(done.commit_url)


def names_a_local_backbone(folder: Path) -> str | None:
    """The LLM's name if it is a path: others will have to bring the LLM, and model.json tells them this path."""
    name = (read_note(folder)["backbone"] or {}).get("name", "")
    return name if name and (Path(name).is_absolute() or Path(name).exists()) else None


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    from laserrec import __version__

    return HfApi(token=token, library_name="laserrec", library_version=__version__)


@contextlib.contextmanager
def _told(repo: str, revision: str | None, doing: str) -> Iterator[None]:
    """What the hub and the network refuse, as UserErrors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{repo} is gated: ask for access on its page, then {_LOG_IN}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo} has no revision {revision or 'main'!r}; give a branch, a tag or a whole commit hash"
                        ) from None
    except errors.RepositoryNotFoundError:
        here = f"there is no folder {repo} here, and " if doing == "load" else ""
        raise UserError(f"{here}the hub shows no repository {repo} to you: look at the name, or, if it is private, "
                        f"{_LOG_IN} with a token that may see it") from None
    except errors.HfHubHTTPError as error:
        raise UserError(_refused(repo, doing, error)) from None
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is no name on the hub: {_first_line(error)}") from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise UserError(_unreachable(repo, doing, error)) from None
    except (json.JSONDecodeError, ValueError) as error:
        raise UserError(f"{doing} {repo}: {_first_line(error)}") from None


def _refused(repo: str, doing: str, error: Any) -> str:
    status = error.response.status_code
    said = getattr(error, "server_message", None) or _first_line(error)
    if status in (401, 403):
        right = "write to" if doing == "push" else "read"
        return (f"the hub does not let you {right} {repo} ({status}): {_LOG_IN} with a token that may {right} it; it "
                f"says: {said}")
    if status == 429 or status >= 500:
        return f"the hub can't do this now ({status}): try again later; it says: {said}"
    return f"the hub refused to {doing} {repo} ({status}): {said}"


def _unreachable(repo: str, doing: str, error: Exception) -> str:
    cause = error.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is not None:  # huggingface_hub hides an answer of the hub behind "not in the cache"
        return _refused(repo, doing, cause)
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} can't be reached"
    if doing == "push":
        return f"{repo} was not pushed: {why}; nothing of it was changed unless the connection broke at the very end"
    return (f"there is no folder {repo} here, and it could not be loaded from the hub: {why} and no whole copy is in "
            "the cache. Look at the name and the connection, or give a model folder")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
