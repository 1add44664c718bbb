"""What is known of the compiled kernels on this machine: for which shapes, tokens and threads they
give torch's bits, and whether they are faster. Verdicts outlive the process in a file, so that a
restart does not try again.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import xxhash

from compute_node.native import binding

logger = logging.getLogger(__name__)

MAX_RATIO = 1.05  # a kernel that takes longer than this many times torch's time is not used

_VERSION = 2
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
# Each makes torch or its libraries add in another order.
_SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR")
_TIMED_S, _MAX_PAIRS = 1e-3, 8

Key = tuple[Any, ...]


class Verdict(NamedTuple):
    """way:   how the kernel gets torch's bits; 0: it has others
    ratio: the kernel's time divided by torch's; 0: they were not timed
    """

    way: int
    ratio: float = 0.0

    @property
    def chosen(self) -> int:
        """`way`, unless the kernel is slower; 0: torch computes."""
        return self.way if self.ratio <= MAX_RATIO else 0


@dataclass(frozen=True)
class _PutOff:
    """then: called when the verdict is known"""

    compare: Callable[[], Verdict]
    then: list[Callable[[], object]]


class _Interrupted(Exception):
    """Other work came while a comparison was made."""


def _never() -> bool:
    return False


class Verdicts:
    """Of one entry. A key says what the bits depend on: shape, dtype, bias, tokens, threads."""

    def __init__(self, entry: str) -> None:
        self.entry = entry
        self.known: dict[Key, Verdict] = {}
        self.num_proofs = 0

    def ask(self, key: Key, compare: Callable[[], Verdict]) -> Verdict:
        """What is known of `key`; for the first of it, what `compare` finds by trying the kernel
        beside torch.
        """
        verdict = self.known.get(key)
        if verdict is None:
            verdict = self.known[key] = compare()
            self.num_proofs += 1
            self._log(key, verdict)
        return verdict

    def count(self, native: bool) -> int:
        """Keys asked for or read from a file that the kernel computes, or that torch does."""
        return [verdict.chosen > 0 for verdict in self.known.copy().values()].count(native)

    def _log(self, key: Key, verdict: Verdict) -> None:
        if verdict.chosen and self.entry != "gemv":
            return
        facts = {"entry": self.entry, "key": str(key), "ratio": round(verdict.ratio, 2)}
        kernel = "native" if verdict.chosen else "torch"
        threads = torch.get_num_threads()
        logger.info("kernel chosen", extra={**facts, "kernel": kernel, "threads": threads})


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
        ours: list[float] = []
        theirs: list[float] = []
        end_s = time.perf_counter() + _TIMED_S
        while len(ours) < 2 or (len(ours) < _MAX_PAIRS and time.perf_counter() < end_s):
            ours.append(_time_s(kernel))
            theirs.append(_time_s(by_torch))
        return min(ours) / min(theirs)

    def load(self, path: Path) -> None:
        """Take over what an earlier process proved on this machine, with this torch and library.

        Any other file is left alone and said in one sentence: everything is proved again then.
        """
        if not binding.build_id():
            return
        try:
            found = self._read(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.warning(
                "kernel verdicts are proved again", extra={"path": str(path), "reason": str(error)}
            )
            return
        for entry, known in found.items():
            self.entries[entry].known.update(known)

    def save(self, path: Path) -> None:
        """Write all verdicts, whole or not at all. A folder that cannot be written is said, no
        more.
        """
        if not binding.build_id():
            return
        body = json.dumps(
            {
                entry: [[_to_json(key), *verdict] for key, verdict in verdicts.known.copy().items()]
                for entry, verdicts in self.entries.items()
            }
        )
        document = {"machine": self._machine(), "digest": _digest(body), "verdicts": body}
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(document))
            beside.replace(path)
        except OSError as error:
            logger.warning(
                "kernel verdicts are not kept", extra={"path": str(path), "reason": str(error)}
            )

    def _read(self, content: bytes) -> dict[str, dict[Key, Verdict]]:
        """By entry. Raises ValueError for a file of another machine, and for a damaged one."""
        try:
            document = json.loads(content)
            if document["machine"] != self._machine():
                raise ValueError("they are of another CPU, torch or compiled library")
            body = document["verdicts"]
            if document["digest"] != _digest(body):
                raise ValueError("the file is damaged")
            rows = json.loads(body)
            return {
                entry: {_from_json(key): Verdict(way, ratio) for key, way, ratio in rows[entry]}
                for entry in self.entries
            }
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the file is damaged: {error}") from error

    def _machine(self) -> dict[str, str]:
        """Whatever else a verdict depends on."""
        return {
            "version": str(_VERSION),
            "cpu": _cpu(),
            "torch": f"{torch.__version__} {torch.version.git_version}",
            "transformers": transformers.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "library": binding.build_id(),
            "timed": str(self.times),
            **{name: os.environ.get(name, "") for name in _SETTINGS},
        }


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


def _digest(body: str) -> str:
    return xxhash.xxh3_64_hexdigest(body.encode())


def _to_json(part: Any) -> Any:
    if isinstance(part, tuple):
        return [_to_json(inner) for inner in part]
    return {"dtype": str(part).removeprefix("torch.")} if isinstance(part, torch.dtype) else part


def _from_json(part: Any) -> Any:
    if isinstance(part, list):
        return tuple(_from_json(inner) for inner in part)
    return getattr(torch, part["dtype"]) if isinstance(part, dict) else part


@cache
def _cpu() -> str:
    lines = _CPUINFO.read_text().partition("\n\n")[0].splitlines()
    pairs = [line.partition(":") for line in lines]
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    return "; ".join(f"{name}: {facts[name]}" for name in _CPU_FACTS if name in facts)
