"""Kinds, their status, and what a client makes of a failed call.

Planted faults seen red: KINDS of direct subclasses alone, the fallback by status removed, from_rpc
blind to metadata.
The journey over a real connection is in test_rpc.py.
"""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import errors
from proto.errors import (
    KIND_METADATA_KEY,
    KINDS,
    RETRY_AFTER_METADATA_KEY,
    FlashMoEError,
    from_kind,
    from_rpc,
)


class FailedCall(grpc.RpcError):
    """A failed call as gRPC hands it to a client."""

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str | None,
        kind: str | None,
        retry_after_s: str | None = None,
    ) -> None:
        self._code, self._details = code, details
        pairs = ((KIND_METADATA_KEY, kind), (RETRY_AFTER_METADATA_KEY, retry_after_s))
        self._metadata = tuple((k, v) for k, v in pairs if v is not None) or None

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...] | None:
        return self._metadata


def test_every_kind_is_known_by_its_name() -> None:
    """Red when grandchildren (UnknownExpert, ExpertDamaged) are left out."""
    ours = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, FlashMoEError)
    }
    assert ours == KINDS
    assert all(kind.__doc__ for kind in KINDS.values())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_is_recognised_whatever_its_status(kind: type[FlashMoEError]) -> None:
    found = from_rpc(FailedCall(grpc.StatusCode.UNKNOWN, "why", kind.__name__))
    assert (type(found), str(found)) == (kind, "why")
    assert type(from_kind(kind.__name__, "why")) is kind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.QueueFull),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.DATA_LOSS, errors.WeightsDamaged),
        (grpc.StatusCode.UNKNOWN, FlashMoEError),
    ],
)
@pytest.mark.parametrize("named", [None, "", "NoSuchKind", "object", "__class__"])
def test_without_a_known_name_the_status_decides(
    code: grpc.StatusCode, kind: type[FlashMoEError], named: str | None
) -> None:
    found = from_rpc(FailedCall(code, None, named))
    assert type(found) is kind
    assert code.name in str(found)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_name_in_a_stream_becomes_an_error(kind: str, message: str) -> None:
    assert isinstance(from_kind(kind, message), FlashMoEError)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_whose_fault_and_whether_to_retry_agree(kind: type[FlashMoEError]) -> None:
    """What is not there yet or full may be retried; a bad request or damaged disk may not."""
    if kind.status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        assert kind.retryable
    if kind.status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS):
        assert not kind.retryable
    assert kind.status is not grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("1.500", 1.5),
        ("0", 0.0),
        (None, None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("x", None),
    ],
)
def test_when_to_retry_is_read_back_if_it_is_a_duration(
    sent: str | None, expected: float | None
) -> None:
    error = from_rpc(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QueueFull", sent))
    assert (type(error), error.retry_after_s) == (errors.QueueFull, expected)
