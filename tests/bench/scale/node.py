"""The product's own node in this process, its routers overruled by a recording.

transformers' gpt-oss model, loaded, cached and computed as compute_node does; only what a router
chose is replaced by what was recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from compute_node.cache.asked import exact
from compute_node.cache.capacity import Capacity
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.engine.engine import Engine
from compute_node.engine.sequence import SequenceState
from compute_node.engine.usage import Measure, Usage
from compute_node.kernels.prober import Prober
from compute_node.model.loaded import LoadedModel, load_model
from compute_node.moe.layer import RoutedExperts
from compute_node.moe.local import LocalBackend
from compute_node.moe.step import Phase, Step
from compute_node.predict.layer_timer import LayerTimer
from compute_node.store.borrow import StoreClient
from expert_store.manifest.manifest import Manifest
from proto.expert import ExpertKey, ModelSpec, RecordKey
from proto.redis_schema import Advice
from tests.bench.peers.cpu import CpuMoment
from tests.bench.scale.advice import Told
from tests.bench.scale.fresh import FreshExperts
from tests.bench.scale.segments import Segment, rows
from tests.fakes import FakeLender, make_capacity

HALF_LIFE_TOKENS = 16.0  # as compute_node's default, and the scheduler's shadow of it
CHUNK_TOKENS = 256
_MAX_TOKEN_ID = 8192  # rows of the embedding that are random: see random_store


class RecordedRouters:
    """Hooks that answer for every router: the experts and gate weights of the step at hand."""

    def __init__(self, routers: dict[int, Any], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._choice: dict[int, tuple[Tensor, Tensor]] = {}
        self._layers = list(routers)
        for layer, router in routers.items():
            router.register_forward_hook(self._answer(layer))

    def set(self, topk_ids: Any, topk_weights: Any) -> None:
        """[L, K] both, of the step that comes."""
        ids = torch.from_numpy(topk_ids.astype("int64"))
        weights = torch.from_numpy(topk_weights).to(self._dtype)
        for row, layer in enumerate(self._layers):
            self._choice[layer] = weights[row, None], ids[row, None]

    def _answer(self, layer: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def overrule(_: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            return output[0], *self._choice[layer]

        return overrule


class StartingWith(StoreClient):
    """A node's client whose cache begins with these experts, not with whatever the store has."""

    keys: Sequence[ExpertKey] = ()

    def resident(self) -> list[RecordKey]:
        return exact(self.keys)


@dataclass(frozen=True)
class Run:
    """One segment under one policy.

    steps:        cost of each counted step
    digests:      of its logits
    others_ratio: of all cores, what neither node nor store took meanwhile
    """

    steps: list[Usage]
    digests: list[int]
    others_ratio: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return len(self.steps) / sum(step.wall_s for step in self.steps)


class Node:
    """One model in memory, for many runs. step: the latest"""

    step: Step

    def __init__(self, store_dir: Path, manifest: Manifest) -> None:
        self.spec: ModelSpec = manifest.spec
        self._dir = store_dir
        self._manifest = manifest
        slots = self.spec.num_experts_total
        self._loaded: LoadedModel = load_model(
            store_dir,
            self.spec,
            ExpertCache(FakeLender(), self._capacity(slots), self._chooser("lru")),
            Prober(times=True),
        )
        routers = {
            layer: self._loaded.model.get_submodule(f"model.layers.{layer}.mlp.router")
            for layer in self.spec.moe_layers
        }
        self._routers = RecordedRouters(routers, self._loaded.dtype)

    def run(
        self,
        segment: Segment,
        policy: str,
        told: Told | None,
        slots: int,
        run_dir: Path,
        store_pid: int,
    ) -> Run:
        """The counted steps, in a session with the store in `run_dir`.

        policy: a local one, or the name of what is told
        """
        advice: list[Advice] = []
        chooser = self._chooser(policy, lambda: advice[-1] if advice else None)
        capacity = self._capacity(slots)

        def hear(step: int) -> None:
            if told is not None:
                advice[:] = [told.advice(step)]

        client = StartingWith(
            f"unix:{run_dir}/store.sock", "bench", slots, run_dir / "sessions", 30
        )
        try:
            client.keys = warmed(segment, capacity, chooser, hear)
            cache = ExpertCache(client, capacity, chooser)
            cache.open()
            self._hang(cache)
            before = CpuMoment.now([store_pid])
            result = self._decode(segment, cache, hear, segment.num_counted)
            others = CpuMoment.now([store_pid]).others_ratio(before, os.cpu_count() or 1)
        finally:
            client.close()
        assert not chooser.num_fallbacks, "a step went by without advice"
        return replace(result, others_ratio=others)

    def fresh(self, segment: Segment, num_steps: int) -> list[int]:
        """Digests of the first counted steps, every expert read alone from the file, ascending."""
        for layer, module in self._loaded.experts_modules.items():
            module.flashmoe = FreshExperts(
                layer, self._loaded.kernels[layer].exact, self._manifest, self._dir
            )
        lender = FakeLender(bytes_per_expert=self._manifest.slot_bytes)
        cache = ExpertCache(lender, self._capacity(self.spec.num_experts_total), self._chooser())
        return self._decode(segment, cache, lambda step: None, num_steps).digests

    def _capacity(self, slots: int) -> Capacity:
        expert_bytes = self._manifest.slot_bytes
        capacity_bytes = slots * expert_bytes
        return Capacity(
            capacity_bytes, expert_bytes, self.spec.moe_layers, self.spec.top_k, pooled=True
        )

    def _chooser(
        self, policy: str = "lru", advice: Callable[[], Advice | None] = lambda: None
    ) -> PolicyChooser:
        return PolicyChooser(
            policy, HALF_LIFE_TOKENS, self.spec.moe_layers, self.spec.num_experts, advice
        )

    def _hang(self, cache: ExpertCache) -> None:
        """Let the model borrow from this cache."""
        loaded, prefetcher = self._loaded, self._loaded.prefetcher
        prefetcher.resident = cache
        timer = LayerTimer(cache, prefetcher.computed)
        for layer, module in loaded.experts_modules.items():
            backend = LocalBackend(layer, cache, prefetcher, timer)
            module.flashmoe = RoutedExperts(layer, loaded.kernels[layer], backend)

    def _decode(
        self, segment: Segment, cache: ExpertCache, hear: Callable[[int], None], num_steps: int
    ) -> Run:
        """One sequence that begins where the warm-up ends; its tokens are drawn by number."""
        engine = Engine(self._loaded, cache, self._dir, num_steps, CHUNK_TOKENS)
        sequence, result = SequenceState("bench", []), Run([], [])
        for step, ids, weights in rows(segment):
            if not 0 <= step - segment.warmup_steps < num_steps:
                continue
            hear(step)
            self._routers.set(ids, weights)
            sequence.token_ids.append(7919 * (step + 1) % min(_MAX_TOKEN_ID, self._vocab_size))
            usage = Usage(tokens=1)
            with Measure(cache, usage):
                logits, self.step = engine.forward(sequence, sequence.token_ids[-1:], Phase.DECODE)
            result.steps.append(usage)
            result.digests.append(digest(logits))
        return result

    @property
    def _vocab_size(self) -> int:
        return int(self._loaded.model.config.vocab_size)


def warmed(
    segment: Segment, capacity: Capacity, chooser: PolicyChooser, hear: Callable[[int], None]
) -> list[ExpertKey]:
    """What a node would hold after the warm-up, and its policies' books in `chooser`: the cache
    itself goes through it, over a store that lends nothing.
    """
    as_many = make_capacity(capacity.slots, capacity.moe_layers, capacity.top_k, capacity.pooled)
    cache = ExpertCache(FakeLender(capacity.slots), as_many, chooser)
    cache.open()
    for step, ids, _ in rows(segment):
        if step == segment.warmup_steps:
            break
        hear(step)
        for layer, experts in zip(capacity.moe_layers, ids.tolist(), strict=True):
            for _wave in cache.step(layer, sorted(experts))[1]:
                pass
    num_experts = segment.trace.num_experts
    keys = [ExpertKey(layer, e) for layer in capacity.moe_layers for e in range(num_experts)]
    return [key for key in keys if key in cache]


def digest(logits: Tensor) -> int:
    """Of every bit."""
    return xxhash.xxh3_64_intdigest(logits.contiguous().view(torch.uint8).numpy().tobytes())
