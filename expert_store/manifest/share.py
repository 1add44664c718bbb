"""A share of a model: the part of its experts that one of several boxes has on its disk."""

from __future__ import annotations

from dataclasses import dataclass

from proto import errors
from proto.expert import ExpertKey, ModelSpec


@dataclass(frozen=True, slots=True)
class Share:
    """Number `owner` of `owners`, counted from 1. copies: of how many shares each expert is in

    Prints as "share 1 of 3".
    """

    owner: int
    owners: int
    copies: int = 1

    def __str__(self) -> str:
        return f"share {self.owner} of {self.owners}"

    @classmethod
    def parse(cls, text: str, copies: int, what: str = "--owner") -> Share:
        """`1/3`. what: names the text in what is refused. Raises ConfigInvalid."""
        owner, _, owners = text.partition("/")
        if not (owner.isdecimal() and owners.isdecimal() and 1 <= int(owner) <= int(owners)):
            raise errors.ConfigInvalid(
                f"{what} {text!r} names no share: write for example 1/3, the first of three"
            )
        share = cls(int(owner), int(owners), copies)
        if not 1 <= copies <= share.owners:
            raise errors.ConfigInvalid(
                f"{copies} copies of {share.owners} shares: give 1 to {share.owners}"
            )
        return share

    def experts(self, spec: ModelSpec) -> frozenset[ExpertKey]:
        """Its part of each layer, and what every share has. The owner that comes first in a layer
        is another in the next, so that shares come out even over the model.

        This is part of the manifest's format: shares made apart have all experts between them.
        Raises ManifestInvalid for more shares than a layer has experts.
        """
        if not 1 <= self.owner <= self.owners or not 1 <= self.copies <= self.owners:
            raise errors.ManifestInvalid(f"{self} with {self.copies} copies is no share")
        if self.owners > spec.num_experts:
            raise errors.ManifestInvalid(
                f"{self.owners} shares of {spec.num_experts} experts a layer: make at most "
                f"{spec.num_experts}"
            )
        found = {
            ExpertKey(layer, expert)
            for place, layer in enumerate(spec.moe_layers)
            for expert in range(spec.num_experts)
            if (self.owner - 1 - self._first(place, expert, spec)) % self.owners < self.copies
        }
        return frozenset(found.union(spec.probe_keys))

    def _first(self, place: int, expert: int, spec: ModelSpec) -> int:
        """Of its owners the first, counted from 0. place: of the layer among those with experts"""
        return (expert * self.owners // spec.num_experts + place) % self.owners
