"""What `flashmoe tune` is asked for, and what it then chooses of a card.

Planted faults seen red: the fastest chosen within a time, milliseconds read as seconds.
"""

from __future__ import annotations

import pytest

from deploy.lab.wish import Wish
from proto import errors
from tests.proto.test_quality import card


@pytest.mark.parametrize(
    ("quality", "latency", "route"),
    [
        (None, None, "prior .1"),
        ("0.25%", None, "skip .5"),
        ("0.01%", None, ""),
        (None, "50ms", "skip .5"),
        (None, "0.07 s", "prior .05"),
        (None, "1s", ""),
        (None, "1ms", "prior .2"),
    ],
)
def test_chooses(quality: str | None, latency: str | None, route: str) -> None:
    assert Wish.of(quality, latency).choose(card()).route == route


@pytest.mark.parametrize("wish", [Wish.of("1%", None), Wish.of(None, "50ms")])
def test_what_is_served_buys_what_was_chosen(wish: Wish) -> None:
    chosen = wish.choose(card())
    assert chosen in card().ladder(wish.served(chosen))
    assert str(Wish.of("1%", None).served(chosen)) == "1%"


def test_says_when_no_setting_keeps_to_the_time() -> None:
    wish = Wish.of(None, "1ms")
    with pytest.raises(errors.InvalidRequest, match=r"the fastest, prior .2, takes 25.0 ms"):
        wish.check(wish.choose(card()))
    Wish.of(None, "50ms").check(Wish.of(None, "50ms").choose(card()))


@pytest.mark.parametrize("latency", ["80", "0ms", "-1ms", "80 minutes", "", "nanms"])
def test_refuses_what_is_no_time(latency: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="is no time: give it as 80ms"):
        Wish.of(None, latency)


def test_refuses_two_wishes_and_none() -> None:
    with pytest.raises(errors.InvalidRequest, match="not both"):
        Wish.of("1%", "80ms")
    with pytest.raises(errors.InvalidRequest, match="exact needs no tuning"):
        Wish.of("exact", None)
