"""Garbage is looked for again after an import, whatever it ended with.

Fault seen red: a verb that could not be imported left the collector off.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from deploy.terminal.imports import importing


@pytest.fixture(autouse=True)
def collectable() -> Iterator[None]:
    """What the test froze may be collected again."""
    yield
    gc.unfreeze()


def test_nothing_is_collected_meanwhile() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count()


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
