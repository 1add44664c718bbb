"""What one node's evidence says of every expert: recency, frequencies, gaps, gate weight, whether
it tends to follow the experts of the last step, and whether it came after past steps like this one.

Time is the node's own count of decode steps, never a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proto.access import DecodeAccess, PrefillAccess
from scheduler.learn.followers import Followers
from scheduler.learn.recall import Recall

Array = NDArray[np.float64]

MAX_AGE_STEPS = 1024  # older uses look alike
GAP_DECAY = 0.2  # weight of the newest gap
GATE_DECAY = 0.2  # weight of the newest gate weight
RARE = 1 / 1024  # a frequency below this looks like never
UNHEARD = 1 / 100  # a recalled share below this too: it is of some thirty steps


def feature_names(half_lives_tokens: Sequence[float]) -> tuple[str, ...]:
    frequencies = [f"log_frequency_{half_life:g}" for half_life in half_lives_tokens]
    return (
        "log_age",
        *frequencies,
        "log_gap_mean",
        "log_gap_std",
        "age_over_gap",
        "gate_weight",
        "log_follows",
        "log_recalled_next",
        "log_recalled_soon",
    )


class Features:
    """State of all experts, [L, E]. `update` and `update_prefill` change it, the others ask.

    recall: memories of past steps; the last one is written to
    """

    def __init__(
        self,
        shape: tuple[int, int],
        half_lives_tokens: Sequence[float],
        followers: Followers,
        recall: Recall,
    ) -> None:
        self.shape = shape
        self.names = feature_names(half_lives_tokens)
        self._followers = followers
        self._recall = recall
        self._newest: DecodeAccess | None = None
        self._table: Array | None = None  # until the state changes
        self.num_steps = 0
        self._keep = 0.5 ** (1 / np.asarray(half_lives_tokens, np.float64))  # [H]
        self._frequencies = np.zeros((len(self._keep), *shape))
        self._last_step = np.full(shape, -MAX_AGE_STEPS)
        self._gap_mean = np.full(shape, float(MAX_AGE_STEPS))
        self._gap_variance = np.zeros(shape)
        self._gate_weight = np.zeros(shape)
        self._sequence = ""
        self._chosen = np.zeros((shape[0], 0), np.intp)  # [L, K], of the last step
        self._follows = np.zeros(shape, np.float32)
        self._recalled = np.zeros((2, *shape))

    def used(self, event: DecodeAccess) -> NDArray[np.bool_]:
        """[L, E], which experts this step chose."""
        used = np.zeros(self._last_step.shape, np.bool_)
        np.put_along_axis(used, event.topk_ids.astype(np.intp), True, axis=1)
        return used

    def update(self, event: DecodeAccess) -> None:
        """One more decode step. Policies share this state: the same event again changes nothing."""
        if event is self._newest:
            return
        self._newest = event
        self._table = None
        self.num_steps += 1
        at = np.nonzero(self.used(event))
        self._update_frequencies(at)
        self._update_gaps(at)
        self._update_gate_weights(event)
        self._update_followers(event)
        self._recall.learn(self._chosen)
        self._recalled = self._recall.shares(self._chosen)
        self._last_step[at] = self.num_steps

    def update_prefill(self, event: PrefillAccess) -> None:
        """A prompt chunk counts for the frequencies as its tokens spread evenly; no step passes."""
        self._table = None
        keep = (self._keep ** max(1, event.num_tokens))[:, None, None]
        share = np.minimum(event.token_counts / max(1, event.num_tokens), 1.0)  # [L, E]
        self._frequencies *= keep
        self._frequencies += (1 - keep) * share

    def table(self) -> Array:
        """[N, L, E], the features of every expert in the order of `names`; read only."""
        if self._table is None:
            self._table = self._describe(())
            self._table.flags.writeable = False
        return self._table

    def rows(self, layers: NDArray[np.intp], experts: NDArray[np.intp]) -> Array:
        """[R, N], the features of the experts named by two parallel arrays."""
        return self._describe((layers, experts)).T

    def _update_frequencies(self, at: tuple[NDArray[np.intp], ...]) -> None:
        self._frequencies *= self._keep[:, None, None]
        layers, experts = at
        self._frequencies[:, layers, experts] += (1 - self._keep)[:, None]

    def _update_gaps(self, at: tuple[NDArray[np.intp], ...]) -> None:
        gap = np.minimum(self.num_steps - self._last_step[at], MAX_AGE_STEPS)
        first = self._gap_mean[at] >= MAX_AGE_STEPS
        off = np.where(first, 0.0, gap - self._gap_mean[at])
        self._gap_mean[at] = np.where(first, gap, self._gap_mean[at] + GAP_DECAY * off)
        self._gap_variance[at] = (1 - GAP_DECAY) * (self._gap_variance[at] + GAP_DECAY * off**2)

    def _update_gate_weights(self, event: DecodeAccess) -> None:
        at = (np.arange(len(event.topk_ids))[:, None], event.topk_ids.astype(np.intp))
        old = self._gate_weight[at]
        self._gate_weight[at] = old + GATE_DECAY * (event.topk_weights.astype(np.float64) - old)

    def _update_followers(self, event: DecodeAccess) -> None:
        """Learn who followed the last step's experts, then ask who follows those of this one."""
        if event.sequence == self._sequence:
            self._followers.learn(self._chosen, self.used(event))
        self._sequence, self._chosen = event.sequence, event.topk_ids.astype(np.intp)
        self._follows = self._followers.shares(self._chosen)

    def _describe(self, at: Any) -> Array:
        age = np.minimum(self.num_steps - self._last_step[at], MAX_AGE_STEPS)
        gap_mean = self._gap_mean[at]
        return np.stack(
            [
                np.log1p(age),
                *(np.log(frequency[at] + RARE) for frequency in self._frequencies),
                np.log1p(gap_mean),
                0.5 * np.log1p(self._gap_variance[at]),
                np.minimum(age / (1 + gap_mean), 4.0),
                self._gate_weight[at],
                np.log(self._follows[at] + np.float64(RARE)),
                *(np.log(recalled[at] + UNHEARD) for recalled in self._recalled),
            ]
        )
