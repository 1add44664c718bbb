"""What each expert is doing now, for people who watch.

Made when somebody asks, on the event loop's thread, from copies that the interpreter makes in one
step: the compute thread does nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from compute_node.cache.expert_cache import ExpertCache
from compute_node.engine.engine import Engine
from compute_node.predict.foresight import Foresight
from proto import compute_node_pb2 as pb
from proto.expert import ExpertKey


def heat_of(engine: Engine) -> pb.HeatReply:
    loaded = engine.loaded
    states = expert_states(engine.cache, loaded.prefetcher.foresight, loaded.spec.num_experts)
    return pb.HeatReply(
        layers=[pb.LayerHeat(layer=layer, states=bytes(row)) for layer, row in states.items()]
    )


def expert_states(
    cache: ExpertCache, foresight: Foresight, num_experts: int
) -> dict[int, bytearray]:
    """By layer, an ExpertState for each expert. A resident one shows only whether it is used; of
    others, being read counts more than being guessed.
    """
    room, layers = cache.room, cache.capacity.moe_layers
    states = {layer: bytearray(num_experts) for layer in layers}
    _mark(states, foresight.open(), pb.EXPERT_STATE_FORESEEN)
    for layer, row in states.items():
        for expert in room.residents.held_in(layer):
            row[expert] = pb.EXPERT_STATE_RESIDENT
    used = [key for layer in layers for key in room.used_in.get(layer, ())]
    held = (key for key in used if states[key.layer][key.expert] == pb.EXPERT_STATE_RESIDENT)
    _mark(states, held, pb.EXPERT_STATE_USED)
    under_way = (record.expert for record in list(room.under_way))
    _mark(states, under_way, pb.EXPERT_STATE_READ)
    return states


def _mark(states: dict[int, bytearray], keys: Iterable[ExpertKey], state: int) -> None:
    for key in keys:
        states[key.layer][key.expert] = state
