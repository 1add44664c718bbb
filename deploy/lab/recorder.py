"""Generates from prompts, one after another, and keeps which experts every decode step used."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from compute_node.client.node_client import NodeClient
from compute_node.client.result import Generation, Result
from deploy.terminal.prompts import Prompt
from proto import errors
from proto.access import RecordedStep
from proto.foretold import Foretold
from scheduler.simulate.trace import AccessTrace


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. seed: that of the first generation; each next one adds 1"""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool
    prompt_tokens: int

    def as_text(self) -> str:
        """The text that a trace keeps in its field `sampling`."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Wanted:
    """What to record beside the chosen experts, see `NodeClient.generate`."""

    router_scores: bool = False
    predictions: bool = False
    inputs: bool = False


@dataclass
class Recorder:
    """Generates and records, on one thread. Another thread may call `cancel`.

    take: given each result; what it returns is kept in its place
    """

    node: NodeClient
    sampling: Sampling
    wanted: Wanted = Wanted()
    take: Callable[[Result], Result] = lambda result: result
    _current: Generation | None = None
    _cancelled: bool = False

    def run(
        self, prompts: Sequence[Prompt], done: Callable[[int, Prompt, Result], None]
    ) -> list[Result]:
        """Generate once from each prompt. Calls `done` with the number of each one that ended.

        Raises Cancelled after `cancel`, and the error that the node ends a generation with.
        """
        results = []
        for number, prompt in enumerate(prompts):
            result = self.take(self._generate(number, prompt))
            done(number, prompt, result)
            results.append(result)
        return results

    def cancel(self) -> None:
        """End the current generation and begin no other."""
        self._cancelled = True
        if self._current is not None:
            self._current.cancel()

    def _generate(self, number: int, prompt: Prompt) -> Result:
        self._current = self.node.generate(
            prompt.text,
            max_tokens=self.sampling.max_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=self.sampling.seed + number,
            ignore_eos=self.sampling.ignore_eos,
            max_prompt_tokens=self.sampling.prompt_tokens,
            record=True,
            **asdict(self.wanted),
        )
        if self._cancelled:  # between two generations, when there was none to cancel
            self._current.cancel()
        return self._current.run()


def to_trace(
    name: str, prompts: Sequence[Prompt], results: Sequence[Result], sampling: str
) -> AccessTrace:
    """A trace of the decode steps of all generations. A generation that ended with its first token
    has no step and is left out.

    Raises InvalidRequest when no generation has a step.
    """
    kept = [(p.name, r.steps) for p, r in zip(prompts, results, strict=True) if r.steps]
    steps = [step for _, of_one in kept for step in of_one]
    if not steps:
        raise errors.InvalidRequest(
            "every generation ended with its first token, so there is no decode step to record: "
            "raise --max-tokens, or give --ignore-eos"
        )
    return AccessTrace(
        name=name,
        topk_ids=np.stack([step.topk_ids for step in steps]),
        seq_offsets=np.cumsum([0, *(len(of_one) for _, of_one in kept)], dtype=np.int64),
        num_experts=steps[0].num_experts,
        topk_weights=np.stack([step.topk_weights for step in steps]),
        seq_names=tuple(name for name, _ in kept),
        router_scores=_scores(steps),
        sampling=sampling,
        said=_said([step.foretold for step in steps if step.foretold is not None]),
        truth=_truth([step.foretold for step in steps if step.foretold is not None]),
    )


def _scores(steps: Sequence[RecordedStep]) -> NDArray[np.float16] | None:
    """The router scores of all steps, [T, L, E]; None when none were recorded."""
    rows = [step.router_scores for step in steps if step.router_scores is not None]
    return np.stack(rows) if rows else None


def _said(steps: Sequence[Foretold]) -> dict[str, NDArray[np.float16]]:
    """[T, L, N, E] by predictor."""
    names = steps[0].scores if steps else ()
    return {name: np.stack([step.scores[name] for step in steps]) for name in names}


def _truth(steps: Sequence[Foretold]) -> NDArray[np.float16] | None:
    """[T, L, E]; None when none was recorded."""
    return np.stack([step.truth for step in steps]) if steps else None
