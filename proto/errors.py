"""Error kinds, and the one table between them and gRPC status.

A kind says whose fault it is (its status) and whether the same call may succeed later (retryable).
It crosses the wire as a status plus its class name in trailing metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import grpc
from pydantic import ValidationError

KIND_METADATA_KEY = "flashmoe-error"
RETRY_AFTER_METADATA_KEY = "flashmoe-retry-after-s"
_MAX_DETAILS_BYTES = 2048  # gRPC escapes and then drops trailers beyond 8 KiB, kind and all


class FlashMoEError(Exception):
    """Something went wrong that only a defect of ours explains.

    retry_after_s: how long a caller should wait before it tries again; None: nothing is known
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, *args: object, retry_after_s: float | None = None) -> None:
        super().__init__(*args)
        self.retry_after_s = retry_after_s


class InvalidRequest(FlashMoEError):
    """The caller asked for something that can never be answered."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class ContextExceeded(InvalidRequest):
    """Prompt and answer are longer than the context that memory was planned for."""


class ChatRefused(InvalidRequest):
    """The model's chat template does not take these messages."""


class GrammarRefused(InvalidRequest):
    """An answer cannot be held to this grammar exactly, or not by this model's tokenizer."""


class UnknownExpert(InvalidRequest):
    """No such (layer, expert) in this model."""


class ExpertElsewhere(UnknownExpert):
    """The model has the expert, and this store, which is a share of it, does not."""


class ConfigInvalid(FlashMoEError):
    """A setting is missing, mistyped or contradicts another."""

    status = grpc.StatusCode.FAILED_PRECONDITION

    @classmethod
    def of(
        cls, where: str, error: ValidationError, example: str = "deploy/flashmoe.toml"
    ) -> ConfigInvalid:
        """One sentence that names each wrong key and what to do. example: a file with all keys"""
        return cls(f"{where}: " + "; ".join(_describe(fault, example) for fault in error.errors()))


def _describe(fault: Any, example: str) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if not key:  # what contradicts itself
        return str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}: remove it, or see {example} for its spelling"
    if fault["type"] == "missing":
        return f"key {key!r} is missing: add it"
    return f"key {key!r} is {fault['input']!r} ({fault['msg']}): change it"


class CheckpointUnsupported(FlashMoEError):
    """This checkpoint or architecture cannot be served; the message names what is in the way."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class ManifestInvalid(FlashMoEError):
    """The manifest, or a file it names, is not what it should be."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class SourceChanged(ManifestInvalid):
    """A file changed after it was indexed."""


class ForecasterInvalid(FlashMoEError):
    """A forecaster file is damaged, of another format, or of another model."""

    status = grpc.StatusCode.FAILED_PRECONDITION

    @classmethod
    def of(cls, path: Path, what: str) -> ForecasterInvalid:
        return cls(f"{path} {what}: run `flashmoe calibrate` again, or remove it")


class RouterMapInvalid(FlashMoEError):
    """A router map is damaged, of another format, or of another model."""

    status = grpc.StatusCode.FAILED_PRECONDITION

    @classmethod
    def of(cls, path: Path, what: str) -> RouterMapInvalid:
        return cls(f"{path} {what}: run `flashmoe calibrate` again, or remove it")


class QualityCardInvalid(FlashMoEError):
    """A quality card was changed, is of another format, or of another model."""

    status = grpc.StatusCode.FAILED_PRECONDITION

    @classmethod
    def of(cls, path: Path, what: str) -> QualityCardInvalid:
        return cls(f"{path} {what}: run `flashmoe tune` again, or remove it")


class SegmentInvalid(FlashMoEError):
    """The shared-memory file is not a segment of ours, or of another version."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class VersionMismatch(FlashMoEError):
    """The two ends speak different protocol versions or serve different models."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class OtherBits(FlashMoEError):
    """Another box's processor gives other numbers than the main node's."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class MemoryExceeded(FlashMoEError):
    """The ceiling cannot be kept."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class AlreadyRunning(FlashMoEError):
    """Another daemon holds this socket or run directory."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class StartFailed(FlashMoEError):
    """A daemon cannot start, and could not if it tried again."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class SlotsExhausted(FlashMoEError):
    """The store cannot grant the quota: ask for fewer slots, or close another session."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class QueueFull(FlashMoEError):
    """Too much is waiting already: retry later."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class WeightsDamaged(FlashMoEError):
    """Bytes on disk are not what was indexed, or cannot be read."""

    status = grpc.StatusCode.DATA_LOSS


class ExpertDamaged(WeightsDamaged):
    """An expert's bytes are damaged; it stays quarantined, the others go on."""


class NotFinite(WeightsDamaged):
    """The model computes NaN or infinite numbers: its weights, or what its dtype can hold."""


class StaleLease(FlashMoEError):
    """A slot was refilled under its reader; the output was discarded."""

    status = grpc.StatusCode.ABORTED
    retryable = True


class Unavailable(FlashMoEError):
    """The peer is away or draining: retry later."""

    status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class StoreUnavailable(Unavailable):
    """The expert store stayed away longer than the deadline."""


class DeadlineExceeded(FlashMoEError):
    """The caller's deadline passed."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    retryable = True


class Cancelled(FlashMoEError):
    """The caller went away."""

    status = grpc.StatusCode.CANCELLED


class NotReady(FlashMoEError):
    """Nothing is known yet."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    retryable = True


class MessageInvalid(FlashMoEError):
    """Bytes from Redis or a peer that do not decode."""

    status = grpc.StatusCode.INVALID_ARGUMENT


def _kinds(base: type[FlashMoEError]) -> dict[str, type[FlashMoEError]]:
    found = {base.__name__: base}
    for sub in base.__subclasses__():
        found |= _kinds(sub)
    return found


KINDS = _kinds(FlashMoEError)

_FROM_STATUS: dict[grpc.StatusCode, type[FlashMoEError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DATA_LOSS: WeightsDamaged,
}


def from_kind(kind: str, message: str) -> FlashMoEError:
    """The error a peer named inside a stream; an unknown kind becomes the base class."""
    return KINDS.get(kind, FlashMoEError)(message)


def from_rpc(error: grpc.RpcError) -> FlashMoEError:
    """The typed error behind a failed call."""
    code, details = _read_code(error), _read_details(error)
    metadata = dict(_read_metadata(error))
    kind = metadata.get(KIND_METADATA_KEY, "")
    fallback = _FROM_STATUS.get(code, FlashMoEError)
    retry_after_s = _read_seconds(metadata.get(RETRY_AFTER_METADATA_KEY))
    return KINDS.get(str(kind), fallback)(details, retry_after_s=retry_after_s)


def _read_code(error: Any) -> grpc.StatusCode:
    code: grpc.StatusCode = error.code()
    return code


def _read_details(error: Any) -> str:
    return str(error.details() or error.code())


def _read_metadata(error: Any) -> list[tuple[str, str | bytes]]:
    return [(key, value) for key, value in (error.trailing_metadata() or ())]


def _read_seconds(value: str | bytes | None) -> float | None:
    """None also for what is no duration: the error itself must still arrive."""
    try:
        seconds = float(value) if value is not None else -1.0
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


async def abort(context: Any, error: FlashMoEError) -> None:
    """End the call with the error's status, its kind and when to retry beside it."""
    metadata: tuple[tuple[str, str], ...] = ((KIND_METADATA_KEY, type(error).__name__),)
    if error.retry_after_s is not None:
        metadata += ((RETRY_AFTER_METADATA_KEY, f"{error.retry_after_s:.3f}"),)
    details = str(error).encode(errors="replace")[:_MAX_DETAILS_BYTES].decode(errors="ignore")
    await context.abort(error.status, details, trailing_metadata=metadata)
