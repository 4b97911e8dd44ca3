"""One thread that alone touches the model. Requests that wait together go through it together; changes of the catalogue
advance one step between two batches, so that neither waits for the whole of the other."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from laserrec.server.settings import Limits

_MEMORY = 0.9
"""How much of a running mean one more request leaves."""
_GAIN = 0.75
"""Seconds per request in a batch of twice the size, before such a batch was seen."""


class OverloadedError(Exception):
    """The queue is full."""

    def __init__(self, retry_after: int):
        super().__init__(f"the server has more work than it can do in time; try again in {retry_after} s")
        self.retry_after = retry_after
        """Whole seconds."""


class ClosedError(Exception):
    """No request is taken."""

    def __init__(self, why: str = "the server is shutting down"):
        super().__init__(why)


@dataclass
class _Job:
    payload: Any
    future: Future = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Worker:
    """Parameters: `answer` takes a list of requests and gives as many answers."""

    def __init__(self, answer: Callable[[list[Any]], Sequence[Any]], limits: Limits):
        self._answer, self._limits = answer, limits
        self.batched: Callable[[int], None] = lambda size: None
        """Called with the size of each batch, in the worker's thread."""
        self._jobs: deque[_Job] = deque()
        self._changes: deque[tuple[Generator[None, None, Any], Future]] = deque()
        self._wake = threading.Condition()
        self._closed_at = math.inf
        self._pace = {1: 0.02}  # seconds per request by the batch size's number of bits; a guess at first
        self._running, self._began = 0, 0.0  # the batch under way
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="laserrec-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._jobs)

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and self._closed_at == math.inf

    @property
    def expected_seconds(self) -> float:
        """How long a request that comes now would take, judged by the time that recent batches took."""
        ahead, running = len(self._jobs) + 1, self._running
        begun = max(0.0, running * self._per_request(running) - (time.monotonic() - self._began))
        return ahead * self._per_request(min(ahead, self._limits.max_batch)) + begun

    def _per_request(self, batch: int) -> float:
        """Seconds per request in a batch of this size, as in the batches nearest in size that were seen."""
        bits = batch.bit_length()
        seen = min(list(self._pace), key=lambda other: abs(other - bits))
        return self._pace[seen] * _GAIN ** (bits - seen)

    def check_room(self) -> None:
        """Raises OverloadedError if one more request would take too long. One may always wait, so that the model is
        never idle."""
        late = self._jobs and self.expected_seconds > self._limits.queue_seconds
        if late or len(self._jobs) >= self._limits.max_queue:
            raise OverloadedError(max(1, math.ceil(self.expected_seconds)))

    def submit(self, ask: Any) -> Future:
        """Queue a request. Raises OverloadedError where it would wait too long, ClosedError after `close`."""
        with self._wake:
            self._check_open()
            self.check_room()
            job = _Job(ask)
            self._jobs.append(job)
            self._wake.notify_all()
            return job.future

    def change(self, steps: Generator[None, None, Any]) -> Future:
        """Run `steps` in the worker's thread, one step between two batches; changes run one after another. The future
        holds what the generator returns and can't be cancelled. Raises ClosedError after `close`."""
        future: Future = Future()
        future.set_running_or_notify_cancel()
        with self._wake:
            self._check_open()
            self._changes.append((steps, future))
            self._wake.notify_all()
        return future

    def close(self, grace_seconds: float = 0.0) -> None:
        """Take nothing more, answer what waits, end the thread. Changes that are not finished after `grace_seconds` are
        given up: their generators are closed and their futures raise ClosedError."""
        with self._wake:
            self._closed_at = min(self._closed_at, time.monotonic() + grace_seconds)
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _check_open(self) -> None:
        if self._closed_at < math.inf:
            raise ClosedError
        if os.getpid() != self._process:  # the model's thread is not there, and nobody would ever answer
            raise ClosedError("this process was forked after the model was loaded; load it in each process, with a "
                              "state folder of its own")

    def _run(self) -> None:
        while self._await_work():
            self._turn()  # by itself, so that a thread that waits holds no request, and no model with it

    def _turn(self) -> None:
        """A step of a change and a batch of requests, of what there is."""
        start = time.monotonic()
        if self._changes:
            self._step()
        stepped = time.monotonic() - start
        batch = self._next_batch()
        live = [job for job in batch if job.future.set_running_or_notify_cancel()]  # others gave up meanwhile
        if live:
            self._answer_batch(live)
            self._learn_pace(len(live), stepped + time.monotonic() - self._began)
        self._running = 0

    def _await_work(self) -> bool:
        """False when the worker was closed and everything is done."""
        with self._wake:
            while not self._jobs and not self._changes:
                if self._closed_at < math.inf:
                    return False
                self._wake.wait()
            return True

    def _step(self) -> None:
        """Advance the oldest change by one step."""
        steps, future = self._changes[0]
        try:
            if time.monotonic() > self._closed_at:
                steps.close()
                raise ClosedError
            next(steps)
            return
        except StopIteration as end:
            future.set_result(end.value)
        except BaseException as error:  # the thread must outlive anything a change does
            future.set_exception(error)
        self._changes.popleft()

    def _next_batch(self) -> list[_Job]:
        """What waits, after some time for company where nothing else is to be done."""
        with self._wake:
            if not self._jobs:
                return []
            until = self._jobs[0].arrived + self._limits.max_wait_seconds
            while len(self._jobs) < self._limits.max_batch and not self._changes and self._closed_at == math.inf:
                left = until - time.monotonic()
                if left <= 0 or not self._wake.wait(left):
                    break
            batch = [self._jobs.popleft() for _ in range(min(len(self._jobs), self._limits.max_batch))]
            self._running, self._began = len(batch), time.monotonic()
            return batch

    def _answer_batch(self, live: list[_Job]) -> None:
        self.batched(len(live))
        alone = len(live) == 1
        if not _settle(live, lambda: self._answer([job.payload for job in live]), last=alone) and not alone:
            for job in live:  # one bad request must not take the others down
                _settle([job], lambda job=job: self._answer([job.payload]))

    def _learn_pace(self, batch: int, seconds: float) -> None:
        """`seconds`: of a batch and of the changes' step before it, but not of idle time."""
        memory, bits, one = _MEMORY**batch, batch.bit_length(), seconds / batch
        self._pace[bits] = memory * self._pace.get(bits, one) + (1 - memory) * one


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
