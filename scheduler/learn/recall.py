"""What came after the past steps that were most like the present one.

Nearest neighbours over the experts of all layers, after kNN-LM (Khandelwal et al. 2020): the
experts a token uses say much about the token and its context, so steps alike go on alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_NEIGHBOURS = 32  # about this many; ties may add some
TEMPERATURE = 3.0  # experts in common that make a neighbour e times as heavy
NUM_AHEAD = 8  # steps after a neighbour that count ...
AHEAD_DECAY = 0.8  # ... each this much of the one before
WORD_BITS = 64
SIFTED_WORDS = 200_000  # a memory of more is looked through in two rounds ...
SIFTED_STRIDE = 3  # ... the first over every third word ...
NUM_CANDIDATES = 1024  # ... for about this many steps

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Neighbours:
    """Past steps alike. common: experts shared with the present step; places: [M, A, L * K],
    where in an [L, E] table the experts of the A steps after each stand; known: [M, A], whether
    that step has come yet.
    """

    common: NDArray[np.uint16]
    places: NDArray[np.unsignedinteger]
    known: NDArray[np.bool_]


class StepMemory:
    """The last `capacity_steps` steps: which experts each used, and in what order they came.

    `append` changes it, `neighbours` asks. See `step_bytes` for its size.
    hidden: places that must not be looked at
    """

    def __init__(self, shape: tuple[int, int], capacity_steps: int) -> None:
        num_layers, self._num_experts = shape
        self._first = (np.arange(num_layers) * self._num_experts)[:, None]
        num_words = -(-num_layers * self._num_experts // WORD_BITS)
        self._capacity = capacity_steps
        self._bits = np.zeros((num_words, capacity_steps), np.uint64)
        self._places = np.zeros(
            (capacity_steps, 0), np.int32
        )  # [steps, L * K], K as the first step has it
        self._shared = np.empty_like(self._bits)
        self._counts = np.empty(self._bits.shape, np.uint8)
        self.num_steps = 0
        self.hidden = slice(0, 0)

    def __len__(self) -> int:
        return min(self.num_steps, self._capacity)

    def append(self, chosen: NDArray[np.intp]) -> None:
        """One more step, [L, K] its experts; takes the place of the oldest when full."""
        if not self.num_steps:
            kind = np.min_scalar_type(self._first.size * self._num_experts)
            self._places = np.zeros((self._capacity, chosen.size), kind)  # [steps, L * K]
        at = self.num_steps % self._capacity
        self._places[at] = (self._first + chosen).ravel()
        self._bits[:, at] = self._pack(self._places[at])
        self.num_steps += 1

    def neighbours(self, chosen: NDArray[np.intp]) -> Neighbours:
        """Past steps most like one that used `chosen`, [L, K], and that something came after."""
        found, common = self._alike(self._pack((self._first + chosen).ravel()))
        newest = (self.num_steps - 1) % self._capacity  # nothing came after it
        common[_within(found, self.hidden) | (found == newest)] = 0
        nearest = common >= _threshold(common, NUM_NEIGHBOURS)
        found, common = found[nearest], common[nearest]
        ahead = np.arange(1, NUM_AHEAD + 1)
        age = (self.num_steps - 1 - found) % self._capacity
        after = (found[:, None] + ahead) % self._capacity
        known = (ahead <= age[:, None]) & ~_within(after, self.hidden)
        return Neighbours(common, self._places[after], known)

    def _alike(self, bits: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.uint16]]:
        """Steps, and how many experts each shares with these.

        All steps where that is cheap. In a large memory those that share most in every third word,
        some thirty times as many as are wanted: of the nearest, hardly one is missed.
        """
        size = len(self)
        every = np.arange(size)
        if len(self._bits) * size <= SIFTED_WORDS:
            return every, self._common(self._bits[:, :size], bits)
        rough = self._common(self._bits[::SIFTED_STRIDE, :size], bits[::SIFTED_STRIDE])
        found = np.flatnonzero(rough >= _threshold(rough, NUM_CANDIDATES))
        return found, self._common(self._bits[:, found], bits)

    def _common(self, steps: NDArray[np.uint64], bits: NDArray[np.uint64]) -> NDArray[np.uint16]:
        """[steps], how many of these bits, [words], each step has."""
        words, size = steps.shape
        shared, counts = self._shared[:words, :size], self._counts[:words, :size]
        np.bitwise_and(steps, bits[:, None], out=shared)
        np.bitwise_count(shared, out=counts)
        return np.asarray(np.add.reduce(counts, axis=0, dtype=np.uint16))

    def _pack(self, places: NDArray[np.integer]) -> NDArray[np.uint64]:
        """[words], one bit an expert."""
        used = np.zeros(len(self._bits) * WORD_BITS, np.bool_)
        used[places] = True
        return np.packbits(used).view(np.uint64)


def step_bytes(shape: tuple[int, int], top_k: int) -> int:
    """What a step takes in a memory: its bits, as much to compare them in, its places."""
    num_words = -(-shape[0] * shape[1] // WORD_BITS)
    return num_words * 17 + shape[0] * top_k * np.min_scalar_type(shape[0] * shape[1]).itemsize


class Recall:
    """Shares of the experts among what followed steps alike, from one or more memories.

    `learn` changes the last memory, `shares` asks.
    """

    def __init__(self, shape: tuple[int, int], *memories: StepMemory) -> None:
        self._shape = shape
        self._memories = memories

    def learn(self, chosen: NDArray[np.intp]) -> None:
        """One more step of the current sequence, [L, K]."""
        self._memories[-1].append(chosen)

    def shares(self, chosen: NDArray[np.intp]) -> Array:
        """[2, L, E]: how often each expert came in the next step after steps like this one, and
        how often in the next few, nearer ones first; zero when nothing is remembered.
        """
        found = [memory.neighbours(chosen) for memory in self._memories]
        common = np.concatenate([one.common for one in found]).astype(np.float64)
        if not common.size or common.max() <= 0:
            return np.zeros((2, *self._shape))
        alike = np.exp((common - common.max()) / TEMPERATURE)
        places = np.concatenate([one.places for one in found])
        known = np.concatenate([one.known for one in found])
        weights = alike[:, None] * known * AHEAD_DECAY ** np.arange(NUM_AHEAD)
        return np.stack([self._share(places[:, :1], weights[:, :1]), self._share(places, weights)])

    def _share(self, places: NDArray[np.unsignedinteger], weights: Array) -> Array:
        total = weights.sum()
        if not total:
            return np.zeros(self._shape)
        each = np.repeat((weights / total).ravel(), places.shape[2])
        size = self._shape[0] * self._shape[1]
        return np.bincount(places.ravel(), each, size).astype(np.float64).reshape(self._shape)


def _threshold(common: NDArray[np.uint16], wanted: int) -> int:
    """The least number in common that leaves about this many steps, at least 1."""
    at_least = np.bincount(common)[::-1].cumsum()
    missing = int(np.searchsorted(at_least, wanted))
    return max(1, len(at_least) - 1 - missing)


def _within(places: NDArray[np.intp], hidden: slice) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (places >= hidden.start) & (places < hidden.stop)
    return inside
