"""One look a second for all who watch, none while nobody does.

Planted faults seen red: a look for each viewer, looks that go on when the last has left, viewers
that wait for ever once the gateway stops or a look failed, a viewer too many that is let in.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from compute_node.gateway.page import feed as module
from compute_node.gateway.page.feed import Feed
from compute_node.live.look import Look
from proto import errors


class FakeAsker:
    def __init__(self) -> None:
        self.num_looks, self.fails = 0, False

    async def look(self) -> Look:
        if self.fails:
            raise ZeroDivisionError
        self.num_looks += 1
        return Look(float(self.num_looks), {}, {"compute_node": "it is stopping"})


@pytest.fixture
def asker(monkeypatch: pytest.MonkeyPatch) -> FakeAsker:
    monkeypatch.setattr(module, "_INTERVAL_S", 0.02)
    return FakeAsker()


async def watch(feed: Feed, most: int) -> list[Any]:
    found = []
    async for frame in feed.frames():
        assert frame.startswith(b"data: ") and frame.endswith(b"\n\n")
        found.append(json.loads(frame[6:]))
        if len(found) == most:
            break
    return found


def new_feed(asker: Any) -> Feed:
    return Feed(asker)


async def test_viewers_share_the_looks(asker: FakeAsker) -> None:
    async with new_feed(asker) as feed:
        found = await asyncio.gather(*(watch(feed, 5) for _ in range(10)))
    assert asker.num_looks <= 8
    assert all(frames == found[0] for frames in found)
    assert found[0][0]["away"] == {"node": "it is stopping"}


async def test_nobody_watches_nobody_looks(asker: FakeAsker) -> None:
    async with new_feed(asker) as feed:
        await asyncio.sleep(0.1)
        assert asker.num_looks == 0
        frames = feed.frames()
        await anext(frames)
        await frames.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        before = asker.num_looks
        await asyncio.sleep(0.1)
        assert (asker.num_looks, feed.num_viewers) == (before, 0)
        assert len(await watch(feed, 2)) == 2, "one who comes later"


async def test_viewers_end_with_the_gateway(asker: FakeAsker) -> None:
    async with new_feed(asker) as feed:
        watching = asyncio.create_task(watch(feed, 1000))
        await asyncio.sleep(0.1)
    assert await asyncio.wait_for(watching, 2)


async def test_a_defect_ends_the_frames_and_is_logged(
    asker: FakeAsker, caplog: pytest.LogCaptureFixture
) -> None:
    async with new_feed(asker) as feed:
        watching = asyncio.create_task(watch(feed, 1000))
        await asyncio.sleep(0.1)
        asker.fails = True
        assert await asyncio.wait_for(watching, 2)
    assert "look at the stack failed" in caplog.text


async def test_so_many_and_no_more(asker: FakeAsker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_VIEWERS", 1)
    async with new_feed(asker) as feed:
        feed.check_room()
        frames = feed.frames()
        await anext(frames)
        with pytest.raises(errors.QueueFull, match="1 pages watch already"):
            feed.check_room()
        await frames.aclose()  # type: ignore[attr-defined]
        feed.check_room()
