"""The node behind the gateway: what it serves, asked once, and again after it was away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from compute_node.client.async_client import AsyncNodeClient
from compute_node.client.description import Description
from compute_node.gateway.refusals import Refused
from proto import errors

_RETRY_AFTER_S = 2.0  # of a node that is away: about as long as a small one takes to start
_TIMEOUT_S = 5.0


class Node:
    """name: of its model, as clients call it; None: as its folder is called"""

    def __init__(self, client: AsyncNodeClient, name: str | None) -> None:
        self.client, self._name = client, name
        self._description: Description | None = None

    async def describe(self) -> Description:
        """Raises Unavailable."""
        if self._description is None:
            async with self.awaited():
                self._description = await self.client.describe(_TIMEOUT_S)
        return self._description

    async def model(self) -> str:
        """The name that clients use. Raises Unavailable."""
        return self._name or (await self.describe()).model

    async def checked(self, asked: str | None) -> str:
        """The name of the model that is served. Raises Refused (404) for another, Unavailable."""
        name = await self.model()
        if asked is not None and asked != name:
            raise Refused(
                f"the model {asked!r} is not served here: use {name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return name

    async def is_serving(self) -> bool:
        return await self.client.is_serving(_TIMEOUT_S)

    @asynccontextmanager
    async def awaited(self) -> AsyncIterator[None]:
        """A node that turns out to be away in the block is described anew once it is back; the
        error says when to try again.
        """
        try:
            yield
        except errors.Unavailable as error:
            self._description = None
            if error.retry_after_s is None:
                error.retry_after_s = _RETRY_AFTER_S
            raise
