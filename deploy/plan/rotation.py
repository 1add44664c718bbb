"""How fast a rotation decodes: groups of workers take layers in turn, and read what a shadow names
while others compute.

OD-MoE (arXiv 2512.03927, section 3): with enough groups no layer waits for its experts, because a
group has the time of all other groups' layers to read.
"""

from __future__ import annotations

from dataclasses import dataclass

_TOKENS = 6  # until each takes as long as the one before
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
        load_s = share * self.expert_bytes / self.disk_bytes_per_s
        num_buffers = max(1, self.slots // share)
        read_s = [0.0] * num_groups  # when each group's disks are free
        computed = [[0.0] * num_buffers for _ in range(num_groups)]  # its latest layers' ends
        now_s = began_s = before_s = 0.0
        for _ in range(_TOKENS):
            began_s, named_from_s = now_s, before_s if knows_next else now_s
            for layer in range(self.num_layers):
                group = layer % num_groups
                asked_s = now_s + self.dense_s
                named_s = min(asked_s, named_from_s + (layer + 1) * self.named_s)
                start_s = max(named_s, read_s[group], computed[group].pop(0))
                read_s[group] = start_s + load_s
                now_s = max(asked_s, read_s[group]) + self.link_s + share * self.expert_s
                computed[group].append(now_s)
            now_s += self.token_s
            before_s = began_s
        return now_s - began_s

    def mixed_s(self, num_groups: int, right_ratio: float, group_size: int = 1) -> float:
        """Of a token, on average. right_ratio: tokens that the shadow thought rightly come next"""
        known_s, unknown_s = (self.seconds(num_groups, group_size, one) for one in (True, False))
        return right_ratio * known_s + (1 - right_ratio) * unknown_s

    def enough(self, most: int = 64, knows_next: bool = True) -> int | None:
        """Groups of one worker with which no layer waits; None: `most` are too few."""
        for num_groups in range(1, most + 1):
            if self.seconds(num_groups, 1, knows_next) <= (1 + _FREE) * self.ideal_s():
                return num_groups
        return None

    def _share(self, group_size: int) -> int:
        """Experts of a layer that one worker reads and computes."""
        return -(-self.top_k // group_size)
