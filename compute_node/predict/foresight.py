"""Keeps which experts were guessed and by whom, until their layer is reached, and what each
predictor's guesses were worth then: its recall and precision of misses, by layers ahead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from proto.expert import ExpertKey
from proto.stats import counter, gauge

_GUESSES, _CLOSED = "flashmoe_node_guesses", "Guesses by whether the expert was a miss, then"


@dataclass
class Misses:
    """Of decode steps, since start."""

    num_misses: int = counter(
        "flashmoe_node_decode_misses", "Misses of decode steps", key="decode_misses"
    )
    num_foreseen: int = counter(
        "flashmoe_node_foreseen_misses",
        "Misses of decode steps that were guessed before their layer was reached",
        key="foreseen_misses",
    )


@dataclass
class Worth:
    """What one predictor's guesses at one distance have been worth. A guess counts when its layer
    is reached; it is right when the expert is used there and is a miss.

    first: misses that nobody had named before it
    """

    misses: Misses
    right: int = counter(_GUESSES, _CLOSED, key="guesses_right", outcome="right")
    wrong: int = counter(_GUESSES, _CLOSED, key="guesses_wrong", outcome="wrong")
    first: int = counter(
        "flashmoe_node_first_foreseen_misses",
        "Misses of decode steps by who guessed them first",
        key="misses_first_foreseen",
    )

    @property
    @gauge(
        "flashmoe_node_foresight_precision",
        "Share of guesses that were misses",
        key="foresight_precision",
    )
    def precision(self) -> float:
        guesses = self.right + self.wrong
        return self.right / guesses if guesses else 0.0

    @property
    @gauge(
        "flashmoe_node_foresight_recall",
        "Share of decode's misses that it was the first to guess",
        key="foresight_recall",
    )
    def recall(self) -> float:
        """The recalls of all predictors and distances add up to the share that was foreseen."""
        return self.first / self.misses.num_misses if self.misses.num_misses else 0.0

    def settle(self, was_right: bool, was_first: bool) -> None:
        self.right += was_right
        self.wrong += not was_right
        self.first += was_right and was_first


@dataclass(frozen=True)
class Settled:
    """What came of the guesses about a layer.

    foreseen:  misses that were guessed
    disproved: guessed, not used: the store need not read them
    num_unforeseen: misses that were not guessed
    """

    foreseen: set[ExpertKey]
    disproved: list[ExpertKey]
    num_unforeseen: int

    @property
    def num_misses(self) -> int:
        return len(self.foreseen) + self.num_unforeseen


@dataclass
class Foresight:
    """One node's. One thread; another may read what was counted."""

    misses: Misses = field(default_factory=Misses)
    _worths: dict[tuple[str, int], Worth] = field(default_factory=dict)
    _open: dict[ExpertKey, dict[str, int]] = field(default_factory=dict)  # distance by predictor

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether a guess about it is open."""
        return key in self._open

    def __len__(self) -> int:
        """Experts that are guessed now."""
        return len(self._open)

    def open(self) -> list[ExpertKey]:
        """Experts that are guessed now, for any thread: copied in one step."""
        return list(self._open)

    def about(self, layer: int) -> list[ExpertKey]:
        """Experts of `layer` that are guessed now."""
        return [key for key in self._open if key.layer == layer]

    def worths(self) -> Iterator[tuple[str, int, Worth]]:
        """Predictor, layers ahead, and what its guesses there were worth."""
        worths = [*self._worths.items()]  # at once: the compute thread may add one
        for predictor, distance in sorted(dict(worths)):
            yield predictor, distance, self._worths[predictor, distance]

    def worth(self, predictor: str, distance: int) -> Worth:
        found = self._worths.get((predictor, distance))
        if found is None:
            found = self._worths[predictor, distance] = Worth(self.misses)
        return found

    def guessed(self, key: ExpertKey, predictor: str, distance: int) -> bool:
        """`predictor` names an expert that is not resident, `distance` layers ahead. Returns
        whether nobody had. What it says again, nearer, changes nothing.
        """
        is_first = key not in self._open
        self._open.setdefault(key, {}).setdefault(predictor, distance)
        return is_first

    def forget(self, key: ExpertKey, predictor: str) -> None:
        """A guess came to nothing: it counts neither as right nor as wrong."""
        named = self._open[key]
        del named[predictor]
        if not named:
            del self._open[key]

    def retract(self, key: ExpertKey, predictor: str | None = None) -> bool:
        """A guess was seen to be wrong before its layer is reached: it counts as wrong. Returns
        whether no guess about the expert is open any more, and one was.

        predictor: whose; None: everybody's
        """
        named = self._open.get(key, {})
        for name in list(named) if predictor is None else named.keys() & {predictor}:
            self.worth(name, named.pop(name)).settle(was_right=False, was_first=False)
        if named:
            return False
        return self._open.pop(key, None) is not None

    def settle(
        self, layer: int, used: Collection[ExpertKey], misses: Collection[ExpertKey]
    ) -> Settled:
        """The router of `layer` has spoken: closes the guesses about it. misses: of those used"""
        foreseen, disproved = set[ExpertKey](), list[ExpertKey]()
        for key in [key for key in self._open if key.layer == layer]:
            was_right = key in misses
            for number, (predictor, distance) in enumerate(self._open.pop(key).items()):
                self.worth(predictor, distance).settle(was_right, was_first=number == 0)
            if was_right:
                foreseen.add(key)
            elif key not in used:
                disproved.append(key)
        self.misses.num_misses += len(misses)
        self.misses.num_foreseen += len(foreseen)
        return Settled(foreseen, disproved, len(misses) - len(foreseen))
