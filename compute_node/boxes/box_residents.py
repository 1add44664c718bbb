"""Which experts a worker has in memory, as far as the main node has heard."""

from __future__ import annotations

from collections.abc import Collection, Iterable


class BoxResidents:
    """A bit an expert, by layer. What was evicted since is found out when it is asked for. Any
    thread.
    """

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(bits.bit_count() for bits in self._bits.copy().values())

    def has(self, layer: int, expert: int) -> bool:
        """Whether it needs no read there."""
        return bool(self._bits.get(layer, 0) >> expert & 1)

    def heard(self, layer: int, resident: bytes) -> None:
        """What a reply says of its layer, as `to_bytes` has it."""
        self._bits[layer] = int.from_bytes(resident, "little")

    def add(self, layer: int, experts: Iterable[int]) -> None:
        """It was asked to read these."""
        self._bits[layer] = self._bits.get(layer, 0) | bits_of(experts)

    def forget(self) -> None:
        """It may have been started anew."""
        self._bits = {}


def bits_of(experts: Iterable[int]) -> int:
    """The lowest bit is expert 0's."""
    return sum(1 << expert for expert in set(experts))


def to_bytes(experts: Collection[int]) -> bytes:
    """As a reply has it: the lowest bit of the first byte is expert 0's."""
    bits = bits_of(experts)
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")
