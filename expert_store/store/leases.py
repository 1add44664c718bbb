"""Leases as they go over the wire: what a session may read, or why not."""

from __future__ import annotations

import time

from expert_store.manifest.extents import ExpertRecord
from expert_store.store.fill import Deliver, Fill
from expert_store.store.slots import Part
from proto import errors, expert_pb2
from proto import expert_store_pb2 as pb
from proto.expert import RecordKey

Delivery = tuple[Deliver, pb.Lease]


def hand_over(deliveries: list[Delivery]) -> None:
    """Call back whom each lease is for. The caller holds no lock."""
    for deliver, lease in deliveries:
        deliver([lease])


def granted(record: ExpertRecord, part: Part, read: Fill | None) -> pb.Lease:
    """A lease of a record. read: the fill whose cost this session bears; None: the record was in
    memory.
    """
    lease = pb.Lease(
        key=record.key.to_pb(),
        slot=part.slot.number,
        generation=part.generation,
        tensor_offsets=record.tensor_offsets,
        part=part.number,
        start_bytes=part.start_bytes,
    )
    if read is not None:
        lease.bytes_read = record.payload_bytes
        lease.read_s = (read.arrived_ns - read.start_ns) / 1e9
        lease.verify_s = (time.perf_counter_ns() - read.arrived_ns) / 1e9
    return lease


def refused(key: RecordKey, error: errors.FlashMoEError) -> pb.Lease:
    """Holds no memory."""
    return pb.Lease(key=key.to_pb(), error=to_detail(error))


def to_detail(error: errors.FlashMoEError) -> expert_pb2.ErrorDetail:
    return expert_pb2.ErrorDetail(kind=type(error).__name__, message=str(error))
