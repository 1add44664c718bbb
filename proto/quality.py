"""What `flashmoe tune` measured of lossy routes on one store, as a file beside its manifest, and
what a quality budget buys of it. The tool writes the card; launcher and node read it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import xxhash
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from proto.errors import InvalidRequest, QualityCardInvalid

QUALITY_NAME = "quality.json"  # beside a store's manifest
EXACT_NAME = "exact"
FORMAT: Literal["flashmoe-quality-1"] = "flashmoe-quality-1"
MAX_BYTES = 4 * 1024 * 1024

Ratio = Annotated[float, Field(ge=0, le=1)]
_BUDGET = re.compile(r"(\d+\.?\d*|\.\d+)\s*%", re.ASCII)
_MAX_TEXT = 4096


@dataclass(frozen=True)
class Budget:
    """fraction: by how much perplexity may rise, 0.01 of "1%"; 0: not at all, everything exact"""

    fraction: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "1%", "0.5%" or "exact". Raises InvalidRequest."""
        if text.strip() == EXACT_NAME:
            return cls(0.0)
        found = _BUDGET.fullmatch(text.strip())
        fraction = float(found[1]) / 100 if found else 0.0
        if not 0 < fraction <= 1:
            raise InvalidRequest(
                f"quality {text!r} is no budget: say {EXACT_NAME}, or by how much perplexity may "
                "rise, as 1% or 0.5%, above 0 and at most 100%"
            )
        return cls(fraction)

    def __str__(self) -> str:
        percent = f"{100 * self.fraction:.8f}".rstrip("0").rstrip(".")
        return f"{percent}%" if self.fraction else EXACT_NAME

    @property
    def rounded_up(self) -> Budget:
        """To what a user can say: two digits, none of them below a hundredth of a percent."""
        if not self.fraction:
            return self
        step = 10.0 ** max(-4, math.floor(math.log10(self.fraction)) - 1)
        return Budget(round(math.ceil(self.fraction / step) * step, 9))

    @property
    def kl_limit(self) -> float:
        """Nats a token: a text that is drawn from the exact model pays just that in perplexity."""
        return math.log1p(self.fraction)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Setting(_Document):
    """What one route costs and brings, measured token by token.

    route:           rules joined by +, "" the router's own choice
    perplexity:      over the exact one; low and high are two standard errors away
    worst_text:      the same of the text that suffers most
    kl:              mean nats a token of exact logits against lossy ones, on the same prefix and
                     state; None: the model's state cannot be forked to compute it
    top1:            share of tokens whose likeliest successor is the exact model's
    bytes_ratio:     read from the disk, over exact
    bytes_per_token: read from the disk
    """

    route: Annotated[str, Field(max_length=_MAX_TEXT)]
    perplexity: PositiveFloat
    perplexity_low: PositiveFloat
    perplexity_high: PositiveFloat
    worst_text: PositiveFloat
    kl: NonNegativeFloat | None
    top1: Ratio | None
    bytes_ratio: NonNegativeFloat
    bytes_per_token: NonNegativeFloat
    tokens_per_s: PositiveFloat
    token_ms_p50: NonNegativeFloat
    token_ms_p95: NonNegativeFloat

    @property
    def is_exact(self) -> bool:
        return not self.route

    @property
    def token_ms(self) -> float:
        """The mean time a token."""
        return 1000 / self.tokens_per_s

    @property
    def loss(self) -> float:
        """By which settings are ordered: KL, which has a smaller error than perplexity, where it is
        known.
        """
        return max(0.0, self.perplexity_high - 1) if self.kl is None else self.kl

    @property
    def least_budget(self) -> Budget:
        """The smallest one that this setting is within."""
        if self.is_exact:
            return Budget(0.0)
        return Budget(max(0.0, self.perplexity_high - 1, math.expm1(self.kl or 0.0)))

    def is_within(self, budget: Budget) -> bool:
        """Whether perplexity, its error included, and KL keep to the budget."""
        if self.is_exact:
            return True
        kept = self.perplexity_high <= 1 + budget.fraction
        return kept and (self.kl is None or self.kl <= budget.kl_limit)


class QualityCard(_Document):
    """Of one store, under one cache.

    fingerprint:   of the store
    experts_bytes: memory for experts in which it was measured
    texts:         what was scored, by name
    num_tokens:    of these texts, scored for each setting
    num_checked:   of these, those on which KL and top 1 were measured
    settings:      all that were measured, the losers too; one of them is exact
    """

    format: Literal["flashmoe-quality-1"] = FORMAT
    fingerprint: Annotated[str, Field(max_length=_MAX_TEXT)]
    experts_bytes: PositiveInt
    texts: Annotated[str, Field(max_length=_MAX_TEXT)]
    num_texts: PositiveInt
    num_tokens: PositiveInt
    num_checked: NonNegativeInt = 0
    settings: tuple[Setting, ...]

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        routes = [setting.route for setting in self.settings]
        if routes.count("") != 1 or len(set(routes)) < len(routes):
            raise ValueError("one setting is exact, and no route stands twice")
        if len({setting.kl is None for setting in self.settings if not setting.is_exact}) > 1:
            raise ValueError("KL is known of all settings or of none")
        return self

    @property
    def exact(self) -> Setting:
        return next(setting for setting in self.settings if setting.is_exact)

    @cached_property
    def frontier(self) -> tuple[Setting, ...]:
        """Exact first, then settings each faster and lossier than the one before: no other is at
        once as fast and as true.
        """
        return _frontier(self.exact, self.settings)

    def ladder(self, budget: Budget) -> tuple[Setting, ...]:
        """Exact first, then what the budget allows, each faster and lossier than the one before.
        The last is what the budget buys.
        """
        return _frontier(self.exact, [one for one in self.settings if one.is_within(budget)])

    def write(self, path: Path) -> None:
        """Raises OSError."""
        body = self.model_dump(mode="json")
        path.write_text(json.dumps(body | {"checksum": _checksum(body)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Self:
        """For the store of this fingerprint.

        Raises QualityCardInvalid saying what is wrong and the remedy; FileNotFoundError.
        """
        if (size := path.stat().st_size) > MAX_BYTES:
            raise QualityCardInvalid.of(path, f"has {size:,} bytes, more than {MAX_BYTES:,}")
        try:
            body = json.loads(path.read_text())
            found = body.get("format")
        except (ValueError, AttributeError, RecursionError) as error:
            raise QualityCardInvalid.of(path, f"is no quality card ({error})") from error
        if found != FORMAT:
            raise QualityCardInvalid.of(path, f"has the format {found!r}, not {FORMAT}")
        if body.pop("checksum", None) != _checksum(body):
            raise QualityCardInvalid.of(path, "was changed after it was written")
        try:
            card = cls.model_validate_json(json.dumps(body))  # strict, yet tuples may be lists
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "settings"
            raise QualityCardInvalid.of(path, f"is damaged ({where}: {fault['msg']})") from error
        if card.fingerprint != fingerprint:
            raise QualityCardInvalid.of(path, "was measured on another model or an earlier index")
        return card


def _frontier(exact: Setting, settings: list[Setting] | tuple[Setting, ...]) -> tuple[Setting, ...]:
    rungs: list[Setting] = []
    for setting in sorted(settings, key=lambda one: (-one.tokens_per_s, one.loss)):
        if setting.tokens_per_s > exact.tokens_per_s and (
            not rungs or setting.loss < rungs[-1].loss
        ):
            rungs.append(setting)
    return (exact, *reversed(rungs))


def _checksum(body: object) -> str:
    return xxhash.xxh3_64(json.dumps(body, sort_keys=True).encode()).hexdigest()
