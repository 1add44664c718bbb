"""Compares native entries with torch on this machine, and knows how that came out."""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compute_node.kernels import verdict_file
from compute_node.kernels.verdicts import MAX_RATIO, Key, Verdict, Verdicts
from compute_node.native import binding

logger = logging.getLogger(__name__)

_TIMED_S = (1e-3, 5e-3)  # a kernel that seems slower is timed longer before that is believed
_MAX_PAIRS = 8


@dataclass(frozen=True)
class _PutOff:
    """then: called when the verdict is known"""

    compare: Callable[[], Verdict]
    then: list[Callable[[], object]]


class _Interrupted(Exception):
    """Other work came while a comparison was made."""


def _never() -> bool:
    return False


class Prober:
    """Holds the verdicts on every entry. One a node.

    times: whether kernels with torch's bits are also timed, and left where they are slower
    """

    def __init__(self, times: bool = False) -> None:
        self.times = times
        self.gemv, self.gemm = Verdicts("gemv"), Verdicts("gemm")
        self.lossless_gemv, self.lossless_gemm = (
            Verdicts("lossless_gemv"),
            Verdicts("lossless_gemm"),
        )
        self.experts, self.gate, self.norm = Verdicts("experts"), Verdicts("gate"), Verdicts("norm")
        self._put_off: dict[tuple[str, Key], _PutOff] = {}
        self._has_work: Callable[[], bool] = _never
        self.num_modules: Counter[tuple[str, bool]] = Counter()  # by entry; whether native

    @property
    def entries(self) -> dict[str, Verdicts]:
        return {v.entry: v for v in vars(self).values() if isinstance(v, Verdicts)}

    @property
    def num_proofs(self) -> int:
        """Comparisons with torch that this process made."""
        return sum(verdicts.num_proofs for verdicts in self.entries.values())

    def put_off(
        self, entry: str, key: Key, compare: Callable[[], Verdict], then: Callable[[], object]
    ) -> None:
        """Let `prove_put_off` ask for this; `then` is called once the verdict is known."""
        self._put_off.setdefault((entry, key), _PutOff(compare, [])).then.append(then)

    def prove_put_off(self, has_work: Callable[[], bool]) -> None:
        """Ask for what was put off, until nothing is left or `has_work`. Called by the thread that
        computes, while it has nothing to do.
        """
        self._has_work = has_work
        try:
            while self._put_off and not has_work():
                (entry, key), waiting = next(iter(self._put_off.items()))
                self.entries[entry].ask(key, waiting.compare)
                del self._put_off[entry, key]
                for then in waiting.then:
                    then()
        except _Interrupted:
            return  # it stays put off
        finally:
            self._has_work = _never

    def give_way(self) -> None:
        """Called within a comparison, between products: ends one that was put off when there is
        other work.
        """
        if self._has_work():
            raise _Interrupted

    def ratio(self, kernel: Callable[[], object], by_torch: Callable[[], object]) -> float:
        """The kernel's shortest time divided by torch's, of some calls in alternation; 0 where
        kernels are not timed.
        """
        if not self.times:
            return 0.0
        shortest = [float("inf"), float("inf")]
        for limit_s in _TIMED_S:
            end_s, pairs = time.perf_counter() + limit_s, 0
            while pairs < 2 or (pairs < _MAX_PAIRS and time.perf_counter() < end_s):
                times = _time_s(kernel), _time_s(by_torch)
                shortest = [min(pair) for pair in zip(shortest, times, strict=True)]
                pairs += 1
            if shortest[0] <= MAX_RATIO * shortest[1]:
                break
        return shortest[0] / shortest[1]

    def load(self, path: Path) -> None:
        """Take over what an earlier process proved on this machine, with this torch and library.

        Any other file is left alone and said in one sentence: everything is proved again then.
        """
        if not binding.build_id():
            return
        try:
            found = verdict_file.read(path, self.times)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            facts = {"path": str(path), "reason": str(error)}
            logger.warning("kernel verdicts are proved again", extra=facts)
            return
        for entry, known in found.items():
            self.entries[entry].known.update(known)

    def save(self, path: Path) -> None:
        """Write all verdicts. A folder that cannot be written is said, no more."""
        if not binding.build_id():
            return
        known = {entry: verdicts.known.copy() for entry, verdicts in self.entries.items()}
        try:
            verdict_file.write(path, known, self.times)
        except OSError as error:
            facts = {"path": str(path), "reason": str(error)}
            logger.warning("kernel verdicts are not kept", extra=facts)


def facts_of(module: Any) -> str:
    """For a key: the class of a module, or a function's name, and the numbers that it was
    configured by. Whatever it keeps otherwise comes from the model's configuration.
    """
    kind = module if inspect.isroutine(module) else type(module)
    numbers = [
        f"{name}={value!r}"
        for name, value in sorted(getattr(module, "__dict__", {}).items())
        if isinstance(value, (bool, int, float, str))
    ]
    return " ".join([f"{kind.__module__}.{kind.__qualname__}", *numbers])


def _time_s(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
