"""Decodes answers on several simulated boxes, step by step: who waits for what, and how long.

Experts go to the box that the node's own rules name (`deploy/simulator/assignment.py`), each box
keeps what a worker would keep, and a layer ends when its last owner has answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.simulator.assignment import Assignment
from deploy.simulator.box import Box, Processors, Work
from deploy.simulator.names import Name, Names
from deploy.simulator.setting import Setting
from deploy.simulator.wire import Wire
from proto.expert import ExpertKey

_PORTION = 16  # experts of a prompt's layer that are one step of a cache


@dataclass(frozen=True)
class Outcome:
    """Of the tokens counted. read_bytes, wire_bytes, joules: a token, of all boxes together"""

    tokens_per_s: float
    hit_ratio: float
    read_bytes: float
    wire_bytes: float
    joules: float


class Decoding:
    """One answer after another on the same boxes. Raises MemoryExceeded where a box has too little
    memory.
    """

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        geometry = setting.geometry
        self._setting, self._geometry, self._seed = setting, geometry, seed
        self.boxes = [Box.of(spec, geometry.expert_bytes, geometry.top_k) for spec in setting.boxes]
        main = setting.boxes[0]
        dense_s = geometry.dense_bytes / main.weights_bytes_per_s / geometry.num_layers
        self._dense_s = setting.layer_s + dense_s
        self._processors = Processors(setting.processors)
        self._wire = Wire(setting.link, geometry)
        self._assignment = Assignment(setting, self.boxes, self._wire)
        self._names: Names | None = None  # of the answer that is decoded
        self._now_s = 0.0

    def fill(self) -> None:
        """Let each box hold of what it owns as much as it can, before anything is measured."""
        owned: list[list[ExpertKey]] = [[] for _ in self.boxes]
        for expert in range(self._geometry.num_experts):
            for layer in range(self._geometry.num_layers):
                owned[self._assignment.owner(layer, expert)].append(ExpertKey(layer, expert))
        for number, (box, keys) in enumerate(zip(self.boxes, owned, strict=True)):
            box.cache.fill(keys)
            for layer in range(self._geometry.num_layers):
                self._assignment.hear(number, layer)

    def prompt(self, topk_ids: NDArray[np.uint16]) -> None:
        """[T, L, K]: a layer's experts are used once for all tokens, in portions."""
        for layer in range(self._geometry.num_layers):
            experts = np.unique(topk_ids[:, layer]).tolist()
            for start in range(0, len(experts), _PORTION):
                portion = experts[start : start + _PORTION]
                self._layer(self._route(), layer, self._assignment.by_owner(layer, portion))

    def decode(self, topk_ids: NDArray[np.uint16]) -> Outcome:
        """[T, L, K]: as many tokens. Returns what they took."""
        before, foresight = self._figures(), self._setting.foresight
        names = Names(
            topk_ids,
            self._geometry.num_experts,
            foresight,
            self._assignment.is_resident,
            self._seed,
        )
        self._names = names if foresight.while_waiting else None
        for ids in topk_ids:
            for layer, used in enumerate(ids.tolist()):
                if not foresight.while_waiting:
                    self._prepare_all(names)
                self._step(layer, sorted(used))
                names.pass_layer()
        took = [after - b for after, b in zip(self._figures(), before, strict=True)]
        return self._outcome(len(topk_ids), took)

    def _prepare_all(self, names: Names) -> None:
        """Once the present layer's router has spoken, a layer in the time of its dense part."""
        named_s = self._now_s + self._dense_s
        for name in names.take():
            self._prepare(name, named_s)
            named_s += self._dense_s

    def _run_ahead(self, waiting: Work) -> None:
        """While the main box waits for its own reads."""
        named_s, there_s = waiting.start_s + self._dense_s, max(waiting.there_s, default=0.0)
        names = self._names.take() if self._names is not None else iter(())
        while named_s < there_s and (name := next(names, None)) is not None:
            self._prepare(name, named_s)
            named_s += self._dense_s

    def _prepare(self, name: Name, named_s: float) -> None:
        self._assignment.prepare(named_s, name.layer, name.experts)

    def _step(self, layer: int, experts: Sequence[int]) -> None:
        asked_s = self._route()
        self._assignment.note(asked_s, layer, experts)
        self._layer(asked_s, layer, self._assignment.of_step(layer, experts))

    def _route(self) -> float:
        """When the present layer's router has spoken."""
        return self._processors.run(self.boxes[0], self._now_s, self._dense_s)

    def _layer(self, asked_s: float, layer: int, parts: Mapping[int, Sequence[int]]) -> None:
        works = [self._work(self.boxes[0], asked_s, layer, parts.get(0, ()))]
        others = [number for number in parts if number]
        for number in others:
            there_s = self._wire.work(asked_s)
            works.append(self._work(self.boxes[number], there_s, layer, parts[number]))
        self._run_ahead(works[0])
        self._processors.compute(works)
        answers = sorted((work.ends_s, len(work.there_s)) for work in works[1:])
        self._now_s = max([works[0].ends_s, *(self._wire.answer(*answer) for answer in answers)])
        for number in others:
            self._assignment.hear(number, layer)

    def _work(self, box: Box, start_s: float, layer: int, experts: Sequence[int]) -> Work:
        return Work(box, start_s, box.cache.step(start_s, layer, experts))

    def _figures(self) -> list[float]:
        return [
            self._now_s,
            sum(box.cache.num_hits for box in self.boxes),
            sum(box.cache.num_misses for box in self.boxes),
            sum(box.disk.num_reads for box in self.boxes),
            self._wire.num_bytes,
            sum(box.joules(self._now_s) for box in self.boxes),
        ]

    def _outcome(self, num_tokens: int, took: Sequence[float]) -> Outcome:
        wall_s, hits, misses, reads, wire_bytes, joules = took
        return Outcome(
            num_tokens / wall_s,
            hits / (hits + misses),
            reads * self._geometry.expert_bytes / num_tokens,
            wire_bytes / num_tokens,
            joules / num_tokens,
        )
