"""How far ahead a node guesses, and by which predictors."""

from __future__ import annotations

from dataclasses import dataclass

from compute_node.cache.expert_cache import ExpertCache
from compute_node.moe.router_watch import RouterWatch
from compute_node.predict.mapped_routers import MappedRouters
from compute_node.predict.predictor import Predictor
from compute_node.predict.prefetcher import Prefetcher
from compute_node.predict.router_map import RouterMap
from proto.expert import ExpertKey, ModelSpec


@dataclass(frozen=True)
class Lookahead:
    """How far ahead experts are guessed, and how many guesses the store has room for.

    piece_bytes: the longest read: what a demand may wait for behind a wrong guess
    router_map:  what was learned about the routers; None: nothing
    """

    max_depth: int = 0
    max_guesses: int = 0
    piece_bytes: int = 0
    router_map: RouterMap | None = None


NO_LOOKAHEAD = Lookahead()


@dataclass(frozen=True)
class _Near:
    """What need not be read ahead."""

    cache: ExpertCache

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self.cache or key in self.cache.elsewhere


def new_prefetcher(
    spec: ModelSpec, cache: ExpertCache, routers: RouterWatch, lookahead: Lookahead
) -> Prefetcher:
    """Asks a trained map first, where there is one."""
    expert_bytes = max(spec.expert_bytes(layer) for layer in spec.moe_layers)
    piece_share = min(1.0, lookahead.piece_bytes / expert_bytes)
    predictors: list[Predictor] = [routers.next_routers]
    if lookahead.router_map is not None:
        predictors.insert(0, MappedRouters(lookahead.router_map, routers.next_routers))
    return Prefetcher(
        layers=spec.moe_layers,
        predictors=predictors,
        truth=routers.next_routers.truth,
        top_k=spec.top_k,
        resident=_Near(cache),
        read_s=lambda: cache.waits.read_s,
        piece_s=lambda: cache.waits.read_s * piece_share,
        max_guesses=lookahead.max_guesses,
        max_depth=lookahead.max_depth,
    )
