"""When a decode step that passes a layer looks ahead, and what it has seen by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from compute_node.moe.sums import Sum
from compute_node.predict.predictor import Seen
from compute_node.predict.prefetcher import Prefetcher
from proto.expert import ExpertKey


@dataclass
class Looks:
    """What is guessed while a decode step passes a layer: at once and, once something was computed
    and where the residual stream is known, again with what that adds to it. Where reads are waited
    for and something is computed meanwhile, only then: the device is busy until then.
    """

    prefetcher: Prefetcher
    seen: Seen
    sums: Sequence[Sum]
    waits: bool
    _is_first: bool = True

    def next(self) -> list[ExpertKey]:
        is_first, self._is_first = self._is_first, False
        if self.seen.stream is None:
            return self.prefetcher.guess(self.seen) if is_first else []
        if is_first:
            return [] if self.waits else self.prefetcher.guess(self.seen)
        if not self.prefetcher.is_worth_asking(self.seen.layer):
            return []
        outputs = [one.so_far() for one in self.sums]
        known = [output for output in outputs if output is not None]
        if len(known) < len(outputs):
            return self.prefetcher.guess(replace(self.seen, stream=None))
        output = known[0] if len(known) == 1 else torch.cat(known)
        return self.prefetcher.guess(replace(self.seen, output=output))
