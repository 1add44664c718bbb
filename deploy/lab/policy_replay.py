"""Replays a trace through the policies a user chose, at one cache size or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.terminal import console
from proto import errors
from proto.access import DecodeAccess
from scheduler.lab.lockstep import replay_together
from scheduler.lab.policies import POLICIES, Background
from scheduler.simulate.replay import Outcome, ReplayCache, Setting
from scheduler.simulate.replay import replay as replay_through
from scheduler.simulate.slots import Hits
from scheduler.simulate.trace import AccessTrace, TraceInvalid, check_same_model

FRAME = {"lru", "min"}  # always replayed: the others are measured against them
PLOTTED_SIZES = (0.5, 0.75, 1, 1.25, 1.5, 2)  # times --slots
REPORT_STEPS = 64

Outcomes = dict[str, Outcome]


def chosen_policies(names: str | None) -> list[str]:
    """The policies that the user named, with lru and min, in the order of POLICIES.

    Raises InvalidRequest for a name that is no policy.
    """
    if names is None:
        return list(POLICIES)
    wanted = {name.strip() for name in names.split(",")} | FRAME
    unknown = sorted(wanted - set(POLICIES))
    if unknown:
        raise errors.InvalidRequest(
            f"there is no policy {unknown[0]!r}: give some of {', '.join(POLICIES)}"
        )
    return [name for name in POLICIES if name in wanted]


def training_trace(path: Path, replayed_path: Path, replayed: AccessTrace) -> AccessTrace:
    """Load the trace to learn from. Warns on stderr when it shares generations with the replayed.

    Raises TraceInvalid when it is the trace that is replayed, or is of another model.
    """
    train = AccessTrace.load(path)
    check_same_model(replayed, train)
    known = set(_generations(train))
    generations = _generations(replayed)
    num_shared = sum(generation in known for generation in generations)
    if path.samefile(replayed_path) or num_shared == len(generations):
        raise TraceInvalid(
            f"{path} holds what is replayed: give --train a trace of other generations"
        )
    if num_shared:
        console.err.print(
            f"{num_shared} of {len(generations)} generations are in {path} too: "
            "policies that learn will look better than they are"
        )
    return train


def _generations(trace: AccessTrace) -> list[bytes]:
    return [trace.topk_ids[slice(*span)].tobytes() for span in pairwise(trace.seq_offsets)]


def plotted_sizes(setting: Setting) -> list[int]:
    """The cache sizes that a plot adds to that of the setting, in slots a layer."""
    trace = setting.trace
    around = {round(setting.slots * times) for times in PLOTTED_SIZES} - {setting.slots}
    return sorted(size for size in around if trace.top_k <= size < trace.num_experts)


@dataclass(frozen=True)
class PolicyReplay:
    """Policies to replay, and what they may have learned before.

    is_choice: the user named the policies, so one that cannot run is an error; else it is left out
    """

    policies: Sequence[str]
    background: Background
    is_choice: bool = True

    def run(self, setting: Setting) -> Outcomes:
        """Replay every policy. Returns the outcomes by policy."""
        with _progress() as bar:
            outcomes = {name: self._run_one(setting, name, bar) for name in self.policies}
        return {name: outcome for name, outcome in outcomes.items() if outcome is not None}

    def run_sizes(
        self, setting: Setting, sizes: Sequence[int], names: Iterable[str]
    ) -> dict[int, Outcomes]:
        """Replay at further sizes, all in one pass: what a policy learns serves every size.

        names: policies that `run` could replay
        Returns the outcomes by slots a layer.
        """
        found: dict[int, Outcomes] = {slots: {} for slots in sizes}
        settings = [replace(setting, slots=slots) for slots in sizes]
        for name in names if settings else ():
            make = partial(_made, name, self.background)
            outcomes = replay_together(settings, make)
            for slots, outcome in zip(sizes, outcomes, strict=True):
                found[slots][name] = outcome
        return found

    def _run_one(self, setting: Setting, name: str, bar: Progress) -> Outcome | None:
        what = f"{name}, {setting.slots} slots"
        task = bar.add_task(what, total=setting.trace.num_steps)
        if not console.err.is_terminal:
            console.say(f"replaying {what}")
        try:
            cache = POLICIES[name](setting, self.background)
        except TraceInvalid as error:
            if self.is_choice:
                raise
            console.err.print(f"{name} is left out: {error}")
            return None
        return replay_through(setting, Watched(cache, lambda steps: bar.advance(task, steps)))


def _made(name: str, background: Background, setting: Setting) -> ReplayCache:
    return POLICIES[name](setting, background)


class Watched:
    """A cache that reports how many steps were replayed."""

    def __init__(self, cache: ReplayCache, report: Callable[[int], None]) -> None:
        self._cache = cache
        self._report = report
        self._num_unreported = 0

    def step(self, event: DecodeAccess) -> Hits:
        self._num_unreported += 1
        if self._num_unreported == REPORT_STEPS:
            self._report(REPORT_STEPS)
            self._num_unreported = 0
        return self._cache.step(event)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for each policy on a terminal, removed at the end; nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    silent = not console.err.is_terminal
    with Progress(*columns, console=console.err, disable=silent, transient=True) as bar:
        yield bar
