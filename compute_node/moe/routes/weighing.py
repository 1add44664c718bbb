"""How a router makes gate weights of scores, so that an expert that it did not choose can be
weighed as it would have been.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from proto import errors

logger = logging.getLogger(__name__)

_ENOUGH_ROWS = 16
_MOST_ROWS = 64  # looked at where fewer leave two ways open, or show no scores
_TINY = 1e-30
_TOLERANCE = 0.03  # gate weights may be bf16

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "probabilities": lambda scores: scores,
    "softmax": lambda scores: scores.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Weighing:
    """kind: of what makes gates of scores

    total: what a token's weights sum to; None: a weight is its gate times `scale`
    """

    kind: str
    total: float | None
    scale: float

    def gates(self, scores: Tensor) -> Tensor:
        """What each expert's weight is proportional to. scores: [T, E]. Returns [T, E], float32."""
        return _GATES[self.kind](scores.float())

    def logits(self, scores: Tensor) -> Tensor:
        """What a router adds up before it is squeezed between 0 and 1. scores: [T, E]"""
        scores = scores.float()
        return scores.clamp_min(_TINY).log() if self.kind == "probabilities" else scores

    def weigh(self, gates: Tensor) -> Tensor:
        """Of the chosen. gates: [k]. Returns [k]."""
        if self.total is None:
            return gates * self.scale
        return gates * (self.total / gates.sum())


def recognise(scores: Tensor, ids: Tensor, weights: Tensor) -> list[Weighing]:
    """What several tokens leave open, at most two; both only where they all gave their chosen
    experts as large a share. Empty: the best by score are not what is chosen, or weights follow
    from scores in no way that is known.

    scores: [T, E]; ids, weights: [T, K]
    """
    scores, weights = scores.float(), weights.float()
    if not all(names_the_chosen(*row) for row in zip(scores, ids.tolist(), strict=True)):
        return []
    sums = weights.sum(dim=-1)
    has_total = bool(_spread(sums) < _TOLERANCE)
    for kind, gates_of in _GATES.items():
        if kind == "probabilities" and bool(((scores < 0) | (scores > 1)).any()):
            continue
        ratios = weights / gates_of(scores).gather(1, ids)  # [T, K]
        if bool((_spread(ratios.T) >= _TOLERANCE).any()):
            continue
        found = [Weighing(kind, float(sums.mean()), 1.0)] if has_total else []
        if _spread(ratios[:, 0]) < _TOLERANCE:
            found.append(Weighing(kind, None, float(ratios.mean())))
        if found:
            return found
    return []


def names_the_chosen(scores: Tensor, chosen: list[int]) -> bool:
    """Whether the chosen are distinct, and none that was not chosen has a higher score. bf16 scores
    often tie. scores: [E]
    """
    if max(chosen) >= len(scores) or len(set(chosen)) < len(chosen):
        return False
    others = scores.index_fill(0, torch.tensor(chosen), -torch.inf)
    return bool(scores[chosen].min() >= others.max())


def shares(
    weighing: Weighing | None,
    scores: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
) -> Tensor:
    """What each expert holds of its token's gates; of the chosen alone where it is not known how
    scores are weighed.

    scores: [T, E]; ids, weights: [T, K], ids from `num_experts` on are no experts
    Returns [T, E] float16.
    """
    if weighing is not None and scores is not None:
        gates = weighing.gates(scores)
    else:
        beyond = torch.zeros(len(ids), num_experts + 1)
        beyond.scatter_(1, ids.clamp_max(num_experts), weights.float().clamp_min(0))
        gates = beyond[:, :num_experts]
    return gates.div(gates.sum(dim=-1, keepdim=True).clamp_min(_TINY)).nan_to_num(0.0).half()


def _spread(values: Tensor) -> Tensor:
    """Of the first dimension, relative to its mean."""
    return (values.amax(dim=0) - values.amin(dim=0)) / values.mean(dim=0).abs().clamp_min(1e-30)


class WeighingWatch:
    """Of one layer: finds out how its router weighs from the first tokens that go through."""

    def __init__(self, layer: int) -> None:
        self.found: Weighing | None = None
        self._layer = layer
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_without_scores = 0
        self._is_unknown = False

    def look(self, scores: Tensor | None, ids: Tensor, weights: Tensor) -> Weighing | None:
        """What is known by now; None: more tokens are needed.

        scores: [T, E], None: the router is not recognised; ids, weights: [T, K]
        Raises CheckpointUnsupported when no more would help.
        """
        if self.found is not None:
            return self.found
        if scores is None:
            self._num_without_scores += len(ids)
            if self._num_without_scores >= _MOST_ROWS:
                raise self._unknown("its router's scores are not recognised")
            return None
        self._rows.append((scores, ids, weights))
        rows = [torch.cat(parts)[:_MOST_ROWS] for parts in zip(*self._rows, strict=True)]
        if len(rows[0]) < _ENOUGH_ROWS:
            return None
        found = recognise(rows[0], rows[1], rows[2])
        if not found:
            self._rows = []
            raise self._unknown("its gate weights follow from its scores in no way that is known")
        if len(found) == 1 or len(rows[0]) == _MOST_ROWS:
            self._rows, self.found = [], found[0]
        return self.found

    def glance(self, scores: Tensor | None, ids: Tensor, weights: Tensor) -> Weighing | None:
        """As `look`, for what can do without it: None, too, when no more tokens would help."""
        if self._is_unknown:
            return self.found
        try:
            return self.look(scores, ids, weights)
        except errors.CheckpointUnsupported as error:
            self._is_unknown = True
            logger.warning("gates of chosen experts alone are known", extra={"reason": str(error)})
            return None

    def _unknown(self, why: str) -> errors.CheckpointUnsupported:
        return errors.CheckpointUnsupported(
            f"layer {self._layer} can only be routed exactly ({why}): ask for route exact"
        )
