"""Which runs make up a comparison, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tests.bench.peers.contenders import Contender
from tests.bench.peers.run import Case
from tests.bench.widen import MIB

SHARES = (None, 100.0, 50.0, 37.5, 25.0)
KIB = 1024
READ_AHEAD_BYTES = 128 * KIB  # what Linux gives most disks
OWN_READ_AHEAD_SHARES = (37.5, 25.0)  # the two that the aims are about
OWN_READ_AHEAD_PROMPTS = 4  # once: minutes each


def cases(
    contenders: Mapping[str, Contender],
    shares: Sequence[float | None],
    file_bytes: int,
    own_read_ahead_bytes: int | None,
    num_prompts: int,
    rounds: int,
) -> Iterator[Case]:
    """Rounds outermost, so that engines take turns; who maps files runs once at the
    disk's own read-ahead too.

    shares:               of the model file, in percent; None: no limit
    own_read_ahead_bytes: None: not at the disk's own
    """
    for number in range(rounds):
        for share in shares:
            for name, contender in contenders.items():
                if share is None and contender.needs_limit:
                    continue
                if contender.num_rounds is not None and number >= contender.num_rounds:
                    continue
                limit = None if share is None else int(file_bytes * share / 100) // MIB * MIB
                asked = min(num_prompts, contender.num_prompts or num_prompts)
                tokens = contender.max_tokens
                yield Case(name, share, limit, READ_AHEAD_BYTES, asked, tokens, number)
                mapped = contender.maps_files and share in OWN_READ_AHEAD_SHARES
                if mapped and number == 0 and own_read_ahead_bytes is not None:
                    few = min(asked, OWN_READ_AHEAD_PROMPTS)
                    yield Case(name, share, limit, own_read_ahead_bytes, few, tokens, number)
