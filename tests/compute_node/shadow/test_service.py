"""A guess under way is given up for what is true, and goes on when it is what is true.

Planted faults seen red: a right guess given up, a guess that outlives another sequence's token.
"""

from __future__ import annotations

import pytest

from compute_node.shadow.follower import Token
from compute_node.shadow.service import _Stream
from proto import errors
from proto import shadow_pb2 as pb

GUESS = Token(3, 7)


def stream(*waiting: pb.FollowRequest) -> _Stream:
    found = _Stream(1, lambda reply: None)
    found.waiting.extend(waiting)
    return found


def test_a_guess_goes_on_while_nothing_waits_or_it_is_right() -> None:
    stream().check("a", GUESS)
    stream(pb.FollowRequest(sequence="a", num_before=3, token_ids=[7])).check("a", GUESS)


@pytest.mark.parametrize(
    "request_",
    [
        pb.FollowRequest(sequence="a", num_before=3, token_ids=[8]),
        pb.FollowRequest(sequence="a", num_before=3, token_ids=[7, 8]),
        pb.FollowRequest(sequence="a", num_before=2, token_ids=[7]),
        pb.FollowRequest(sequence="b", num_before=3, token_ids=[7]),
        pb.FollowRequest(sequence="a"),
    ],
)
def test_a_guess_is_given_up_for_anything_else(request_: pb.FollowRequest) -> None:
    with pytest.raises(errors.Cancelled):
        stream(request_).check("a", GUESS)


def test_a_guess_is_given_up_when_the_main_node_goes_away() -> None:
    found = stream()
    found.is_gone.set()
    with pytest.raises(errors.Cancelled):
        found.check("a", GUESS)
