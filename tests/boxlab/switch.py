"""The links between boxes, with a delay and a rate of their own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

_SOURCE = Path(__file__).with_name("switch.c")
_END_S = 10.0


@dataclass(frozen=True)
class Link:
    """Between a box and the switch. A round trip between two boxes that are joined alike takes
    round_trip_s and what sending at bits_per_s takes, twice each way.
    """

    round_trip_s: float
    bits_per_s: int
    is_up: bool = True

    @property
    def delay_ns(self) -> int:
        """A round trip passes a link four times."""
        return round(self.round_trip_s * 1e9 / 4)

    def down(self) -> Link:
        """Nothing passes, and nobody is told."""
        return replace(self, is_up=False)


GIGABIT = Link(0.0003, 1_000_000_000)
FAST_ETHERNET = Link(0.0003, 100_000_000)
WIFI = Link(0.003, 1_000_000_000)


class Switch:
    """A running one. names: of network namespaces, in the order of its links"""

    def __init__(self, process: subprocess.Popen[str], names: Sequence[str]) -> None:
        self._process, self._numbers = process, {name: n for n, name in enumerate(names)}

    def set(self, name: str, link: Link) -> None:
        """In force when it returns. Raises OSError when the switch has ended."""
        assert self._process.stdin
        facts = (self._numbers[name], link.delay_ns, link.bits_per_s // 8, int(link.is_up))
        self._process.stdin.write(" ".join(map(str, facts)) + "\n")
        self._process.stdin.flush()
        expect(self._process, "done")


@contextmanager
def switch(addresses: dict[str, str], folder: Path) -> Iterator[Switch]:
    """Each namespace has a device "box0" without an address, for the block.

    addresses: by namespace; folder: where it is built
    Raises OSError.
    """
    binary = folder / "switch"
    build = ["cc", "-O2", "-o", str(binary), str(_SOURCE)]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(build)}: {done.stderr.strip()}")
    words = [word for pair in addresses.items() for word in pair]
    with subprocess.Popen(
        [str(binary), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            expect(process, "ready")
            yield Switch(process, list(addresses))
        finally:
            assert process.stdin
            process.stdin.close()
            process.wait(_END_S)


def expect(process: subprocess.Popen[str], line: str) -> None:
    """Raises OSError when it says another line, or ends."""
    assert process.stdout
    said = process.stdout.readline().strip()
    if said != line:
        raise OSError(f"the switch of the boxes said {said!r}, not {line!r}")


def why_not() -> str | None:
    """Why boxes cannot be joined here; None when they can."""
    for tool in ("cc", "ip", "nsenter"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    return None
