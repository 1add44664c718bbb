"""The gateway daemon, HTTP over a node: `python -m compute_node.gateway --config flashmoe.toml`."""

from __future__ import annotations

from proto.process import last_words

if __name__ == "__main__":
    last_words.report_failed_imports("gateway")

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc

import logging

from compute_node.client.async_client import AsyncNodeClient
from compute_node.gateway import server
from compute_node.gateway.app import new_app
from compute_node.gateway.bodies import Bodies
from compute_node.gateway.config import GatewayConfig
from compute_node.gateway.desk import Desk
from compute_node.gateway.node import Node
from compute_node.gateway.page.feed import Feed
from compute_node.gateway.page.routes import page_routes
from compute_node.gateway.service import SERVICE_NAME, GatewayService
from compute_node.gateway.stats import GatewayStats
from compute_node.live.look import Asker
from proto import rpc
from proto.process import daemon

logger = logging.getLogger("gateway")


async def run(config: GatewayConfig) -> None:
    """Serve until signalled. The order of lines is the order of start, reversed for stop."""
    rpc.check_socket_free(config.address)
    stats = GatewayStats()
    async with (
        AsyncNodeClient(config.node_address, config.node_tls) as client,
        Asker(config.daemons, config.run_dir, config.node_tls) as asker,
    ):
        feed = Feed(asker)
        bodies = Bodies(config.max_body_bytes, config.body_timeout_s)
        desk = Desk(Node(client, config.model), bodies, stats)
        page = page_routes(asker, feed, needs_key=config.api_key_file is not None)
        app = new_app(desk, config, page)
        with daemon.serving_metrics(stats.snapshot, config.metrics_port, config.metrics_port_file):
            async with (
                server.serving(app, config) as where,
                feed,
                rpc.serving(
                    config.listen, GatewayService(stats).register, [SERVICE_NAME], grace_s=1.0
                ),
            ):
                stats.url = f"http://{where}"
                logger.info("ready", extra={"url": stats.url})
                await rpc.until_signalled()


def main() -> int:
    return daemon.main("gateway", __doc__ or "", GatewayConfig.load, run)


if __name__ == "__main__":
    daemon.leave(main())
