from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proto import errors, rpc, stats
from proto import scheduler_pb2 as pb
from proto import stats_pb2 as stats_pb
from proto.expert import ExpertKey
from proto.scheduler_pb2_grpc import SchedulerStub
from scheduler.daemon import service
from scheduler.daemon.scorer import Scorer
from scheduler.daemon.service import SchedulerService
from scheduler.learn.learner import ReuseModel
from tests.scheduler.traces import small_config, structured_trace

if TYPE_CHECKING:
    from proto.scheduler_pb2_grpc import SchedulerAsyncStub


SHOWN = stats.snapshot(ReuseModel(["age"]))


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(small_config())


@pytest.fixture
async def stub(scorer: Scorer, run_dir: Path) -> AsyncIterator[SchedulerAsyncStub]:
    address = f"unix:{run_dir}/scheduler.sock"
    servicer = SchedulerService(scorer, lambda: SHOWN, horizon_steps=4)
    async with (
        rpc.serving(rpc.Listen(address), servicer.register, (service.NAME,), 0),
        rpc.connect_aio(address) as channel,
    ):
        yield SchedulerStub(channel)


def explain(layer: int, expert: int) -> pb.ExplainRequest:
    return pb.ExplainRequest(key=ExpertKey(layer, expert).to_pb())


async def test_explain_says_why(stub: SchedulerAsyncStub, scorer: Scorer) -> None:
    """Red when a field is left empty or filled from another."""
    for event in structured_trace(100):
        scorer.observe(event)
    reply = await stub.Explain(explain(3, 5))
    want = scorer.explain(ExpertKey(3, 5))
    assert ExpertKey.from_pb(reply.key) == ExpertKey(3, 5)
    assert (reply.score, reply.bias, reply.horizon_steps) == (want.score, want.bias, 4)
    assert [(term.name, term.value, term.weight, term.contribution) for term in reply.features] == [
        (t.name, t.value, t.weight, t.contribution) for t in want.contributions
    ]
    assert len({term.name for term in reply.features}) == 12


async def test_explain_ends_with_the_statuses_of_its_contract(
    stub: SchedulerAsyncStub, scorer: Scorer
) -> None:
    """Red when an error crosses the wire as INTERNAL."""
    for key, kind in ((explain(3, 5), errors.NotReady), (explain(2, 5), errors.UnknownExpert)):
        with pytest.raises(rpc.grpc.aio.AioRpcError) as caught:
            await stub.Explain(key)
        assert caught.value.code() == kind.status
        assert type(errors.from_rpc(caught.value)) is kind


async def test_stats_are_those_of_the_loop(stub: SchedulerAsyncStub) -> None:
    assert await stub.Stats(stats_pb.StatsRequest()) == SHOWN
