"""A launcher hears signals, except a hang-up that it was told to ignore.

Fault seen red: `nohup flashmoe serve &` ended with its terminal.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from deploy.terminal.signals import stop_flag

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HEARD}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HEARD)
def test_a_signal_stops(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)  # whatever started the tests may ignore it
    stopped = stop_flag()
    assert not stopped()
    os.kill(os.getpid(), number)
    assert stopped()


def test_nohup_is_heeded() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopped = stop_flag()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stopped()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopped()
