"""What every daemon of a stack says of itself at one moment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from proto import compute_node_pb2 as node_pb
from proto import errors, rpc, stats
from proto import stats_pb2 as pb
from proto.compute_node_pb2_grpc import ComputeNodeStub
from proto.expert_store_pb2_grpc import ExpertStoreStub
from proto.memory_report import MemoryReport
from proto.scheduler_pb2_grpc import SchedulerStub
from proto.stats import Stats

NODE, STORE, SCHEDULER, MEMORY = "compute_node", "expert_store", "scheduler", "memory"
_STUBS: Mapping[str, type[Any]] = {
    NODE: ComputeNodeStub,
    STORE: ExpertStoreStub,
    SCHEDULER: SchedulerStub,
}
_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Look:
    """at_s:  by the monotonic clock
    stats: by daemon, of those that answered; away: why the others did not
    heat:  by layer, an ExpertState for each expert
    """

    at_s: float
    stats: Mapping[str, Stats]
    away: Mapping[str, str] = field(default_factory=dict)
    heat: Mapping[int, bytes] = field(default_factory=dict)
    memory: MemoryReport | None = None


class Asker:
    """Holds a channel to each daemon of a stack. Use as an async context manager.

    addresses: by daemon; one that is not named is not asked
    node_tls: what the node is shown; the others are on this host
    run_dir: where the launcher writes what the stack's memory holds; None: nowhere
    """

    def __init__(
        self,
        addresses: Mapping[str, str],
        run_dir: Path | None,
        node_tls: rpc.TlsFiles | None = None,
    ) -> None:
        self._channels = {
            name: rpc.connect_aio(address, node_tls if name == NODE else None)
            for name, address in addresses.items()
        }
        self._stubs = {name: _STUBS[name](channel) for name, channel in self._channels.items()}
        self._run_dir = run_dir

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels.values():
            await channel.close()

    @property
    def names(self) -> Sequence[str]:
        """What `snapshot` takes."""
        return [*self._stubs, *([] if self._run_dir is None else [MEMORY])]

    async def snapshot(self, name: str) -> pb.Snapshot:
        """What one daemon shows, or what the stack's memory holds. Raises Unavailable, and what
        else the daemon ends with.
        """
        if name == MEMORY:
            return self._memory_snapshot()
        try:
            reply = await self._stubs[name].Stats(pb.StatsRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None
        assert isinstance(reply, pb.Snapshot)
        return reply

    async def look(self) -> Look:
        """All at once. What does not answer is left out, with the reason."""
        names = list(self._stubs)
        found, heat = await asyncio.gather(asyncio.gather(*map(self._stats, names)), self._heat())
        answers = dict(zip(names, found, strict=True))
        return Look(
            asyncio.get_running_loop().time(),
            {name: one for name, one in answers.items() if isinstance(one, Stats)},
            {name: one for name, one in answers.items() if isinstance(one, str)},
            heat,
            self._memory(),
        )

    def _memory(self) -> MemoryReport | None:
        return None if self._run_dir is None else MemoryReport.read(self._run_dir)

    def _memory_snapshot(self) -> pb.Snapshot:
        report = self._memory()
        if report is None:
            raise errors.Unavailable("no launcher writes what the stack's memory holds")
        return stats.snapshot(*report.sources())

    async def _stats(self, name: str) -> Stats | str:
        """What it shows, or why it does not answer."""
        try:
            return Stats.from_pb(await self.snapshot(name))
        except errors.FlashMoEError as error:
            return str(error)

    async def _heat(self) -> dict[int, bytes]:
        """Empty where the node is away, or an older one."""
        if NODE not in self._stubs:
            return {}
        try:
            request = node_pb.HeatRequest()
            reply = await self._stubs[NODE].Heat(request, timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return {}
        return {one.layer: one.states for one in reply.layers}
