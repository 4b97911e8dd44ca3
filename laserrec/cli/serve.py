"""`laserrec serve`."""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App
from rich.console import Console
from rich.markup import escape

from laserrec.cli.options import OPENING, Index, Model, Opening
from laserrec.server.settings import Limits, check_hosts, check_range
from laserrec.server.worker import ClosedError, OverloadedError
from laserrec.util.errors import UserError

if TYPE_CHECKING:
    from laserrec.server.service import Service

serve_app = App(name="serve")
_TOKEN = "LASERREC_API_TOKEN"


@serve_app.default
def serve(model: Model, *, host: str = "127.0.0.1", port: int = 8000, token_file: Path | None = None,
          allowed_hosts: list[str] | None = None, state: Path | None = None, index: Index = None,
          max_batch: int = 32, max_wait_ms: float = 2.0, queue_seconds: float = 0.4, max_queue: int = 1024,
          timeout: float = 10.0, read_timeout: float = 10.0, max_body: int = 1_048_576, cache: int = 4096,
          threads: int | None = None, opening: Opening = OPENING) -> None:
    """Serve a model over HTTP: recommendations, similar items, adding and removing items, a page to try it.

    A newer model is served without a restart: POST /v1/model with the API token, or SIGHUP, which loads MODEL anew.

    Example: laserrec serve runs/quickstart/model --port 8000

    Parameters
    ----------
    host
        Address to listen on; the default can be reached from this machine alone.
    port
        Port to listen on; 0 takes a free one, which is printed.
    token_file
        File with the API token that callers must give; else the environment variable LASERREC_API_TOKEN, else none.
    allowed_hosts
        Names under which callers reach the server (the Host header, without port), as recommend.example.org or
        *.example.org; "*" allows all. The names of loopback and the address of --host are always allowed.
    state
        Folder for items that callers add and remove; default: MODEL/served, for a model of the hub served/ORG/NAME.
    max_batch
        Requests that go through the model together.
    max_wait_ms
        Milliseconds that a request waits for others to share its batch.
    queue_seconds
        A request that would take longer than this, by the time that recent ones took, is answered 429 with Retry-After.
    max_queue
        Requests that may wait at all; one more is answered 429, too.
    timeout
        Seconds until an unanswered request is answered 503, and a change of the catalogue that goes on 202.
    read_timeout
        Seconds until a connection is closed whose request did not arrive as a whole.
    max_body
        Bytes of a request's body.
    cache
        Answers kept for repeated requests; 0 keeps none.
    threads
        Threads of torch; else its own choice.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # to be ended so is no failure
    token = _read_token(token_file)
    try:
        import fastapi_offline  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serving needs the extra serve: pip install 'laserrec[serve]'") from None
    from laserrec.recommender.folder import SERVED
    from laserrec.recommender.hub import is_repo

    if not host:
        raise UserError("host is empty; give an address to listen on, such as 127.0.0.1, or 0.0.0.0 for all addresses")
    check_range("port", port, 0, 65_535)
    if threads is not None:
        check_range("threads", threads, 1, 1_024)
    check_hosts(allowed_hosts or [])
    limits = Limits(max_batch, max_wait_ms / 1000, max_queue, queue_seconds, timeout, read_timeout, max_body, cache)
    console = Console(stderr=True, soft_wrap=True)
    if token is None and not _loopback(host):
        console.print(f"[yellow]warning:[/] {host} can be reached by others and no API token is set "
                      f"(--token-file or {_TOKEN}); anybody there can change the catalogue")
    if state is None:  # never inside the hub's cache, which people delete; one for all revisions
        state = Path("served") / model.as_posix().partition("@")[0] if is_repo(model) else model / SERVED
    _run(model, host, port, token, allowed_hosts or [], state, index, limits, threads, opening, console)


def _run(model: Path, host: str, port: int, token: str | None, allowed_hosts: list[str], state: Path,
         index: Path | None, limits: Limits, threads: int | None, opening: Opening, console: Console) -> None:
    import torch

    from laserrec.recommender.hub import is_repo, local_folder
    from laserrec.server import listening
    from laserrec.server.app import LOOPBACK, make_app
    from laserrec.server.service import Service

    if threads is not None:
        torch.set_num_threads(threads)
    sys.setswitchinterval(0.0001)  # of two busy threads none waits long for the other
    own = f"[{host}]" if ":" in host else host
    hosts = [*LOOPBACK, own, *allowed_hosts]
    name = model.as_posix() if is_repo(model) else model.name
    with (listening.bind(host, port) as listener,  # before the model, which takes long to load
          Service.opened(local_folder(model), state, limits, index, name, **vars(opening)) as service):
        _reload_on_hangup(service, console)
        gc.freeze()  # a full collection looks at every object, for a tenth of a second; the model's are there to stay
        address = f"http://{own}:{listener.getsockname()[1]}"
        listening.run(make_app(service, token, hosts), listener, limits, lambda: console.print(
            f"{len(service.listing):,} items; ready at {address}, page at /, API at /docs", highlight=False))


def _reload_on_hangup(service: Service, console: Console) -> None:
    """SIGHUP loads the served folder anew and tells how that ended; the model that serves goes on until then."""

    def told(future: Future[int]) -> None:
        error = future.exception()
        if error is None:
            console.print(f"{len(service.listing):,} items; serving {service.served.folder} anew", highlight=False)
        else:
            console.print(f"[yellow]warning:[/] the model that served goes on, since: {escape(str(error))}")

    def again(*_: object) -> None:
        try:
            service.swap().future.add_done_callback(told)
        except (OverloadedError, ClosedError) as error:
            console.print(f"[yellow]warning:[/] SIGHUP changes nothing: {error}")

    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, again)


def _read_token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN) or None
    try:
        token = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8"
        raise UserError(f"token file {file} can't be read: {why}") from None
    if not token:
        raise UserError(f"token file {file} is empty")
    return token


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
