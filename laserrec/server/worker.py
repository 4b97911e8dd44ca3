"""One thread that alone touches the model. Requests that wait together go through it together."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

_MEMORY = 0.9
"""How much of the running mean of seconds per request survives a batch."""


class OverloadedError(Exception):
    """The queue is full."""

    def __init__(self, retry_after: int):
        super().__init__(f"too many requests wait; try again in {retry_after} s")
        self.retry_after = retry_after
        """Whole seconds."""


class ClosedError(Exception):
    """The worker takes nothing more."""


@dataclass
class _Job:
    payload: Any
    alone: bool
    """`payload` is a function to call, not a request to batch."""
    future: Future = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Worker:
    """Parameters: `answer` takes a list of requests and gives as many answers; `batched` is told each batch's size."""

    def __init__(self, answer: Callable[[list[Any]], Sequence[Any]], max_batch: int, max_wait: float, max_queue: int,
                 batched: Callable[[int], None] = lambda size: None):
        self._answer, self._batched = answer, batched
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._jobs: deque[_Job] = deque()
        self._asks = 0
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 0.02  # per request, a guess until the first batch
        self._thread = threading.Thread(target=self._run, name="laserrec-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._asks

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closed

    def submit(self, ask: Any) -> Future:
        """Queue a request. Raises OverloadedError where too many wait, ClosedError after `close`."""
        with self._changed:
            if self._asks >= self._max_queue:
                raise OverloadedError(max(1, math.ceil(self._asks * self._seconds)))
            return self._put(_Job(ask, alone=False))

    def call(self, work: Callable[[], Any]) -> Future:
        """Run `work` in the worker's thread, in turn; not counted as a request. Raises ClosedError after `close`."""
        with self._changed:
            return self._put(_Job(work, alone=True))

    def close(self) -> None:
        """Take nothing more, finish what is queued, end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _put(self, job: _Job) -> Future:
        if self._closed:
            raise ClosedError("the server is shutting down")
        self._jobs.append(job)
        self._asks += not job.alone
        self._changed.notify_all()
        return job.future

    def _run(self) -> None:
        while batch := self._next():
            live = [job for job in batch if job.future.set_running_or_notify_cancel()]  # others gave up meanwhile
            if not live:
                continue
            if live[0].alone:
                _settle(live, lambda live=live: [live[0].payload()])
            else:
                self._answer_batch(live)

    def _next(self) -> list[_Job]:
        """The next job that runs alone, or the next batch; empty when the worker has been closed and is done."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return []
                self._changed.wait()
            if self._jobs[0].alone:
                return [self._jobs.popleft()]
            # Waiting for company ends when the batch is full or when something waits that would be held up by it.
            until = self._jobs[0].arrived + self._max_wait
            while self._asks == len(self._jobs) < self._max_batch and not self._closed:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            batch = []
            while self._jobs and not self._jobs[0].alone and len(batch) < self._max_batch:
                batch.append(self._jobs.popleft())
            self._asks -= len(batch)
            return batch

    def _answer_batch(self, live: list[_Job]) -> None:
        start = time.monotonic()
        self._batched(len(live))
        if not _settle(live, lambda: self._answer([job.payload for job in live]), last=len(live) == 1):
            for job in live:  # one bad request must not take the others down
                _settle([job], lambda job=job: self._answer([job.payload]))
        per_request = (time.monotonic() - start) / len(live)
        self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * per_request


def _settle(jobs: list[_Job], work: Callable[[], Sequence[Any]], last: bool = True) -> bool:
    """Give each job its result, or (last) all of them the error. Whether there were results."""
    try:
        results = list(work())
        if len(results) != len(jobs):
            raise RuntimeError(f"{len(results)} answers to {len(jobs)} requests")
    except BaseException as error:  # the thread must outlive anything a request does
        if last:
            for job in jobs:
                job.future.set_exception(error)
        return False
    for job, result in zip(jobs, results, strict=True):
        job.future.set_result(result)
    return True
