"""A node whose answers are written down: the shipped model calls no tools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from proto import compute_node_pb2 as pb
from proto import compute_node_pb2_grpc as pb_grpc
from proto import rpc
from tests.daemons import daemon

TEMPLATE = "{{ tools }}<tool_call><think>"
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
FIRST = f"<think>\nI must look.</think>\n\nLet me see.\n{CALL}<|im_end|>"
SECOND = "It is sunny in Paris.<|im_end|>"
_PIECE = 5


class ScriptedNode(pb_grpc.ComputeNodeServicer):
    """Calls a tool when it is asked, and says what it learned once the tool has answered."""

    async def Describe(self, request: Any, context: Any) -> pb.NodeDescription:
        return pb.NodeDescription(
            model="scripted",
            max_context_tokens=4096,
            chat_template=TEMPLATE,
            end_texts=["<|im_end|>"],
        )

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateReply]:
        answered = any(message.role == "tool" for message in request.chat.messages)
        text = SECOND if answered else FIRST
        yield pb.GenerateReply(started=pb.Started(prompt_token_ids=[1, 2, 3]))
        for at in range(0, len(text), _PIECE):
            yield pb.GenerateReply(token=pb.Token(id=at, text=text[at : at + _PIECE]))
        yield pb.GenerateReply(finished=pb.Finished(finish_reason="stop"))


@contextmanager
def scripted_gateway(run: Path) -> Iterator[str]:
    """The URL of a gateway before a scripted node, for the block."""
    address, ready, stop = f"unix:{run}/node.sock", Event(), Event()
    thread = Thread(target=lambda: asyncio.run(_serve(address, ready, stop)))
    thread.start()
    assert ready.wait(10)
    table = {
        "address": f"unix:{run}/gateway.sock",
        "http": "127.0.0.1:0",
        "http_port_file": str(run / "http"),
        "node_address": address,
    }
    try:
        with daemon("gateway", run, table, module="compute_node.gateway"):
            yield f"http://{(run / 'http').read_text().strip()}"
    finally:
        stop.set()
        thread.join()


async def _serve(address: str, ready: Event, stop: Event) -> None:
    def register(server: Any) -> None:
        pb_grpc.add_ComputeNodeServicer_to_server(ScriptedNode(), server)  # type: ignore[no-untyped-call]

    async with rpc.serving(rpc.Listen(address), register, ["flashmoe.v1.ComputeNode"], 1.0):
        ready.set()
        await asyncio.to_thread(stop.wait)
