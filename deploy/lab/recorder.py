"""Generates from one prompt after another and keeps what every decode step asked of the experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from compute_node.client.node_client import NodeClient
from compute_node.client.result import Generation, RecordedStep, Result
from deploy.terminal.prompts import Prompt
from proto import errors
from scheduler.simulate.trace import AccessTrace


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn. seed: of the first generation, the next has the next."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool
    prompt_tokens: int

    def as_text(self) -> str:
        """For a trace's `sampling`."""
        return json.dumps(asdict(self))


@dataclass
class Recorder:
    """Uses one thread; `cancel` may be called from another."""

    node: NodeClient
    drawing: Drawing
    router_scores: bool
    _current: Generation | None = None
    _cancelled: bool = False

    def run(
        self, prompts: Sequence[Prompt], done: Callable[[int, Prompt, Result], None]
    ) -> list[Result]:
        """A generation a prompt; `done` hears of each with its number.

        Raises Cancelled after `cancel`, and what the node ends a generation with.
        """
        results = []
        for number, prompt in enumerate(prompts):
            result = self._generate(number, prompt)
            done(number, prompt, result)
            results.append(result)
        return results

    def cancel(self) -> None:
        """End the generation at hand and begin no other."""
        self._cancelled = True
        if self._current is not None:
            self._current.cancel()

    def _generate(self, number: int, prompt: Prompt) -> Result:
        self._current = self.node.generate(
            prompt.text,
            max_tokens=self.drawing.max_tokens,
            temperature=self.drawing.temperature,
            top_p=self.drawing.top_p,
            seed=self.drawing.seed + number,
            ignore_eos=self.drawing.ignore_eos,
            max_prompt_tokens=self.drawing.prompt_tokens,
            record=True,
            router_scores=self.router_scores,
        )
        if self._cancelled:  # between two generations, when there was none to cancel
            self._current.cancel()
        return self._current.run()


def to_trace(
    name: str, prompts: Sequence[Prompt], results: Sequence[Result], sampling: str
) -> AccessTrace:
    """The decode steps of all generations; one that ended with its first token has none and is
    left out.

    Raises InvalidRequest when none has any.
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
    )


def _scores(steps: Sequence[RecordedStep]) -> NDArray[np.float16] | None:
    """[T, L, E], or None when they were not asked for."""
    rows = [step.router_scores for step in steps if step.router_scores is not None]
    return np.stack(rows) if rows else None
