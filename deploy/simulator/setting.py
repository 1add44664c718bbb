"""What is simulated: a model, boxes, what joins them, and who owns which experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from compute_node.boxes.doubles import Doubles
from compute_node.boxes.owners import Owners, PlacementName
from deploy.plan.owners_map import Holder, OwnersMap, owners_of
from deploy.simulator.box import BoxSpec
from deploy.simulator.geometry import Geometry
from proto import errors

SHARES: PlacementName = "shares"
CHEAPEST: PlacementName = "cheapest"
ROTATION: PlacementName = "rotation"


@dataclass(frozen=True)
class Link:
    """Between the main box and others: it sends, and receives, one message after another.

    round_trip_s: of an empty message
    message_s: of work and its answer in programs, beside that
    serial_s:  of the main box's programs for each, one after another
    """

    round_trip_s: float
    bits_per_s: float
    message_s: float = 0.0
    serial_s: float = 0.0


@dataclass(frozen=True)
class Foresight:
    """Names of what later layers will use, which boxes read ahead.

    layers_ahead: from which they come, once that layer's router has spoken; 0: nothing is named
    recall:     of experts that would miss, that are named
    precision:  of experts that are named and would miss, that are used
    next_token: tokens that are foreseen, so that the first layers are named in the token before
    while_waiting: they come only while the main box waits for a read of its own, as run-ahead's do;
                else with each layer, as a shadow's
    Names of several layers come apart by the time of a layer's dense part.
    """

    layers_ahead: int = 0
    recall: float = 1.0
    precision: float = 1.0
    next_token: float = 0.0
    while_waiting: bool = False


@dataclass(frozen=True)
class Setting:
    """boxes: the main one first

    layer_s:    of a layer on the main box, beside the bytes of its dense part
    placement:  rotation is of `num_groups` groups; None: a box is a group
    processors: that all boxes share; None: each has its own
    """

    geometry: Geometry
    boxes: Sequence[BoxSpec]
    link: Link
    layer_s: float = 0.0
    foresight: Foresight = Foresight()
    placement: PlacementName = SHARES
    num_groups: int | None = None
    processors: int | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest; ConfigInvalid where some experts are in no box's share."""
        if not 0 < self.foresight.precision <= 1:
            raise errors.InvalidRequest("a precision is above 0 and at most 1")
        if not 0 <= self.foresight.layers_ahead < self.geometry.num_layers:
            raise errors.InvalidRequest(
                f"names cannot come {self.foresight.layers_ahead} layers ahead of "
                f"{self.geometry.num_layers}: give fewer"
            )
        if lacking := self.map.lacking:
            raise errors.ConfigInvalid(
                f"of {self.geometry.num_experts_total} experts {len(lacking)} are in the share of "
                f"none of {len(self.boxes)} boxes, the first is {lacking[0]}: give them other "
                "shares"
            )

    @cached_property
    def map(self) -> OwnersMap:
        """Who owns what."""
        return OwnersMap.of(
            self.geometry.model, self._holders, self.placement, self.num_groups or 0
        )

    def owners(self) -> Owners:
        """As the main node makes them."""
        return owners_of(self.geometry.model, self._holders, self.placement, self.num_groups or 0)

    def doubles(self) -> Doubles | None:
        """Second owners, as the main node makes them; None: every expert has one owner."""
        if self.placement == ROTATION:
            return None
        model, slots = self.geometry.model, [one.slots for one in self._holders]
        return Doubles(model.moe_layers, model.num_experts, self.owners(), slots)

    @cached_property
    def _holders(self) -> list[Holder]:
        expert_bytes, held = self.geometry.expert_bytes, self.geometry.held
        return [
            Holder(one.name, one.slots(expert_bytes), one.cost, held(one.share))
            for one in self.boxes
        ]
