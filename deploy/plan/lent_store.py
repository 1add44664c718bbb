"""The expert_store of another box, as a box plans by it that has none of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc

from expert_store.manifest.size_classes import SizeClasses
from expert_store.manifest.sizing import Sizing
from proto import errors, rpc
from proto import expert_store_pb2 as pb
from proto.expert import EXACT_VARIANT, ModelSpec
from proto.expert_store_pb2_grpc import ExpertStoreStub
from proto.held_experts import HeldExperts
from proto.protocol import check_version

_CALL_S, _RETRY_S = 10.0, 0.2
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class LentStore:
    """What `plan_memory` needs of a store. Of sizes it knows those of experts alone."""

    spec: ModelSpec
    sizing: Sizing
    slot_bytes: int
    num_experts: int

    @property
    def size_classes(self) -> SizeClasses:
        return SizeClasses(self.slot_bytes, {EXACT_VARIANT: 1})

    @classmethod
    def at(cls, address: str, tls: rpc.TlsFiles | None, wait_s: float) -> LentStore:
        """Ask the store, waiting for one that is away.

        Raises Unavailable with what to do when it stays away; VersionMismatch; ConfigInvalid for
        certificates that cannot be read, and for an address where something else answers.
        """
        reply = _described(address, tls, wait_s)
        check_version(f"the store at {address}", reply.protocol_version)
        spec = ModelSpec.from_pb(reply.model)
        held = HeldExperts.from_bytes(reply.held, spec)
        return cls(spec, _of_experts(reply.hidden_size), reply.slot_bytes, held.num(spec))


def _described(address: str, tls: rpc.TlsFiles | None, wait_s: float) -> pb.DescribeReply:
    end_s = time.monotonic() + wait_s
    with rpc.connect(address, tls) as channel:
        stub = ExpertStoreStub(channel)
        while True:
            try:
                return stub.Describe(pb.DescribeRequest(), timeout=min(_CALL_S, wait_s))
            except grpc.RpcError as error:
                problem = error
            if problem.code() not in _AWAY:
                raise errors.ConfigInvalid(
                    f"what answers at {address} is no expert_store ({problem.details()}): give the "
                    "address that `flashmoe serve --lend` names on the other box"
                )
            if time.monotonic() > end_s:
                raise errors.Unavailable(
                    f"no expert_store answers at {address} within {wait_s:g} s "
                    f"({problem.details()}): start `flashmoe serve --lend {address}` on the other "
                    "box, and set store_tls in [worker] where it listens with tls"
                )
            time.sleep(_RETRY_S)


def _of_experts(hidden_size: int) -> Sizing:
    """Nothing but experts is computed with."""
    return Sizing(
        dense_bytes=0,
        cache_bytes_per_token=0,
        cache_bytes_fixed=0,
        hidden_size=hidden_size,
        vocab_size=0,
        max_position_embeddings=0,
        activated_dense_bytes=0,
        eager_attention_heads=0,
    )
