"""The laboratory is what it says: links delay and lose, disks are slow, nothing stays behind.

Planted faults seen red: a switch that forwards at once, a throttle of a hundred times the rate,
a sweep that forgets namespaces.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.boxlab.box import Box
from tests.boxlab.disk import MIB, make_image
from tests.boxlab.group import SD_CARD
from tests.boxlab.laboratory import laboratory, leftovers, why_not
from tests.boxlab.switch import FAST_ETHERNET, GIGABIT, WIFI, Link
from tests.stack import ROOT

pytestmark = [pytest.mark.system, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
CONTENT = os.urandom(20 * MIB)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    (folder / "content").mkdir()
    (folder / "content/file").write_bytes(CONTENT)
    make_image(folder / "content", folder / "image")
    return folder / "image"


@contextmanager
def sockets(a: Box, b: Box) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Joined by UDP, of the first box and the second."""
    with b.inside():
        there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with a.inside():
        here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with here, there:
        here.settimeout(10)
        there.settimeout(10)
        here.bind((a.host, 7000))
        there.bind((b.host, 7000))
        here.connect((b.host, 7000))
        there.connect((a.host, 7000))
        yield here, there


def round_trips_s(here: socket.socket, there: socket.socket, size: int) -> list[float]:
    found = []
    for _ in range(20):
        began_s = time.perf_counter()
        here.send(bytes(size))
        there.send(there.recv(2048))
        here.recv(2048)
        found.append(time.perf_counter() - began_s)
    return found


@pytest.mark.parametrize("link", [GIGABIT, FAST_ETHERNET, WIFI], ids=["gigabit", "100M", "wifi"])
def test_a_link_delays(image: Path, link: Link) -> None:
    with laboratory([image, image], link) as (a, b), sockets(a, b) as (here, there):
        took_s = round_trips_s(here, there, 1400)
    sent_s = 4 * 1428 * 8 / link.bits_per_s
    assert min(took_s) >= link.round_trip_s + sent_s
    assert min(took_s) < link.round_trip_s + sent_s + 0.005


def test_a_box_that_is_cut_off_hears_nothing_until_it_is_healed(image: Path) -> None:
    with laboratory([image, image]) as (a, b), sockets(a, b) as (here, there):
        b.cut_off()
        there.settimeout(0.1)
        here.send(b"lost")
        with pytest.raises(TimeoutError):
            there.recv(2048)
        b.heal()
        here.send(b"heard")
        there.settimeout(10)
        assert there.recv(2048) == b"heard"


def test_a_disk_is_as_slow_as_asked_and_has_the_content(image: Path) -> None:
    read = ["dd", f"bs={4 * MIB}", "iflag=direct", "status=none"]
    with laboratory([image, image], speed=SD_CARD) as boxes:
        for box in boxes:
            began_s = time.monotonic()
            command = box.command([*read, f"if={box.disk.folder}/file"])
            found = subprocess.run(command, capture_output=True, check=True).stdout
            took_s = time.monotonic() - began_s
            assert found == CONTENT
            assert box.disk.bytes_read >= len(CONTENT)
            assert took_s > len(CONTENT) / SD_CARD.bytes_per_s - 0.1  # it may save up a tenth


def test_a_killed_laboratory_is_swept_by_the_next(image: Path) -> None:
    program = (
        "import sys, os, time, subprocess; from pathlib import Path\n"
        "from tests.boxlab.laboratory import laboratory\n"
        "with laboratory([Path(sys.argv[1])] * 2) as boxes:\n"
        "    command = boxes[0].command(['sleep', '600'])\n"
        "    left = subprocess.Popen(command, stdout=-3, stderr=-3)\n"  # DEVNULL
        "    while not boxes[0].group.pids: time.sleep(0.01)\n"
        "    print(left.pid, boxes[0].folder.parent, boxes[0].disk.device, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", program, str(image)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pid, folder, device = killed.stdout.split()
    owner = Path(folder).name
    assert leftovers(owner)
    with laboratory([image]) as (box,):
        assert not leftovers(owner)
        assert not Path(f"/proc/{pid}/root").exists()
        attached = Path(f"/sys/block/{Path(device).name}/loop/backing_file")
        assert device == box.disk.device or not attached.exists()
        own = box.folder.parent.name
        assert leftovers(own)
    assert not leftovers(own)
