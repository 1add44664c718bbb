"""What is awaited of a worker."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from compute_node.boxes.work import Work


@dataclass(eq=False)
class Answer:
    """Of a worker, to be waited for.

    is_direct: it comes over the direct socket, else over the stream
    took_s: once it has come; slow_s: longer is not worth it; given_up: it was late
    """

    number: int
    work: Work
    asked_s: float
    late_s: float
    slow_s: float
    is_direct: bool = False
    rows: Future[Tensor] = field(default_factory=Future)
    took_s: float = 0.0
    given_up: bool = False
