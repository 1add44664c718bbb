"""A user's process that asks a daemon: what its environment and gRPC's C core make of it.

Planted faults seen red: a proxy from the environment asked for a daemon, gRPC's own lines on the
terminal.
"""

from __future__ import annotations

import asyncio
import sys

from proto.rpc import TlsFiles
from tests.ports import free_port
from tests.proto.test_rpc import serve
from tests.stack import ROOT

CALLER = """
from compute_node.client.node_client import NodeClient
from deploy import cli
from proto import errors
from proto.rpc import TlsFiles
with NodeClient({address!r}, {tls}) as node:
    try:
        node.stats()
    except errors.FlashMoEError as error:
        print(error)
"""


async def caller_says(address: str, tls: str = "None") -> tuple[str, str]:
    """Standard output and error of a user's process that asks a daemon for its counters."""
    variables = {"http_proxy": "http://127.0.0.1:9", "grpc_proxy": "http://127.0.0.1:9"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CALLER.format(address=address, tls=tls),
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, logged = await process.communicate()
    return said.decode(), logged.decode()


async def test_no_proxy_is_asked_for_a_daemon() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with serve(address):
        said, _ = await caller_says(address)
    assert "Method not found" in said, "the daemon itself answered"


async def test_grpc_writes_nothing_to_the_terminal(tls: dict[str, TlsFiles]) -> None:
    """A client with TLS at a server without: gRPC's C core logs the failed handshake."""
    address = f"127.0.0.1:{free_port()}"
    async with serve(address):
        files = {name: str(path) for name, path in tls["client"]}
        said, logged = await caller_says(address, f"TlsFiles(**{files})")
    assert "handshake failed" in said
    assert logged == ""
