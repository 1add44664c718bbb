"""How fast a rotation decodes: groups of workers take layers in turn, and read what a shadow names
while others compute.

OD-MoE (arXiv 2512.03927, section 3): with enough groups no layer waits for its experts, because a
group has the time of all other groups' layers to read.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

_TOKENS = 6  # until each takes as long as the one before
_TOKENS_WITH_HITS = 400  # which differ
_FREE = 0.02  # of a token's time, that waits may take where nothing is said to wait


@dataclass(frozen=True)
class Rotation:
    """num_layers: with experts; top_k: experts a token and layer; expert_bytes: of one

    disk_bytes_per_s: of each worker
    dense_s:      one layer's part on the main node
    expert_s:     one expert on a worker
    link_s:       a layer's work to a worker and back, without computing
    named_s:      a shadow's layer: names come so far apart
    token_s:      of a token outside of its layers
    slots:        of a worker, for what it reads ahead and what it computes with
    """

    num_layers: int
    top_k: int
    expert_bytes: float
    disk_bytes_per_s: float
    dense_s: float
    expert_s: float
    link_s: float
    named_s: float
    token_s: float
    slots: int

    def ideal_s(self, group_size: int = 1) -> float:
        """Of a token that waits for no disk."""
        layer_s = self.dense_s + self.link_s + self._share(group_size) * self.expert_s
        return self.token_s + self.num_layers * layer_s

    def seconds(self, num_groups: int, group_size: int = 1, knows_next: bool = False) -> float:
        """Of a token. knows_next: the shadow thought rightly which token comes, and has named its
        layers while the one before was computed; else names begin with the token.
        """
        share = self._share(group_size)
        ends_s = [*self._ends(num_groups, share, knows_next, repeat(share, self._layers(_TOKENS)))]
        return ends_s[-1] - ends_s[-2]

    def seconds_with_hits(self, num_groups: int, miss_ratio: float, knows_next: bool) -> float:
        """Of a token, on average, with groups of one worker whose memory has some of the experts.
        An expert is read whole or not at all, so that some layers wait where an even share of what
        is read would not. miss_ratio: of the experts computed, those that are read
        """
        dice = random.Random(0)
        misses = (
            sum(dice.random() < miss_ratio for _ in range(self.top_k))
            for _ in range(self._layers(_TOKENS_WITH_HITS))
        )
        ends_s = [*self._ends(num_groups, self.top_k, knows_next, misses)]
        return ends_s[-1] / _TOKENS_WITH_HITS

    def _ends(
        self, num_groups: int, share: int, knows_next: bool, num_read: Iterable[int]
    ) -> Iterator[float]:
        """When each token ends. num_read: of each layer, the experts that a worker reads"""
        num_buffers = max(1, self.slots // share)
        free_s = [0.0] * num_groups  # when each group's disks are free
        computed = [[0.0] * num_buffers for _ in range(num_groups)]  # its latest layers' ends
        now_s = before_s = began_s = 0.0
        for number, count in enumerate(num_read):
            layer = number % self.num_layers
            group = layer % num_groups
            asked_s = now_s + self.dense_s
            room_s = computed[group].pop(0)
            if count:
                named_from_s = before_s if knows_next else began_s
                named_s = min(asked_s, named_from_s + (layer + 1) * self.named_s)
                load_s = count * self.expert_bytes / self.disk_bytes_per_s
                free_s[group] = max(named_s, free_s[group], room_s) + load_s
                asked_s = max(asked_s, free_s[group])
            now_s = asked_s + self.link_s + share * self.expert_s
            computed[group].append(now_s)
            if layer == self.num_layers - 1:
                now_s += self.token_s
                before_s, began_s = began_s, now_s
                yield now_s

    def _layers(self, num_tokens: int) -> int:
        return num_tokens * self.num_layers

    def enough(self, most: int = 64, knows_next: bool = True) -> int | None:
        """Groups of one worker with which no layer waits; None: `most` are too few."""
        for num_groups in range(1, most + 1):
            if self.seconds(num_groups, 1, knows_next) <= (1 + _FREE) * self.ideal_s():
                return num_groups
        return None

    def _share(self, group_size: int) -> int:
        """Experts of a layer that one worker reads and computes."""
        return -(-self.top_k // group_size)
