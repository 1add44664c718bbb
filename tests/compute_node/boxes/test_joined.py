"""Workers that come and go by a file, while the node runs.

Planted faults seen red: see the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compute_node.boxes.boxes import Boxes
from compute_node.boxes.file_watch import FileWatch
from compute_node.boxes.joined import JoinedWorkers
from compute_node.boxes.owners import Shares
from compute_node.boxes.workers_file import WorkerEntry, WorkersFile
from proto import errors
from proto.expert import ExpertKey
from proto.held_experts import ALL_EXPERTS
from tests.stack import wait_for


class Link:
    """A worker that takes work while it is open."""

    def __init__(self, entry: WorkerEntry, refusal: errors.FlashMoEError | None = None) -> None:
        self.address, self.cost, self.slots = entry.address, entry.cost, 8
        self.is_up, self._refusal, self.held = False, refusal, ALL_EXPERTS

    def __enter__(self) -> Link:
        self.is_up = self._refusal is None
        return self

    def __exit__(self, *_: object) -> None:
        self.is_up = False

    def wait_up(self, timeout_s: float) -> bool:
        if self._refusal is not None:
            raise self._refusal
        return self.is_up


@contextmanager
def following(path: Path, new_link: Any = Link) -> Iterator[Boxes]:
    boxes = Boxes(lambda slots, held: Shares(32, slots, held), slots=8)
    with (
        JoinedWorkers(boxes, new_link) as workers,
        FileWatch(path, lambda file: workers.take(file.workers)),
    ):
        workers.wait_up()
        yield boxes


def write(path: Path, *addresses: str) -> None:
    lines = [f'[[worker]]\naddress = "{address}"\n' for address in addresses]
    new = path.with_suffix(".new")
    new.write_text("".join(lines))
    new.replace(path)


def names(boxes: Boxes) -> list[str]:
    return [link.address for link in boxes.links if link.is_up]


def test_boxes_join_and_leave(tmp_path: Path) -> None:
    """Seen red: a link of the old file that stays open; one made anew though it stayed."""
    path = tmp_path / "workers.toml"
    write(path, "a:1")
    with following(path) as boxes:
        [first] = boxes.links
        write(path, "a:1", "b:1")
        wait_for(lambda: names(boxes) == ["a:1", "b:1"], 20, "the second to join")
        assert boxes.links[0] is first
        write(path, "b:1")
        wait_for(lambda: names(boxes) == ["b:1"], 20, "the first to leave")
        assert not first.is_up
        last = boxes.links[0]
    assert boxes.links == () and not last.is_up


def test_a_file_that_cannot_be_read_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "workers.toml"
    write(path, "a:1")
    with following(path) as boxes:
        path.write_text("[[worker]]\nadress = 'b:1'\n")
        wait_for(lambda: "workers file unread" in caplog.text, 20, "the file to be refused")
        assert names(boxes) == ["a:1"]
        write(path, "c:1")
        wait_for(lambda: names(boxes) == ["c:1"], 20, "the next file to be taken")


def test_a_worker_that_is_refused_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "workers.toml"
    write(path, "a:1", "b:1")

    def new_link(entry: WorkerEntry) -> Link:
        bad = errors.OtherBits("b:1 computes other bits") if entry.address == "b:1" else None
        return Link(entry, bad)

    with following(path, new_link) as boxes:
        assert names(boxes) == ["a:1"]
        assert "worker refused" in caplog.text


def test_a_file_that_is_wrong_at_the_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigInvalid, match="cannot read"):
        WorkersFile.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[[worker]]\naddress = 'a:1'\njoules = -1.0\n")
    with pytest.raises(errors.ConfigInvalid, match="joules"):
        WorkersFile.load(tmp_path / "bad.toml")


def test_workers_of_the_settings_stay(tmp_path: Path) -> None:
    """Seen red: the links of the file in the place of those of the settings."""
    boxes = Boxes(lambda slots, held: Shares(32, slots, held), slots=8)
    with JoinedWorkers(boxes, Link, ["a:1"]) as workers:  # type: ignore[arg-type]
        [first] = boxes.links
        workers.take([WorkerEntry(address="b:1")])
        assert names(boxes) == ["a:1", "b:1"]
        workers.take([])
        assert boxes.links == (first,) and first.is_up
    assert boxes.links == () and not first.is_up


def test_a_worker_of_the_settings_that_is_refused_stops_the_node() -> None:
    """Seen red: the other worker's link stays open."""
    boxes, opened = Boxes(lambda slots, held: Shares(32, slots, held), slots=8), list[Link]()

    def new_link(entry: WorkerEntry) -> Link:
        bad = errors.OtherBits("b:1 computes other bits") if entry.address == "b:1" else None
        opened.append(Link(entry, bad))
        return opened[-1]

    with (
        pytest.raises(errors.OtherBits),
        JoinedWorkers(boxes, new_link, ["a:1", "b:1"]),  # type: ignore[arg-type]
    ):
        pass
    assert boxes.links == () and not any(link.is_up for link in opened)


def test_a_link_that_cannot_be_made_changes_nothing() -> None:
    """Seen red: a link that was opened before it stays open, and is in no list."""
    boxes, opened = Boxes(lambda slots, held: Shares(32, slots, held), slots=8), list[Link]()

    def new_link(entry: WorkerEntry) -> Link:
        if entry.address == "c:1":
            raise errors.ConfigInvalid("cannot read node.pem")
        opened.append(Link(entry))
        return opened[-1]

    with JoinedWorkers(boxes, new_link) as workers:  # type: ignore[arg-type]
        workers.take([WorkerEntry(address="a:1")])
        with pytest.raises(errors.ConfigInvalid):
            workers.take([WorkerEntry(address=address) for address in ("b:1", "c:1")])
        assert names(boxes) == ["a:1"] and [link.is_up for link in opened] == [True, False]


def test_a_costly_box_owns_fewer_experts(tmp_path: Path) -> None:
    """Seen red: shares by slots alone."""
    path = tmp_path / "workers.toml"
    path.write_text(
        '[[worker]]\naddress = "a:1"\njoules = 2.0\nlatency = 2.0\n[[worker]]\naddress = "b:1"\n'
    )
    with following(path) as boxes:
        owned = {"a:1": 0, "b:1": 0}
        for layer in range(32):
            for expert in range(32):
                for link in boxes.shares(layer, [expert]):
                    owned[link.address] += 1
    ratio = owned["b:1"] / owned["a:1"]
    assert 3 <= ratio <= 5
    assert ExpertKey(0, 0) not in boxes
