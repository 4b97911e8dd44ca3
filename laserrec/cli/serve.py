"""`laserrec serve`. Thin, as cli.py."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from cyclopts import App
from rich.console import Console

from laserrec.util.errors import UserError

serve_app = App(name="serve")
_TOKEN = "LASERREC_API_TOKEN"


@serve_app.default
def serve(model: Path, *, host: str = "127.0.0.1", port: int = 8000, token_file: Path | None = None,
          state: Path | None = None, index: Path | None = None, max_batch: int = 32, max_wait_ms: float = 2.0,
          max_queue: int = 256, timeout: float = 10.0, max_body: int = 1_048_576, cache: int = 4096,
          threads: int | None = None) -> None:
    """Serve a model over HTTP: recommendations, similar items, adding and removing items, a page to try it.

    Example: laserrec serve runs/quickstart/model --port 8000

    Parameters
    ----------
    model
        A model folder, or ORG/NAME[@REVISION] on the Hugging Face Hub.
    host
        Address to listen on; the default can be reached from this machine alone.
    port
        Port to listen on; 0 takes a free one.
    token_file
        File with the API token that callers must give; else the environment variable LASERREC_API_TOKEN, else none.
    state
        Folder for items that callers add and remove; default: MODEL/served, for a model of the hub served/ORG/NAME.
    index
        Folder that laserrec index build made of MODEL; else requests are compared with all items. It is only read.
    max_batch
        Requests that go through the model together.
    max_wait_ms
        Milliseconds that a request waits for others to share its batch.
    max_queue
        Requests that may wait; one more is answered 429 with Retry-After.
    timeout
        Seconds until an unanswered request is answered 503.
    max_body
        Bytes of a request's body.
    cache
        Answers kept for repeated requests; 0 keeps none.
    threads
        Threads of torch; else its own choice.
    """
    token = _read_token(token_file)
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        raise UserError("serving needs the extra serve: pip install 'laserrec[serve]'") from None
    import torch

    from laserrec.recommender.hub import is_repo, local_folder
    from laserrec.server.app import make_app
    from laserrec.server.service import Service
    from laserrec.server.settings import Limits

    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    if token is None and not _loopback(host):
        console.print(f"[yellow]warning:[/] {host} can be reached by others and no API token is set "
                      f"(--token-file or {_TOKEN}); anybody there can change the catalogue")
    limits = Limits(max_batch, max_wait_ms / 1000, max_queue, timeout, max_body, cache)
    if state is None:  # never inside the hub's cache, which people delete; one for all revisions
        state = Path("served") / model.as_posix().partition("@")[0] if is_repo(model) else model / "served"
    name = model.as_posix() if is_repo(model) else model.name
    with Service.opened(local_folder(model), state, limits, index, name) as service:
        console.print(f"{len(service.listing):,} items; ready on port {port} of {host}, page at /, API at /docs")
        uvicorn.run(make_app(service, token), host=host, port=port, log_level="warning", access_log=False,
                    timeout_graceful_shutdown=max(1, round(timeout)))


def _read_token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN) or None
    try:
        token = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token file {file} can't be read: {error}") from None
    if not token:
        raise UserError(f"token file {file} is empty")
    return token


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
