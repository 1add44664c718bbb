"""Which policy is in charge: the one configured, the one advised while advice is fresh, else the
fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from compute_node.cache.policies.decayed import Decayed
from compute_node.cache.policies.heard import Heard
from compute_node.cache.policies.importance import Gates, Importance
from compute_node.cache.policies.lfru import Lfru
from compute_node.cache.policies.lfu import Lfu
from compute_node.cache.policies.lru import Lru
from compute_node.cache.policies.policy import EvictionPolicy
from compute_node.cache.policies.scored import Scored
from proto.expert import ExpertKey
from proto.redis_schema import AUTO, FALLBACK_POLICY, IMPORTANCE_POLICY, Advice
from proto.stats import counter, fact

_EVICTIONS, _BY = "flashmoe_node_evictions_decided", "By whom evictions were decided"


class PolicyChooser:
    """Keeps the books of every local policy, so that a switch needs no warm-up.

    configured: a local policy's name; auto, advice decides; or the name of a policy that scores,
                and advice of that name is followed
    advice:     the latest fresh advice, or None
    heard:      corrects advice by what was used since; None, nothing was learned for it
    weighs:     importance is one of the local policies: it goes by gates, which cost to keep
    local:      the policies that a node ranks by itself, by name
    """

    name: str = fact("the policy in charge", key="policy")
    num_advised: int = counter(_EVICTIONS, _BY, key="advice_used", by="advice")
    num_fallbacks: int = counter(_EVICTIONS, _BY, key="advice_fallbacks", by="fallback")

    def __init__(
        self,
        configured: str,
        half_life_tokens: float,
        moe_layers: Sequence[int],
        num_experts: int,
        advice: Callable[[], Advice | None],
        heard: Heard | None = None,
        weighs: bool = False,
    ) -> None:
        self._heard = heard
        self._importance = Importance(half_life_tokens) if weighs else None
        self.local: dict[str, EvictionPolicy] = {
            "lru": Lru(),
            "lfu": Lfu(),
            "lfru": Lfru(),
            FALLBACK_POLICY: Decayed(half_life_tokens),
        }
        if self._importance is not None:
            self.local[IMPORTANCE_POLICY] = self._importance
        self._configured = configured
        self._rows = {layer: row for row, layer in enumerate(moe_layers)}
        self._shape = (len(moe_layers), num_experts)
        self._advice = advice
        self._follows_advice = configured not in self.local
        self.name = FALLBACK_POLICY if self._follows_advice else configured
        self._followed: Advice | None = None  # what `_scored` was made of
        self._scored: Scored | None = None

    @property
    def weighs(self) -> bool:
        return self._importance is not None

    def weigh(self, layer: int, gates: Gates) -> None:
        """[E], each expert's share of the gates in the step of `layer` that comes next. Where no
        policy goes by gates, nothing.
        """
        if self._importance is not None:
            self._importance.weigh(layer, gates)

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        for policy in self.local.values():
            policy.on_step(layer, used)
        if self._heard is not None and self._follows_advice:
            self._heard.on_step(self._rows[layer], used)
        if self._scored is not None:
            self._scored.on_step(layer, used)

    def choose(self) -> EvictionPolicy:
        """The policy for this eviction; counts whether advice or the fallback decided."""
        if not self._follows_advice:
            return self.local[self._configured]
        advice = self._advice()
        policy = self._advised(advice) if advice is not None else None
        if advice is None or policy is None:
            self.num_fallbacks += 1
            self.name = FALLBACK_POLICY
            return self.local[FALLBACK_POLICY]
        self.num_advised += 1
        self.name = advice.policy
        return policy

    def _advised(self, advice: Advice) -> EvictionPolicy | None:
        if self._configured not in (AUTO, advice.policy):
            return None
        if advice.scores is None:
            return self.local.get(advice.policy)
        if advice.scores.shape != self._shape:
            return None
        if advice is not self._followed:
            self._followed = advice
            self._scored = Scored(advice, advice.scores, self._rows, self._heard)
        return self._scored
