"""The socket under HTTP sends small events at once.

Planted fault seen red: a listener whose protocol is not named, with which the second event of a
stream waited until the first was acknowledged, 40 ms later.
"""

from __future__ import annotations

import asyncio
import socket

from compute_node.gateway.host_port import HostPort
from compute_node.gateway.server import bind


async def test_accepted_connections_do_not_wait_for_acknowledgements() -> None:
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listener = bind(HostPort("127.0.0.1", 0))
    server = await asyncio.start_server(accepted, sock=listener)
    async with server:
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await found == 1
        writer.close()
