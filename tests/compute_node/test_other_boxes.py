"""A main node's shadow comes, moves and goes while sequences are under way, and the tokens are
those that it gives alone.

Planted faults seen red: see the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from compute_node import other_boxes
from compute_node.boxes.workers_file import WorkersFile
from compute_node.config import ComputeNodeConfig
from compute_node.engine.compute_thread import ComputeThread
from compute_node.engine.engine import Engine
from compute_node.engine.joined_shadow import JoinedShadow
from compute_node.engine.request import Request
from compute_node.engine.schedule import Schedule
from compute_node.engine.writer import Token
from proto import errors
from proto import shadow_pb2 as pb
from proto.expert import ModelSpec
from proto.held_experts import ALL_EXPERTS
from proto.protocol import PROTOCOL_VERSION
from proto.shadow_pb2_grpc import ShadowServicer, add_ShadowServicer_to_server
from tests.contract.test_exactness import engine
from tests.daemons import node_table
from tests.stack import wait_for

PROMPT = (17, 300, 4, 92, 1000, 7, 55, 8)
NUM_TOKENS = 12


class Shadow(ShadowServicer):
    """Names the same experts for every token. num_streams: that are open now"""

    def __init__(self, spec: ModelSpec, vocab_size: int, num_experts: int | None = None) -> None:
        self._spec, self._vocab_size = spec, vocab_size
        self._num_experts = num_experts or spec.num_experts
        self.heard: list[pb.FollowRequest] = []
        self.num_streams = 0

    def Describe(self, request: Any, context: Any) -> pb.ShadowDescription:
        return pb.ShadowDescription(
            protocol_version=PROTOCOL_VERSION,
            moe_layers=self._spec.moe_layers,
            num_experts=self._num_experts,
            top_k=self._spec.top_k,
            vocab_size=self._vocab_size,
        )

    def Follow(self, requests: Iterator[pb.FollowRequest], context: Any) -> Iterator[Any]:
        self.num_streams += 1
        try:
            for request in requests:
                self.heard.append(request)
                if not request.token_ids:
                    continue
                yield from (
                    pb.FollowReply(
                        sequence=request.sequence,
                        position=request.num_before + len(request.token_ids) - 1,
                        token_id=request.token_ids[-1],
                        layer=layer,
                        experts=range(self._spec.top_k),
                    )
                    for layer in self._spec.moe_layers
                )
        finally:
            self.num_streams -= 1


@contextmanager
def serving(address: str, shadow: Shadow) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    add_ShadowServicer_to_server(shadow, server)
    server.add_insecure_port(address)
    server.start()
    try:
        yield address
    finally:
        server.stop(0).wait()


@pytest.fixture
def node(tiny_store: Path, run_dir: Path) -> Iterator[Engine]:
    with engine(tiny_store, run_dir) as found:
        yield found


def config(run_dir: Path, **more: Any) -> ComputeNodeConfig:
    return ComputeNodeConfig(**node_table(run_dir, "main", 64, **more))


def joined_shadow(node: Engine, run_dir: Path) -> JoinedShadow:
    settings = config(run_dir)
    return JoinedShadow(node, lambda address: other_boxes.new_shadow(node, settings, address))


def shadow_of(node: Engine, **more: Any) -> Shadow:
    return Shadow(node.loaded.spec, node.loaded.vocab_size, **more)


def tokens(node: Engine) -> Iterator[int]:
    """One by one: what stands between two steps of a sequence happens there."""
    request = Request(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
    return (event.token_id for event in node.generate(request) if isinstance(event, Token))


def test_a_shadow_moves_and_goes_within_a_sequence(node: Engine, run_dir: Path) -> None:
    """Seen red: the second hears the latest token alone, its stream stays open when it goes, the
    first's does when it moves.
    """
    expected = list(tokens(node))
    first, second = shadow_of(node), shadow_of(node)
    with (
        serving(f"unix:{run_dir}/1.sock", first) as here,
        serving(f"unix:{run_dir}/2.sock", second) as there,
        joined_shadow(node, run_dir) as shadow,
    ):
        shadow.take(here)
        shadow.wait_up()
        found = []
        for number, token in enumerate(tokens(node)):
            found.append(token)
            if number == 4:
                shadow.take(there)
                shadow.wait_up()
                wait_for(lambda: first.num_streams == 0, 60, "the first to be left")
            if number == 8:
                wait_for(lambda: len(second.heard) == 4, 60, "the second to hear its tokens")
                shadow.take(None)
                wait_for(lambda: second.num_streams == 0, 60, "the second to be left")
        assert node.shadow is None
    assert found == expected
    assert [len(one.token_ids) for one in first.heard] == [len(PROMPT), 1, 1, 1, 1]
    said = second.heard[0]
    assert said.num_before == 0 and list(said.token_ids) == [*PROMPT, *found[:5]]
    assert {(state.start, state.num_tokens) for state in said.states} == {(0, len(PROMPT) + 4)}


def test_a_shadow_that_comes_within_a_sequence_hears_its_end(node: Engine, run_dir: Path) -> None:
    """Seen red: the end said to the shadow of the beginning alone."""
    expected, shadow_node = list(tokens(node)), shadow_of(node)
    with (
        serving(f"unix:{run_dir}/1.sock", shadow_node) as address,
        joined_shadow(node, run_dir) as shadow,
    ):
        found = []
        for token in tokens(node):
            found.append(token)
            shadow.take(address)
            shadow.wait_up()
        wait_for(lambda: shadow_node.heard[-1:] == [ended(shadow_node)], 60, "the end to be said")
        link = node.shadow.link if node.shadow is not None else None
        assert link is not None and link.num_heard(shadow_node.heard[0].sequence) == 0
    assert found == expected


def ended(shadow: Shadow) -> pb.FollowRequest:
    return pb.FollowRequest(sequence=shadow.heard[0].sequence)


def write(path: Path, *addresses: str) -> None:
    new = path.with_suffix(".new")
    new.write_text("".join(f'[shadow]\naddress = "{address}"\n' for address in addresses))
    new.replace(path)


def test_a_file_has_a_shadow_come_and_go(
    node: Engine, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of another model is logged, and not used. Seen red: it ends the node's start; it is
    given tokens; the file's change is not seen.
    """
    path = run_dir / "workers.toml"
    settings = config(run_dir, workers_file=path)
    description = SimpleNamespace(spec=node.loaded.spec, held=ALL_EXPERTS)
    boxes = other_boxes.new_boxes(settings, cast(Any, description), node.cache)
    other, right = shadow_of(node, num_experts=3), shadow_of(node)
    expected = list(tokens(node))
    with (
        serving(f"unix:{run_dir}/1.sock", other) as here,
        serving(f"unix:{run_dir}/2.sock", right) as there,
        ComputeThread(Schedule(4, node.room)) as compute,
    ):
        write(path, here)
        with other_boxes.joined(node, settings, boxes, compute):
            assert "shadow refused" in caplog.text
            assert list(tokens(node)) == expected and other.heard == []
            write(path, there)
            wait_for(lambda: right.num_streams == 1, 60, "the right one to be followed")
            assert list(tokens(node)) == expected
            wait_for(lambda: len(right.heard) > NUM_TOKENS, 60, "it to hear tokens")
            write(path)
            wait_for(lambda: node.shadow is None, 60, "it to go")
            wait_for(lambda: right.num_streams == 0, 60, "its stream to end")
            assert list(tokens(node)) == expected
            write(path, there)
            wait_for(lambda: right.num_streams == 1, 60, "it to come again")
        wait_for(lambda: right.num_streams == 0, 60, "its stream to end with the node")


def test_a_second_shadow_is_refused_before_anything_changes(run_dir: Path) -> None:
    """Seen red: the file's workers taken."""
    taken: list[Any] = []
    workers = shadow = cast(Any, SimpleNamespace(take=taken.append))
    both = WorkersFile.model_validate({"worker": [{"address": "a:1"}], "shadow": {"address": "b"}})
    settings = config(run_dir, shadow_address="c", workers_file=run_dir / "workers.toml")
    with pytest.raises(errors.ConfigInvalid, match="names the shadow b, and shadow_address is c"):
        other_boxes.take_file(both, settings, workers, shadow)
    assert taken == []
    alone = WorkersFile.model_validate({"worker": [{"address": "a:1"}]})
    other_boxes.take_file(alone, settings, workers, shadow)
    assert taken == [alone.workers], "the shadow of the settings stays"
