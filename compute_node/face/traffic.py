"""What requests come to, as their callers see it: counted where tokens leave for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from proto import errors
from proto.histogram import Histogram
from proto.stats import counter, gauge, histogram

_TOKEN_S = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.5, 5.0),
)
_WAIT_S = (0.001, 0.005, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class Traffic:
    """Since start. The event loop's thread counts.

    num_open: requests for text that are not over; they wait or run
    """

    requests: int = counter("flashmoe_node_requests", "Requests that were valid")
    num_refused: int = counter(
        "flashmoe_node_refused_requests", "Requests that found the queue full", key="refused"
    )
    num_failed: int = counter(
        "flashmoe_node_failed_requests", "Requests that ended with another error", key="failed"
    )
    num_open: int = gauge(
        "flashmoe_node_open_requests", "Requests for text that wait or run", key="open", start=0
    )
    prompt_tokens: int = counter("flashmoe_node_prompt_tokens", "Tokens of prompts answered")
    generated_tokens: int = counter("flashmoe_node_generated_tokens", "Tokens of answers")
    first_token_s: Histogram = histogram(
        "flashmoe_node_first_token_seconds", "From a request to its first token", _WAIT_S
    )
    between_tokens_s: Histogram = histogram(
        "flashmoe_node_inter_token_seconds", "From one token of an answer to the next", _TOKEN_S
    )
    queued_s: Histogram = histogram(
        "flashmoe_node_queue_seconds", "Requests waited before they were computed", _WAIT_S
    )

    @contextmanager
    def request(self) -> Iterator[Answer]:
        """One for text, for the block."""
        self.num_open += 1
        try:
            yield Answer(self, time.perf_counter())
        except errors.QueueFull:
            self.num_refused += 1
            raise
        except errors.FlashMoEError as error:
            self.num_failed += not isinstance(error, errors.Cancelled)
            raise
        finally:
            self.num_open -= 1


@dataclass
class Answer:
    """start_s, latest_s: when the request and its latest token came, by the performance counter"""

    traffic: Traffic
    start_s: float
    latest_s: float | None = None

    def token(self, queued_s: float, prompt_tokens: int) -> None:
        """One more leaves. The others: of the request."""
        now_s, traffic = time.perf_counter(), self.traffic
        if self.latest_s is None:
            traffic.first_token_s.observe(now_s - self.start_s)
            traffic.queued_s.observe(queued_s)
            traffic.prompt_tokens += prompt_tokens
        else:
            traffic.between_tokens_s.observe(now_s - self.latest_s)
        traffic.generated_tokens += 1
        self.latest_s = now_s
