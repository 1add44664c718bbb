"""A node gone mad: exchanges inside open sessions, sound, wrong and no messages at all."""

from __future__ import annotations

import itertools
import queue
import random
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc

from proto import errors, rpc
from proto import expert_store_pb2 as pb
from proto.expert import ExpertKey, RecordKey
from tests.expert_store.raw_session import DEADLINE_S, Lock, Wire
from tests.expert_store.stores import KEYS

QUOTA_SLOTS = 4
MESSAGES_A_SESSION = 200
OPEN = "open"  # still, after its last message
_numbers = itertools.count()


@dataclass(frozen=True)
class Said:
    """One message, and how many leases answer it for sure."""

    data: bytes
    num_leases: int = 0


class MadNode:
    """Makes messages from a seed. Knows what it holds, so that most of them are sound.

    keys: of records that can be lent
    lease_bytes: what each counts against its quota, by variant
    """

    def __init__(self, seed: int, keys: Sequence[RecordKey], lease_bytes: dict[str, int]) -> None:
        self._random = random.Random(seed)
        self._keys = keys
        self._lease_bytes = lease_bytes
        self._held: list[RecordKey] = []

    def messages(self) -> Iterator[Said]:
        """What one session says."""
        self._held = []
        for number in range(1, self._random.randint(1, MESSAGES_A_SESSION) + 1):
            chance = self._random.random()
            if chance < 0.004:
                keys = [self._any_keys(4) for _ in range(4)]
                yield Said(_exchange(self._random.choice([0, number, (1 << 64) - 1]), *keys))
            elif chance < 0.012:
                yield Said(self._damaged(self._sound(number).data))
            else:
                yield self._sound(number)

    def _sound(self, number: int) -> Said:
        gone = self._random.sample(self._held, self._random.randint(0, len(self._held)))
        self._held = [key for key in self._held if key not in gone]
        left_bytes = QUOTA_SLOTS * self._lease_bytes["exact"] - self._bytes(self._held)
        free = [key for key in self._keys if key not in self._held]
        came = self._random.sample(free, self._random.randint(0, min(QUOTA_SLOTS, len(free))))
        while self._bytes(came) > left_bytes:
            came.pop()
        self._held += came
        guesses = self._random.choices(KEYS, k=self._random.randint(0, 3))
        withdrawn = self._any_keys(2)
        return Said(_exchange(number, gone, came, guesses, withdrawn), len(came))

    def _bytes(self, keys: Iterable[RecordKey]) -> int:
        return sum(self._lease_bytes[key.variant] for key in keys)

    def _any_keys(self, most: int) -> list[RecordKey]:
        known = self._random.choices(KEYS, k=self._random.randint(0, most))
        expert = ExpertKey(self._random.getrandbits(32), self._random.getrandbits(32))
        strange = RecordKey(expert, self._random.choice(["exact", "int4", ""]))
        return [*known, strange] if self._random.random() < 0.2 else known

    def _damaged(self, message: bytes) -> bytes:
        data = bytearray(message)
        match self._random.randrange(4):
            case 0:
                return self._random.randbytes(self._random.randint(1, 300))
            case 1:
                return bytes(data[: self._random.randint(1, len(data))])
            case 2:
                return bytes(data) + self._random.randbytes(3)
        for _ in range(self._random.randint(1, 4)):
            data[self._random.randrange(len(data))] = self._random.getrandbits(8)
        return bytes(data)


def _exchange(number: int, *keys: Sequence[RecordKey]) -> bytes:
    """keys: releases, acquires, prefetches, withdrawals"""
    releases, acquires, prefetches, withdrawals = ([key.to_pb() for key in part] for part in keys)
    return pb.Exchange(
        exchange_id=number,
        releases=releases,
        acquires=acquires,
        prefetches=prefetches,
        withdrawals=withdrawals,
    ).SerializeToString()


def fuzz(
    wire: Wire, num_messages: int, seed: int, keys: Sequence[RecordKey] = KEYS[:-1]
) -> Counter[str]:
    """How sessions ended, by kind of error; half over the local socket, half over the stream.

    Fails when one ends otherwise than by a typed error.
    """
    node = MadNode(seed, keys, dict(wire.describe().lease_bytes))
    ends = Counter[str]()
    counted = itertools.count()
    for way in itertools.cycle((_local, _stream)):
        messages = (said for said in node.messages() if next(counted) < num_messages)
        with Lock(wire.session_dir, f"mad-{next(_numbers)}.lock") as lock:
            ends[way(wire, lock, messages)] += 1
        if next(counted) >= num_messages:
            return ends
    raise AssertionError("unreachable")


def _local(wire: Wire, lock: Lock, messages: Iterable[Said]) -> str:
    session, opened = wire.open_shared(lock, QUOTA_SLOTS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bell:
        bell.settimeout(DEADLINE_S)
        bell.connect(opened.local_socket_path)
        bell.send(opened.session_id.encode())
        try:
            with suppress(OSError):  # hung up on: what the store said before that is still there
                for said in messages:
                    bell.send(said.data)
                    _hear(bell, said.num_leases)
                bell.shutdown(socket.SHUT_WR)
            _hear(bell, None)
        except _Ended as end:
            return str(end)
        finally:
            session.close()
    return OPEN


class _Ended(Exception):
    """By an error of this kind."""


def _hear(bell: socket.socket, num_leases: int | None) -> None:
    """So many leases; None: all there is to hear. Raises _Ended, OSError."""
    while num_leases is None or num_leases > 0:
        try:
            data = bell.recv(1 << 20)
        except ConnectionResetError:  # told once, before what the store said in the end
            continue
        if not data:
            return
        reply = pb.Exchanged.FromString(data)
        if reply.HasField("error"):
            raise _Ended(_checked(reply.error.kind))
        if num_leases is not None:
            num_leases -= len(reply.leases)


def _stream(wire: Wire, lock: Lock, messages: Iterable[Said]) -> str:
    opening = wire.opening(
        quota_slots=QUOTA_SLOTS,
        transport=pb.TRANSPORT_SHARED_MEMORY,
        lock_name=lock.path.name,
    )
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    requests.put(opening.SerializeToString())
    with rpc.connect(f"unix:{wire.session_dir.parent}/store.sock") as channel:
        method = channel.stream_stream("/flashmoe.v1.ExpertStore/Session")
        call = method(iter(requests.get, None), timeout=DEADLINE_S)
        try:
            next(call)
            for said in messages:
                requests.put(_within_request(said.data))
                num_leases = said.num_leases
                while num_leases > 0:
                    num_leases -= len(pb.SessionReply.FromString(next(call)).exchanged.leases)
            requests.put(None)
            for _ in call:
                pass
        except grpc.RpcError as error:
            return _checked(type(errors.from_rpc(error)).__name__)
        finally:
            requests.put(None)
    return OPEN


def _within_request(exchange: bytes) -> bytes:
    """A SessionRequest's field 2, whatever is in it."""
    assert len(exchange) < 1 << 14
    length = len(exchange)
    size = bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])
    return b"\x12" + size + exchange


def _checked(kind: str) -> str:
    assert kind in errors.KINDS and kind != "FlashMoEError", f"the session ended with {kind!r}"
    return kind
