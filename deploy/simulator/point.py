"""One figure of a simulator's table: a model on a number of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.plan.owners_map import Owned
from deploy.simulator.decoding import Decoding, Outcome
from deploy.simulator.geometry import Geometry
from deploy.simulator.routing import FITTED, matches
from deploy.simulator.setting import Setting
from scheduler.simulate.trace import AccessTrace, TraceInvalid

RECORDED, DRAWN = "recorded", "drawn"


@dataclass(frozen=True)
class Routing:
    """num_warmup: tokens that only fill memories; num_tokens: counted after them"""

    trace: AccessTrace
    name: str
    num_warmup: int
    num_tokens: int

    @classmethod
    def of(
        cls,
        recorded: AccessTrace | None,
        geometry: Geometry,
        num_warmup: int,
        num_tokens: int,
        seed: int,
    ) -> Routing:
        """As recorded where that may be of this model, else drawn. Raises TraceInvalid where the
        recording is too short.
        """
        num_steps = num_warmup + num_tokens
        if recorded is None or not matches(recorded, geometry):
            drawn = FITTED.draw(geometry.shape, geometry.top_k, num_steps, seed)
            return cls(drawn, DRAWN, num_warmup, num_tokens)
        if recorded.num_steps < num_steps:
            raise TraceInvalid(
                f"{recorded.name} has {recorded.num_steps} steps, not {num_steps}: give fewer "
                "--tokens or a smaller --warmup"
            )
        return cls(recorded, RECORDED, num_warmup, num_tokens)


@dataclass(frozen=True)
class Point:
    """routing: recorded or drawn; factor: of the workers' joules"""

    model: str
    routing: str
    num_boxes: int
    factor: float
    outcome: Outcome
    map: Sequence[Owned]

    @classmethod
    def of(cls, setting: Setting, routing: Routing, factor: float, seed: int) -> Point:
        """Simulate it. Raises MemoryExceeded where a box has too little memory."""
        decoding = Decoding(setting, seed)
        decoding.fill()
        if routing.num_warmup:
            decoding.decode(routing.trace.topk_ids[: routing.num_warmup])
        outcome = decoding.decode(
            routing.trace.topk_ids[routing.num_warmup :][: routing.num_tokens]
        )
        return cls(
            setting.geometry.name,
            routing.name,
            len(setting.boxes),
            factor,
            outcome,
            setting.map.boxes,
        )

    def as_document(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "routing": self.routing,
            "boxes": self.num_boxes,
            "joules_factor": self.factor,
            **vars(self.outcome),
            "map": [one.as_document() for one in self.map],
        }
