"""Batches across callers, a bounded queue, errors that stay with their request, an orderly end."""

import threading

import pytest

from laserrec.server.cache import AnswerCache
from laserrec.server.worker import ClosedError, OverloadedError, Worker


def test_requests_that_wait_share_a_batch():
    sizes, gate = [], threading.Event()
    worker = Worker(lambda asks: gate.wait(5) and [a * 2 for a in asks], 4, 0.0, 100, sizes.append)
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

    worker = Worker(answer, 8, 0.2, 100)
    worker.start()
    futures = [worker.submit(a) for a in ("a", "bad", "b")]
    assert futures[0].result(5) == "a" and futures[2].result(5) == "b"
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(5)
    worker.close()


def test_a_full_queue_turns_away_and_a_closed_one_finishes():
    gate = threading.Event()
    worker = Worker(lambda asks: gate.wait(5) and asks, 1, 0.0, 2)
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


def test_calls_run_in_turn_and_alone():
    order = []
    worker = Worker(lambda asks: [order.append(tuple(asks)) for _ in asks], 8, 0.0, 100)
    futures = [worker.submit(1), worker.submit(2), worker.call(lambda: order.append("call")), worker.submit(3)]
    worker.start()
    for future in futures:
        future.result(5)
    worker.close()
    assert order == [(1, 2), (1, 2), "call", (3,)]


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
