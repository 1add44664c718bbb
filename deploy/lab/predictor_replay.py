"""What recorded predictors would have foreseen of the misses of a cache: their recall and precision
by layers ahead.

A predictor names as many experts as a token uses, the best by its scores; it is judged by those of
them that are not resident. What it was lately wrong by is corrected as a node does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compute_node.predict.drift import corrected
from proto import errors
from scheduler.lab.policies import POLICIES, Background
from scheduler.simulate.replay import RankedCache, Setting
from scheduler.simulate.trace import AccessTrace, TraceInvalid

IN_TURN = "in turn"
"""The first predictor that knows a layer is asked, as a node does."""

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Foresight:
    """Of one predictor at one distance, of the layers that it said something about.

    is_corrected: what it was lately wrong by was added
    misses, named, right: experts that were not resident: used; named; both
    """

    predictor: str
    layers_ahead: int
    is_corrected: bool
    num_layers: int
    misses: int
    named: int
    right: int

    @property
    def recall(self) -> float:
        return self.right / self.misses if self.misses else 0.0

    @property
    def precision(self) -> float:
        return self.right / self.named if self.named else 0.0

    def as_document(self) -> dict[str, object]:
        return {**vars(self), "recall": self.recall, "precision": self.precision}


def check_has_predictions(trace: AccessTrace) -> None:
    """Raises TraceInvalid with the remedy."""
    if not trace.said or trace.truth is None:
        raise TraceInvalid(
            f"{trace.name} does not hold what predictors said: record it again with `flashmoe "
            "record --predictions`"
        )


def replay_predictors(
    setting: Setting,
    policy: str,
    background: Background,
) -> list[Foresight]:
    """background: what the policy learned before.

    Raises TraceInvalid for a trace without predictions, InvalidRequest for a policy that keeps no
    ranks.
    """
    trace = setting.trace
    check_has_predictions(trace)
    missed, absent = _missing(setting, policy, background)
    judge = _Judge(trace.top_k, missed, absent, setting.warmup_steps)
    return [
        found
        for is_corrected in (False, True)
        for name, scores in _scores(trace, is_corrected)
        for found in judge.judge(name, scores, is_corrected)
    ]


def _missing(setting: Setting, policy: str, background: Background) -> tuple[Mask, Mask]:
    """[T, L, E], what each step misses, and what it could have misses of: those, and what is not
    resident before it. In a pool a step evicts experts of its own later layers.
    """
    make = POLICIES.get(policy)
    if make is None:
        raise errors.InvalidRequest(f"--predict is under one policy, not {policy}: name one")
    cache = make(setting, background)
    if not isinstance(cache, RankedCache):
        raise errors.InvalidRequest(
            f"{policy} does not tell what is resident: give --policies decayed, or lru"
        )
    missed = np.zeros((setting.trace.num_steps, *setting.trace.shape), np.bool_)
    absent = np.empty_like(missed)
    for step, event in enumerate(setting.trace.events()):
        absent[step] = ~cache.resident
        hits = cache.step(event)
        np.put_along_axis(missed[step], event.topk_ids.astype(np.intp), ~hits, axis=1)
    return missed, absent | missed


def _scores(trace: AccessTrace, is_corrected: bool) -> Iterator[tuple[str, Floats]]:
    """[T, L, N, E] by predictor; NaN: it said nothing."""
    assert trace.truth is not None
    truth = trace.truth[:, :, None].astype(np.float32)
    every: dict[str, Floats] = {}
    for name, said in trace.said.items():
        scores = said.astype(np.float32)
        every[name] = corrected(scores, truth) if is_corrected else scores
        yield name, every[name]
    if len(every) > 1:
        yield IN_TURN, _in_turn(every)


def _in_turn(every: Mapping[str, Floats]) -> Floats:
    first, *others = every.values()
    asked = first.copy()
    for scores in others:
        asked = np.where(np.isnan(asked), scores, asked)
    return asked


@dataclass(frozen=True)
class _Judge:
    """missed, absent: [T, L, E], see `_missing`"""

    top_k: int
    missed: Mask
    absent: Mask
    warmup_steps: int

    def judge(self, name: str, scores: Floats, is_corrected: bool) -> Iterator[Foresight]:
        """A line for each distance. scores: [T, L, N, E]"""
        counted = slice(self.warmup_steps, None)
        for number in range(scores.shape[2]):
            said = scores[counted, :, number]
            knows = np.isfinite(said).all(axis=-1, keepdims=True)  # [T, L, 1]
            named = _best(said, self.top_k) & knows & self.absent[counted]
            misses = self.missed[counted] & knows
            yield Foresight(
                name,
                number + 1,
                is_corrected,
                int(knows.any(axis=0).sum()),
                int(misses.sum()),
                int(named.sum()),
                int((named & misses).sum()),
            )


def _best(scores: Floats, top_k: int) -> Mask:
    """[..., E], the `top_k` highest."""
    best = np.argpartition(-np.nan_to_num(scores, nan=-np.inf), top_k - 1, axis=-1)
    found = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(found, best[..., :top_k], True, axis=-1)
    return found
