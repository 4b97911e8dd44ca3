"""Calls that wait for each other, also in a process that was forked from the one that loaded the model."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import torch

from laserrec.util.errors import UserError


class Turns:
    """Parameters: `device`: tells where the model computes."""

    def __init__(self, device: Callable[[], torch.device]):
        self._device = device
        self._lock, self._process, self._forked = threading.RLock(), os.getpid(), False

    @contextlib.contextmanager
    def held(self, tables: bool = False) -> Iterator[None]:
        """One call at a time. tables: it computes with polars. Raises UserError in a forked process where it can't be
        done."""
        if os.getpid() != self._process:
            self._go_on_after_fork()
        if tables and self._forked:
            raise UserError("in a forked process frames can't be read, items not added and nothing saved, since "
                            "polars' threads are missing there; give lists or dicts, or load the model in the process")
        with self._lock:
            yield

    def _go_on_after_fork(self) -> None:
        """Only the thread that forked lives on: torch would wait for its pool's other threads for ever, and a lock that
        another thread held is never given back."""
        if self._device().type != "cpu":
            raise UserError("a model on a GPU can't be used in a forked process; load it in the process, or start the "
                            "process with the method spawn")
        if not self._lock.acquire(blocking=False):
            raise UserError("the process was forked while another thread used the model, whose state may be half "
                            "changed; load the model in the new process, or fork while it is not in use")
        self._lock.release()
        torch.set_num_threads(1)
        self._process, self._forked = os.getpid(), True
