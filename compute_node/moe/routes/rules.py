"""Rules by name, and the route policy that they make."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from compute_node.moe.route import EXACT, Route, RoutePolicy
from compute_node.moe.routes.precision import Precision
from compute_node.moe.routes.prior import Prior
from compute_node.moe.routes.skip import Skip
from compute_node.moe.routes.substitute import Substitute
from compute_node.moe.routes.token import Rule, TokenChoice
from compute_node.moe.routes.weighing import Weighing, names_the_chosen
from proto import errors

RULES: dict[str, Callable[[float], Rule]] = {
    "substitute": Substitute,
    "prior": Prior,
    "skip": Skip,
}
PRECISION_NAME = "precision"
EXACT_NAME = "exact"


@dataclass(frozen=True)
class _AllBut:
    """Every expert is resident but one."""

    missing: int

    def __contains__(self, expert: object) -> bool:
        return expert != self.missing


@dataclass(frozen=True)
class RuledRoute:
    """A `RoutePolicy`: each rule sees what the one before it chose, precision what all of them
    chose. A token that no rule changes keeps its route bit for bit; so does one whose router is not
    recognised yet, or chose others than the best by score.

    Of several tokens, what one of them is sure to need counts as resident for all, since it is read
    anyway (SMoE's reuse, arXiv 2508.18983): an expert is sure that the rules would keep if all
    others were resident. So the order of tokens does not matter, and nothing counts that no token
    uses.
    """

    rules: Sequence[Rule]
    precision: Precision | None = None

    @property
    def needs_scores(self) -> bool:
        return bool(self.rules)

    @property
    def needs_small(self) -> bool:
        return self.precision is not None

    def apply(self, route: Route, resident: Container[int]) -> Route:
        ruled = self._ruled(route, resident)
        if self.precision is None:
            return ruled
        rows = zip(ruled.ids.tolist(), ruled.weights.tolist(), strict=True)
        return replace(ruled, small=tuple(self.precision.small(*row) for row in rows))

    def _ruled(self, route: Route, resident: Container[int]) -> Route:
        """No rule changes a token whose experts are all resident."""
        rows = route.ids.tolist()
        missing = [n for n, row in enumerate(rows) if any(e not in resident for e in row)]
        if not (self.rules and missing) or route.scores is None or route.weighing is None:
            return route
        ids, weights = route.ids.clone(), route.weights.clone()
        gates, logits = route.weighing.gates(route.scores), route.weighing.logits(route.scores)
        tokens = {
            row: TokenChoice(rows[row], gates[row].tolist(), logits[row].tolist())
            for row in missing
            if names_the_chosen(route.scores[row], rows[row])
        }
        if len(rows) > 1:
            unruled = [rows[row] for row in missing if row not in tokens]
            resident = self._with_sure(tokens.values(), unruled, resident, gates.shape[1])
        for row, token in tokens.items():
            found = self._choose(token, resident)
            if found != rows[row]:
                self._put(row, found, route.weighing, gates[row], ids, weights)
        return replace(route, ids=ids, weights=weights)

    def _with_sure(
        self,
        tokens: Iterable[TokenChoice],
        unruled: Iterable[Sequence[int]],
        resident: Container[int],
        num_experts: int,
    ) -> set[int]:
        """Residents, and what is read whatever they are. unruled: of tokens that no rule changes"""
        found = {expert for expert in range(num_experts) if expert in resident}
        found.update(expert for chosen in unruled for expert in chosen)
        for token in tokens:
            for expert in token.chosen:
                if expert not in found and expert in self._choose(token, _AllBut(expert)):
                    found.add(expert)
        return found

    def _choose(self, token: TokenChoice, resident: Container[int]) -> list[int]:
        for rule in self.rules:
            found = rule.choose(token, resident)
            if set(found) != set(token.chosen):
                token = replace(token, chosen=found)
        return list(token.chosen)

    def _put(
        self,
        row: int,
        chosen: list[int],
        weighing: Weighing,
        gates: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Places beyond the chosen get transformers' mark for no expert, and no weight."""
        ids[row], weights[row] = len(gates), 0
        ids[row, : len(chosen)] = torch.tensor(chosen)
        weights[row, : len(chosen)] = weighing.weigh(gates[chosen]).to(weights.dtype)


def policy_of(text: str) -> RoutePolicy:
    """Of rules joined by +, each with its number: "prior .05 + skip .5". Empty or "exact": the
    router's choice.

    Raises InvalidRequest naming what can be said.
    """
    if text.strip() in ("", EXACT_NAME):
        return EXACT
    parts = [_part_of(part.split()) for part in text.split("+")]
    precision = None
    if parts[-1][0] == PRECISION_NAME:
        precision = Precision(parts.pop()[1])
    return RuledRoute([_rule_of(*part) for part in parts], precision)


def _part_of(words: list[str]) -> tuple[str, float]:
    try:
        name, number = words
        strength = float(number)
        if name not in (*RULES, PRECISION_NAME) or not 0 <= strength <= 1:
            raise ValueError
        return name, strength
    except ValueError:
        raise errors.InvalidRequest(
            f"route {' '.join(words)!r} is no rule: say {EXACT_NAME}, or "
            f"{', '.join(RULES)} or {PRECISION_NAME} with a number from 0 to 1, joined by + "
            "(prior .05 + skip .5)"
        ) from None


def _rule_of(name: str, strength: float) -> Rule:
    if name == PRECISION_NAME:
        raise errors.InvalidRequest(
            f"{PRECISION_NAME} goes by what other rules chose: say it last, and once"
        )
    return RULES[name](strength)
