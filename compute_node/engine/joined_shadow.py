"""The shadow of an engine: it comes, moves and goes while the engine runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

from compute_node.engine.passes import Passes
from compute_node.predict.shadowed import Shadowed

logger = logging.getLogger(__name__)

NewShadow = Callable[[str], Shadowed]
"""Of the shadow node at an address, with a link that is not open."""

JOIN_S = 10.0  # until it follows, at the start


class JoinedShadow:
    """Use as a context manager; there is none then."""

    def __init__(self, engine: Passes, new_shadow: NewShadow) -> None:
        self._engine, self._new_shadow = engine, new_shadow
        self._address: str | None = None

    def __enter__(self) -> JoinedShadow:
        return self

    def __exit__(self, *_: object) -> None:
        self.take(None)

    def take(self, address: str | None) -> None:
        """The one at `address` follows from now on; None: none does. One thread, any.

        Sequences go on: a step that has begun keeps to the former shadow, which names nothing more;
        the next one says the sequence's tokens to the new one.
        """
        if address == self._address:
            return
        shadow = None
        if address is not None:
            shadow = self._new_shadow(address)
            shadow.link.__enter__()
        self._address = address
        former, self._engine.shadow = self._engine.shadow, shadow
        if former is not None:
            former.link.__exit__()

    def wait_up(self) -> None:
        """Until it follows; one that is away is logged, and follows when it is there. Raises
        VersionMismatch for one of another model.
        """
        shadow = self._engine.shadow
        if shadow is not None and not shadow.link.wait_up(JOIN_S):
            logger.warning("shadow is away", extra={"shadow": self._address})
