"""Leases as they go over the wire: what a session may read, or why not."""

from __future__ import annotations

import time

from expert_store.manifest.extents import ExpertRecord
from expert_store.store.fill import Fill
from expert_store.store.slots import Slot
from proto import errors, expert_pb2
from proto import expert_store_pb2 as pb
from proto.expert import RecordKey


def granted(record: ExpertRecord, slot: Slot, read: Fill | None) -> pb.Lease:
    """A lease of a record in a slot. read: the fill whose cost this session bears; None: the record
    was in memory.
    """
    lease = pb.Lease(
        key=record.key.to_pb(),
        slot=slot.number,
        generation=slot.generation,
        tensor_offsets=record.tensor_offsets,
    )
    if read is not None:
        lease.bytes_read = record.payload_bytes
        lease.read_s = (read.arrived_ns - read.start_ns) / 1e9
        lease.verify_s = (time.perf_counter_ns() - read.arrived_ns) / 1e9
    return lease


def refused(key: RecordKey, error: errors.FlashMoEError) -> pb.Lease:
    """Holds no slot."""
    return pb.Lease(key=key.to_pb(), error=to_detail(error))


def to_detail(error: errors.FlashMoEError) -> expert_pb2.ErrorDetail:
    return expert_pb2.ErrorDetail(kind=type(error).__name__, message=str(error))
