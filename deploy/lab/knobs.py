"""The knobs that `flashmoe tune` turns: rules of a route, each with the strengths that it tries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

Point = tuple[float, ...]
"""A strength for each knob, in their order; 0: the rule is left out."""


@dataclass(frozen=True)
class Knob:
    """A rule by its name in a route.

    coarse: strengths of the first round, the weaker first
    fine:   all that may be tried, ascending
    needs_variants: it does something only where the store holds small records of its experts, too
    """

    name: str
    coarse: tuple[float, float]
    fine: tuple[float, ...]
    needs_variants: bool = False

    def position(self, strength: float) -> float:
        """How far the knob is turned, from 0 to 1: by the place among its fine strengths, which lie
        where they make a difference.
        """
        places = (0.0, *self.fine)
        return places.index(strength) / len(self.fine)


KNOBS = (
    Knob("prior", (0.05, 0.1), (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)),
    Knob("substitute", (0.5, 0.9), (0.25, 0.5, 0.75, 0.9)),
    Knob("skip", (0.5, 0.75), (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)),
    Knob("precision", (0.99, 1.0), (0.5, 0.9, 0.99, 1.0), needs_variants=True),
)


def knobs_of(has_variants: bool) -> tuple[Knob, ...]:
    """The knobs that a store has, in the order in which their rules act."""
    return tuple(knob for knob in KNOBS if has_variants or not knob.needs_variants)


def route_of(knobs: tuple[Knob, ...], point: Point) -> str:
    """As `--route` takes it; empty where every knob is at 0."""
    turned = zip(knobs, point, strict=True)
    return " + ".join(f"{knob.name} {strength:g}" for knob, strength in turned if strength)


def coarse_points(knobs: tuple[Knob, ...]) -> Iterator[Point]:
    """Each knob alone at both of its coarse strengths, then every two together at the weaker; what
    acts last comes first, because small records, and then leaving out, cost least for what they
    bring.
    """
    last_first = range(len(knobs))[::-1]
    for number in last_first:
        for strength in knobs[number].coarse:
            yield _point(knobs, {number: strength})
    for pair in combinations(last_first, 2):
        yield _point(knobs, {number: knobs[number].coarse[0] for number in pair})


def fine_points(knobs: tuple[Knob, ...]) -> Iterator[Point]:
    """Every combination of fine strengths but exact."""
    for point in product(*((0.0, *knob.fine) for knob in knobs)):
        if any(point):
            yield point


def _point(knobs: tuple[Knob, ...], turned: dict[int, float]) -> Point:
    return tuple(turned.get(number, 0.0) for number in range(len(knobs)))
