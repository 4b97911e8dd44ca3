"""Commands in processes forked from this one, which has imported everything: killed, watched and timed.

Everything but the imports runs in the child. The fork is safe as long as this process itself never started threads:
no polars, torch or tokenizers work is done here, only in children.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": "1", "COLUMNS": "400"}


def warm() -> None:
    """Import what commands import, without starting a thread."""
    import sklearn.manifold  # noqa: F401
    import torch
    import torch._dynamo
    import torch.utils.tensorboard
    import transformers.models.llama.modeling_llama  # noqa: F401
    import usearch.index  # noqa: F401
    import uvicorn  # noqa: F401

    import laserrec.cli.main
    import laserrec.recommender.distil
    import laserrec.recommender.indexing
    import laserrec.recommender.recommender
    import laserrec.report.page
    import laserrec.server.app  # noqa: F401

    torch.set_num_threads(1)


@dataclass
class Ended:
    """How a child ended. `code`: its exit code; None: killed by us; negative: by that signal."""

    code: int | None
    seconds: float
    error: str


@contextlib.contextmanager
def started(work: Callable[[], None], errors: Path, file_bytes: int | None = None) -> Iterator[int]:
    """The process id of a child that does `work` in a process group of its own, which is killed at the end of the
    block. file_bytes: no file may grow beyond."""
    errors.unlink(missing_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(handle, 2)
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def ended(work: Callable[[], None], errors: Path, kill_after: float | None = None, file_bytes: int | None = None,
          limit_seconds: float = 120.0) -> Ended:
    """Run to the end, or kill -9 after `kill_after` seconds. Raises TimeoutError after `limit_seconds`."""
    begin = time.monotonic()
    with started(work, errors, file_bytes) as child:
        while True:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                status = os.waitpid(child, 0)[1]
                break
            now = time.monotonic() - begin
            if kill_after is not None and now >= kill_after:
                return Ended(None, now, "")
            if now > limit_seconds:
                raise TimeoutError(f"no end after {now:.0f} s: {errors.read_text('utf-8', 'replace')[-300:]}")
            time.sleep(0.002)
    return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - begin,
                 errors.read_text("utf-8", "replace") if errors.exists() else "")


def command(*arguments: object) -> Callable[[], None]:
    """`laserrec ARGUMENTS` as work for a child."""
    def work() -> None:
        from laserrec.cli.main import main

        sys.argv = ["laserrec", *map(str, arguments)]
        main()

    return work


def one_clear_line(run: Ended) -> bool:
    """Refused as a user should be: exit code 1 or 2, the error in one line, no traceback, nothing unexpected."""
    errors = [line for line in run.error.splitlines() if line.startswith("error: ")]
    return (run.code in (1, 2) and len(errors) == 1 and "Traceback" not in run.error
            and "unexpected" not in run.error)
