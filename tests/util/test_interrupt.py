"""Ctrl-C is held back until a step's end; a second one isn't."""

import signal
import threading

import pytest

from laserrec.util.interrupt import DeferredInterrupt


def test_one_waits_for_the_check(capsys):
    with DeferredInterrupt() as asked:
        asked.check()
        signal.raise_signal(signal.SIGINT)
        assert "Ctrl-C again" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            asked.check()


def test_two_stop_at_once():
    with DeferredInterrupt():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_former_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError), DeferredInterrupt():
        assert signal.getsignal(signal.SIGINT) != before
        raise ValueError
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_it_does_nothing():
    failures = []

    def work():
        try:
            with DeferredInterrupt() as asked:
                asked.check()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_a_scheduler_may_ask_twice():
    with DeferredInterrupt() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            asked.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_it_can_be_silent(capsys):
    with DeferredInterrupt(say=False):
        signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().err == ""
