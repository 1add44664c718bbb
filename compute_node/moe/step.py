"""One forward pass over a batch of sequences: whose the rows are, what was accessed for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from compute_node.cache.asked import never
from compute_node.cache.loans import Loans
from compute_node.kernels import heap
from compute_node.kernels.expert_kernels import ExpertKernels
from compute_node.moe.route import EXACT, Route, RoutePolicy, is_exact
from compute_node.predict.predictor import Seen
from proto.expert import ExpertKey


class Phase(Enum):
    """prefill: of a prompt; decode: one token of a sequence."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Part:
    """One sequence's rows of a batch.

    num_computed: the sequence's tokens once the step is through
    """

    sequence: str
    phase: Phase
    num_rows: int
    num_computed: int


class Batch:
    """The sequences of one forward pass, in the order of their rows.

    rows:      of each part
    is_decode: every part is one token of a sequence
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts
        self.rows = _rows_of(parts)
        self.is_decode = all(part.phase is Phase.DECODE for part in parts)


@dataclass(frozen=True)
class LayerAccess:
    """What one layer was asked for, whatever a policy made of it. ids, weights: [T, K]; hits:
    experts found resident, among those that were computed.
    """

    ids: Tensor
    weights: Tensor
    hits: set[int]


class RunsAhead(Protocol):
    """Uses the time in which a step waits for experts.

    always: at every layer, whether or not anything is awaited
    """

    always: bool

    def reached(self, layer: int, used: Collection[ExpertKey]) -> None:
        """The step's router of `layer` chose these. Comes before the cache hears of them."""
        ...

    def run(self, layer: int, so_far: Tensor, arrived: Callable[[], bool]) -> None:
        """The step waits for experts of `layer`. Returns when `arrived` says so, or when nothing is
        left to do. Raises nothing.

        so_far: [1, D], an estimate of the layer's output from the experts that are there
        """
        ...


class Foretells(Protocol):
    """Another node computes the same step, and names experts before."""

    def reached(self, layer: int, experts: Sequence[int]) -> None:
        """The step's router of `layer` chose these. Comes before they are computed. Raises
        nothing.
        """
        ...


class Emulates(Protocol):
    """Stands for the experts of a second forward, whose output is only a guess."""

    def experts(
        self, layer: int, kernels: ExpertKernels, num_experts: int, hidden: Tensor, route: Route
    ) -> Tensor:
        """An estimate of the layer's output, [T, D]. hidden: [T, D]"""
        ...


@dataclass(frozen=True)
class Keeps:
    """What a step keeps for who asked for it. scores: what routers return for all experts; seen:
    what a decode step of one sequence has seen at each layer, for predictors; gates: of all experts
    """

    scores: bool = False
    seen: bool = False
    gates: bool = False


class Step:
    """One forward pass. Everything that has to do with it is handed on here.

    check:     called between layers and while experts are waited for; raises to give the step up
    accesses:  by model layer number, filled as the pass goes on
    scores:    [T, E] by model layer number, what routers returned for all experts; None: not kept
    gates:     [T, E] float16 by model layer number, each expert's share; None: not kept
    seen:      by model layer number, what predictors go by; None: not kept
    run_ahead: uses its waits; None: the thread sleeps
    shadow:    another node computes it, too; None: none does
    emulation: stands for the experts of a second pass; None: it is a true one
    policy:    chooses among experts; what it goes by is kept
    streams:   [T, D] by model layer number, the residual stream before the experts' block, where it
               is recognised; in decode
    give_way:  called between portions of a prompt, where others may have turns
    num_portions: called as a prompt's layer begins: into how many portions its experts are cut
    loans:     lends its experts, beside the true pass of the same token; None: it is the true one
    num_substituted, num_skipped: chosen experts that gave way to others, that were left out
    num_small: experts computed with a record of fewer bits
    """

    def __init__(
        self,
        batch: Batch,
        check: Callable[[], None],
        keeps: Keeps = Keeps(),
        run_ahead: RunsAhead | None = None,
        emulation: Emulates | None = None,
        policy: RoutePolicy = EXACT,
        loans: Loans | None = None,
    ) -> None:
        self.batch = batch
        self.check = check
        self.run_ahead = run_ahead
        self.shadow: Foretells | None = None
        self.emulation = emulation
        self.policy = policy
        self.accesses: dict[int, LayerAccess] = {}
        needs_scores = keeps.scores or keeps.gates or policy.needs_scores
        self.scores: dict[int, Tensor] | None = {} if needs_scores else None
        self.gates: dict[int, Tensor] | None = {} if keeps.gates else None
        self.seen: dict[int, Seen] | None = {} if keeps.seen else None
        self.streams: dict[int, Tensor] = {}
        self.loans = loans
        self.give_way: Callable[[], None] = never
        self.num_portions: Callable[[], int] = undivided
        self.num_substituted = self.num_skipped = 0
        self.num_small = 0

    @property
    def looks_ahead(self) -> bool:
        """Whether later layers' experts are guessed: in decode, where exact records are computed
        of what routers choose.
        """
        return self.batch.is_decode and is_exact(self.policy) and self.loans is None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Experts and routers of a model's forward find this step, on this thread alone."""
        token = _running.set(self)
        try:
            with nullcontext() if self.batch.is_decode else heap.mapped_buffers():
                yield
        finally:
            _running.reset(token)

    def alone(self) -> list[Step]:
        """What the pass was to each sequence: its own rows, and the hits among its own experts."""
        if len(self.batch.parts) == 1:
            return [self]
        return [self._of(*pair) for pair in zip(self.batch.parts, self.batch.rows, strict=True)]

    def _of(self, part: Part, rows: slice) -> Step:
        step = Step(Batch(part), self.check)
        step.accesses = {layer: _only(access, rows) for layer, access in self.accesses.items()}
        if self.scores is not None:
            step.scores = {layer: scores[rows] for layer, scores in self.scores.items()}
        if self.gates is not None:
            step.gates = {layer: gates[rows] for layer, gates in self.gates.items()}
        return step


def undivided() -> int:
    """Into one portion."""
    return 1


_running: ContextVar[Step] = ContextVar("step")


def current_step() -> Step:
    """The step whose forward pass runs. Raises NotInStep."""
    try:
        return _running.get()
    except LookupError:
        raise NotInStep(
            "the model's forward runs outside of a step: call it within `with step.running()`"
        ) from None


class NotInStep(RuntimeError):
    """A mistake of the program: nobody says whose rows these are."""


def _rows_of(parts: Sequence[Part]) -> list[slice]:
    rows, start = list[slice](), 0
    for part in parts:
        rows.append(slice(start, start + part.num_rows))
        start += part.num_rows
    return rows


def _only(access: LayerAccess, rows: slice) -> LayerAccess:
    ids = access.ids[rows]
    return LayerAccess(ids, access.weights[rows], access.hits & set(ids.flatten().tolist()))
