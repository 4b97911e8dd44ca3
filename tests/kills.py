"""Kill a piece of work at each of its steps on the disk, one after the other, as `kill -9` would."""

import os
import signal
import sys
from collections.abc import Callable


def kill_at_every_step(work: Callable[[], None], look: Callable[[int], None], every: int = 1) -> int:
    """Run `work` in a forked process that dies just before its n-th file system call, for n = 1, 1 + every, ... until
    it gets to its end; `look(n)` after each death, whose assertions are the caller's. Returns the number of deaths.
    `work` must not need threads, which a fork leaves behind (polars, Ray)."""
    step = 1
    while _died(work, step):
        look(step)
        step += every
    return (step - 1) // every


def _died(work: Callable[[], None], step: int) -> bool:
    child = os.fork()
    if not child:
        left = step

        def count(event: str, args: tuple) -> None:
            nonlocal left
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"):
                left -= 1
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the work failed before step {step}"
    return os.WIFSIGNALED(status)
