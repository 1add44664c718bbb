"""How tokens are drawn, as a request says it."""

from __future__ import annotations

from dataclasses import dataclass

from proto import errors

MAX_UINT32, MAX_UINT64 = 2**32 - 1, 2**64 - 1  # what the wire's numbers hold


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy. top_k 0, top_p 0 or 1, repetition_penalty 0 or 1 are off. seed
    None: random.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the option."""
        if not 0 <= self.top_k <= MAX_UINT32:
            raise errors.InvalidRequest(f"top_k {self.top_k} is not within 0 and {MAX_UINT32}")
        if self.seed is not None and not 0 <= self.seed <= MAX_UINT64:
            raise errors.InvalidRequest(f"seed {self.seed} is not within 0 and {MAX_UINT64}")
        if self.temperature != 0.0 and not 0.001 <= self.temperature <= 100.0:
            raise errors.InvalidRequest(
                f"temperature {self.temperature} is neither 0 nor within 0.001 and 100"
            )
        if not 0.0 <= self.top_p <= 1.0:
            raise errors.InvalidRequest(f"top_p {self.top_p} is not within 0 and 1")
        if self.repetition_penalty != 0.0 and not 0.01 <= self.repetition_penalty <= 100.0:
            raise errors.InvalidRequest(
                f"repetition_penalty {self.repetition_penalty} is neither 0 nor within 0.01 and 100"
            )
