"""Errors as HTTP has them: a status, and what OpenAI's clients read in the body."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from proto import errors

_FULL_RETRY_AFTER_S = 1.0  # when the node does not say


class Refused(errors.InvalidRequest):
    """A request that the gateway itself refuses.

    status: of HTTP; code, param: what OpenAI's clients read
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.http_status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Failure:
    """What a client hears of an error."""

    status: int
    kind: str
    code: str | None
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: errors.FlashMoEError) -> Failure:
        message = str(error)
        if isinstance(error, Refused):
            kind = _KINDS.get(error.http_status, "invalid_request_error")
            return cls(error.http_status, kind, error.code, message, error.param)
        for known, status, kind, code in _TABLE:
            if isinstance(error, known):
                return cls(status, kind, code, message, None, _retry_after_s(error))
        return cls(500, "server_error", "internal_error", message)

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}

    def document(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_document(self) -> dict[str, Any]:
        """In Anthropic's shape."""
        kind = _ANTHROPIC_KINDS.get(self.status, self.kind)
        return {"type": "error", "error": {"type": kind, "message": self.message}}


_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    503: "service_unavailable",
}
_TABLE: tuple[tuple[type[errors.FlashMoEError], int, str, str | None], ...] = (
    (errors.ContextExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (errors.InvalidRequest, 400, "invalid_request_error", None),
    (errors.QueueFull, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.Unavailable, 503, "service_unavailable", "unavailable"),
    (errors.DeadlineExceeded, 504, "timeout_error", "timeout"),
)


def _retry_after_s(error: errors.FlashMoEError) -> float | None:
    if isinstance(error, errors.QueueFull) and error.retry_after_s is None:
        return _FULL_RETRY_AFTER_S
    return error.retry_after_s
