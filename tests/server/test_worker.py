"""Batches across callers, a queue that is bounded in time, changes in steps, errors that stay with their request, an
orderly end."""

import os
import threading
import time

import pytest

from laserrec.server.cache import AnswerCache
from laserrec.server.settings import Limits
from laserrec.server.worker import ClosedError, OverloadedError, Worker


def worker_of(answer, **limits):
    return Worker(answer, Limits(**{"queue_seconds": 60, "max_wait_seconds": 0, **limits}))


def test_requests_that_wait_share_a_batch():
    sizes, gate = [], threading.Event()
    worker = worker_of(lambda asks: gate.wait(5) and [a * 2 for a in asks], max_batch=4)
    worker.batched = sizes.append
    worker.start()
    futures = [worker.submit(j) for j in range(10)]
    gate.set()
    assert [f.result(5) for f in futures] == [2 * j for j in range(10)]
    assert max(sizes) <= 4 and sum(sizes) == 10 and len(sizes) <= 5
    worker.close()


def test_one_bad_request_does_not_harm_the_others():
    def answer(asks):
        if "bad" in asks:
            raise ValueError("bad")
        return asks

    worker = worker_of(answer, max_batch=8, max_wait_seconds=0.2)
    worker.start()
    futures = [worker.submit(a) for a in ("a", "bad", "b")]
    assert futures[0].result(5) == "a" and futures[2].result(5) == "b"
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(5)
    worker.close()


def test_a_bad_request_alone_does_not_end_the_worker():
    worker = worker_of(lambda asks: [1 / ask for ask in asks])
    worker.start()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            worker.submit(0).result(5)
    assert worker.submit(2).result(5) == 0.5 and worker.open
    worker.close()


def test_a_full_queue_turns_away_and_a_closed_one_finishes():
    gate = threading.Event()
    worker = worker_of(lambda asks: gate.wait(5) and asks, max_batch=1, max_queue=2)
    futures = [worker.submit(j) for j in range(2)]
    with pytest.raises(OverloadedError) as error:
        worker.submit(3)
    assert error.value.retry_after >= 1
    gate.set()
    worker.start()
    worker.close()
    assert [f.result(0) for f in futures] == [0, 1]
    with pytest.raises(ClosedError):
        worker.submit(4)
    with pytest.raises(ClosedError):
        worker.change(iter(()))


@pytest.mark.parametrize(("seconds", "fits"), [(0.01, 25), (0.1, 2)])
def test_requests_that_would_wait_too_long_are_turned_away(seconds, fits):
    """The bound is a time: how many requests fit into it depends on how long each takes."""
    worker = worker_of(lambda asks: asks, max_batch=1, queue_seconds=0.25)
    for _ in range(100):
        worker._learn_pace(1, seconds)
    taken = 0
    with pytest.raises(OverloadedError):
        while True:
            worker.submit(taken)
            taken += 1
    assert abs(taken - fits) <= 1 and worker.expected_seconds == pytest.approx((taken + 1) * seconds, rel=0.05)
    worker.start()
    worker.close()


def test_under_twice_its_capacity_what_is_accepted_waits_no_longer_than_said():
    worker = worker_of(lambda asks: time.sleep(0.002 + 0.004 * len(asks)) or asks, max_batch=8, queue_seconds=0.2)
    worker.start()
    waits, turned_away, until = [], 0, time.monotonic() + 3
    while time.monotonic() < until:
        for _ in range(4):  # 400 a second; the worker answers about 235
            try:
                start = time.monotonic()
                worker.submit(0).add_done_callback(lambda _, s=start: waits.append(time.monotonic() - s))
            except OverloadedError:
                turned_away += 1
        time.sleep(0.01)
    worker.close()
    assert turned_away > 50 and len(waits) > 200
    assert sorted(waits)[int(0.99 * len(waits))] < 1


def test_one_may_always_wait_so_that_the_model_is_never_idle():
    worker = worker_of(lambda asks: asks, queue_seconds=0.001)
    for _ in range(100):
        worker._learn_pace(1, 10.0)
    worker.submit(0)
    with pytest.raises(OverloadedError):
        worker.submit(1)
    worker.start()
    worker.close()


def test_changes_advance_one_step_between_two_batches():
    order = []

    def change(name, steps):
        for j in range(steps):
            order.append(f"{name}{j}")
            yield
        return name

    worker = worker_of(lambda asks: [order.append(ask) for ask in asks], max_batch=1)
    futures = [worker.submit(j) for j in range(3)]
    changes = [worker.change(change("a", 3)), worker.change(change("b", 1))]
    assert not changes[0].cancel()  # whoever gives up waiting does not undo it
    worker.start()
    assert [f.result(5) for f in changes] == ["a", "b"] and all(f.done() for f in futures)
    worker.close()
    assert order == ["a0", 0, "a1", 1, "a2", 2, "b0"]


def test_a_change_that_fails_or_is_cut_short_says_so_and_can_clean_up():
    cleaned = []

    def forever():
        try:
            while True:
                time.sleep(0.01)
                yield
        finally:
            cleaned.append(True)

    def failing():
        yield
        raise ValueError("no")

    worker = worker_of(lambda asks: asks)
    worker.start()
    with pytest.raises(ValueError, match="no"):
        worker.change(failing()).result(5)
    running = worker.change(forever())
    assert worker.submit(1).result(5) == 1
    worker.close(grace_seconds=0.1)
    with pytest.raises(ClosedError):
        running.result(0)
    assert cleaned == [True]


def test_the_cache_forgets_the_least_recently_used():
    cache = AnswerCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert cache.get("b") is None and cache.get("a") == 1 and cache.get("c") == 3 and len(cache) == 2
    cache.clear()
    assert cache.get("a") is None
    nothing = AnswerCache(0)
    nothing.put("a", 1)
    assert nothing.get("a") is None


def test_a_forked_process_answers_nothing_instead_of_waiting_for_ever():
    worker = worker_of(lambda asked: asked)
    worker.start()
    reads, writes = os.pipe()
    if not os.fork():
        try:
            worker.submit(1)
        except ClosedError as error:
            os.write(writes, str(error).encode())
        finally:
            os._exit(0)
    os.wait()
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        assert b"forked after the model was loaded; load it in each process" in pipe.read()
    assert worker.submit(1).result(10) == 1
    worker.close()
