"""A shadow node's names of a main node's decode steps: held until the step is near, then read.

The emulative predictor of OD-MoE (arXiv 2512.03927, section 3): a small copy of the model computes
the same tokens, aligned with every token, and every few tokens with their keys and values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers.cache_utils import DynamicLayer

from compute_node.boxes.shadow_link import Name, ShadowLink, State
from compute_node.predict.drawing import Drawing
from compute_node.predict.named_reads import NamedReads
from compute_node.store.session import SessionLost
from proto.expert import ExpertKey
from proto.stats import counter, gauge

NAME = "shadow"
_USED, _HELP = "flashmoe_node_shadow_experts", "Experts of decode steps by whether a shadow named"


class _Place(NamedTuple):
    """position: of the token; place: of the layer among those with experts"""

    position: int
    place: int


@dataclass
class Shadowed:
    """Of one shadow. The compute thread's, but for `hear`. It may come while sequences are under
    way: with the next step of one it says all of its tokens.

    moe_layers:   in the order in which they run
    align_tokens: keys and values go to the shadow after as many; 0: never

    num_named:      experts that steps used and that were named before
    num_named_late: named once their layer was reached
    num_unnamed:    used and not named, early or late
    num_unheard:    used, when nothing was heard of their layer yet
    """

    moe_layers: Sequence[int]
    reads: NamedReads
    align_tokens: int = 1
    num_named: int = counter(_USED, _HELP, key="named", outcome="named")
    num_named_late: int = counter(_USED, _HELP, key="named_late", outcome="named_late")
    num_unnamed: int = counter(_USED, _HELP, key="unnamed", outcome="unnamed")
    num_unheard: int = counter(
        "flashmoe_node_shadow_unheard",
        "Experts that steps used before a shadow spoke",
        key="unheard",
    )
    link: ShadowLink = field(init=False)
    _names: dict[_Place, Name] = field(default_factory=dict)  # not read yet
    _read_names: dict[_Place, Name] = field(default_factory=dict)
    _prepared: set[_Place] = field(default_factory=set)  # boxes were
    _used: dict[_Place, Sequence[int]] = field(default_factory=dict)  # nothing was heard
    _sequence: str = ""
    _token_id: int = -1
    _now: _Place = field(default_factory=lambda: _Place(-1, -1))
    _num_aligned: dict[str, int] = field(default_factory=dict)  # tokens, by sequence

    def __post_init__(self) -> None:
        self._places = {layer: place for place, layer in enumerate(self.moe_layers)}
        self._lock = threading.Lock()

    @property
    @gauge(
        "flashmoe_node_shadow_recall",
        "Share of the experts of decode steps that the shadow named, early or late",
        key="recall",
    )
    def recall(self) -> float:
        named = self.num_named + self.num_named_late
        return named / (named + self.num_unnamed) if named else 0.0

    def hear(self, name: Name) -> None:
        """Any thread. A name of another sequence or token is forgotten; one that comes late is
        counted.
        """
        with self._lock:
            place = _Place(name.position, self._places[name.layer])
            if not self._may_come(name):
                return
            if place <= self._now:
                self._count_late(name, self._used.pop(place, ()))
                return
            self._names[place] = name
            if place.position == self._now.position:
                # Boxes hear at once; the cache is the compute thread's.
                self._prepared.add(place)
                self.reads.cache.elsewhere.prepare(name.layer, name.experts)

    def follow(
        self,
        sequence: str,
        token_ids: Sequence[int],
        state: Any,
        drawing: Callable[[], Drawing] | None = None,
    ) -> bool:
        """A decode step of the latest token begins. state: of those before; drawing: of the token
        after it. Returns whether the shadow is there.
        """
        position = len(token_ids) - 1
        with self._lock:
            self._sequence, self._token_id = sequence, token_ids[-1]
            self._now = _Place(position, -1)
            self._names = {place: n for place, n in self._names.items() if self._may_come(n)}
            self._read_names = {
                place: n for place, n in self._read_names.items() if self._may_come(n)
            }
            self._used.clear()
        if not self.link.is_up:
            return False
        if not self.link.num_heard(sequence):
            self._num_aligned.pop(sequence, None)
        states = self._states(sequence, state, position)
        next_one = drawing().to_pb() if drawing is not None else None
        self.link.follow(sequence, token_ids, states, next_one)
        self._read()
        return True

    def reached(self, layer: int, experts: Sequence[int]) -> None:
        """The step's router of `layer` chose these. Raises nothing."""
        with self._lock:
            now = self._now = _Place(self._now.position, self._places[layer])
            name = self._names.pop(now, None) or self._read_names.pop(now, None)
            if name is None:
                self.num_unheard += len(experts)
                self._used[now] = experts
            else:
                num_named = len(set(name.experts).intersection(experts))
                self.num_named += num_named
                self.num_unnamed += len(experts) - num_named
        self._read()

    def begin(self, sequence: str, token_ids: Sequence[int]) -> None:
        """A sequence begins. token_ids: its prompt, which the shadow computes while this node
        does
        """
        with self._lock:
            if not self._sequence:
                self._sequence = sequence
                self._now = _Place(len(token_ids) - 1, len(self.moe_layers))
        self.link.follow(sequence, token_ids)

    def end(self, sequence: str) -> None:
        """A sequence has ended, of which this shadow need not have heard the beginning."""
        with self._lock:
            if sequence == self._sequence:
                self._sequence = ""
                self._names.clear()
                self._read_names.clear()
        self._num_aligned.pop(sequence, None)
        self.link.forget(sequence)

    def _may_come(self, name: Name) -> bool:
        """Whether it may be of a step that comes, or of this one."""
        if name.sequence != self._sequence or name.position < self._now.position:
            return False
        return name.position > self._now.position or name.token_id == self._token_id

    def _count_late(self, name: Name, used: Sequence[int]) -> None:
        num_named = len(set(name.experts).intersection(used))
        self.num_named_late += num_named
        self.num_unnamed += len(used) - num_named

    def _read(self) -> None:
        """What is named of layers that come next, nearest first; a layer of the next token once
        this token is past it.
        """
        next_token = _Place(self._now.position + 1, self._now.place)
        with self._lock:
            near = sorted(place for place in self._names if self._now < place < next_token)
            names = {place: self._names.pop(place) for place in near}
            self._read_names |= names
            prepared = self._prepared.intersection(names)
            self._prepared.clear()
        for place, name in names.items():
            distance = place.place - self._now.place
            distance += (place.position - self._now.position) * len(self.moe_layers)
            chosen = [ExpertKey(name.layer, expert) for expert in name.experts]
            try:
                self.reads.read(name.layer, distance, chosen, prepares=place not in prepared)
            except SessionLost:
                return  # the step's next layer notices it, says so, and opens another

    def _states(self, sequence: str, state: Any, num_tokens: int) -> list[State]:
        """What the true pass made of the tokens since the last alignment."""
        start = self._num_aligned.get(sequence, 0)
        if not self.align_tokens or num_tokens - start < self.align_tokens:
            return []
        self._num_aligned[sequence] = num_tokens
        return [
            State(
                number,
                start,
                layer.keys[0, :, start:num_tokens],
                layer.values[0, :, start:num_tokens],
            )
            for number, layer in enumerate(getattr(state, "layers", ()))
            if type(layer) is DynamicLayer and layer.is_initialized
        ]
