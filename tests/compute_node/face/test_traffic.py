"""What requests come to, as their callers see it.

Planted faults seen red: the first token counts as an interval, a request that failed stays open, a
caller that left counts as a failure.
"""

from __future__ import annotations

import pytest

from compute_node.face.traffic import Traffic
from proto import errors


def test_an_answer_of_three_tokens() -> None:
    traffic = Traffic()
    with traffic.request() as answer:
        assert traffic.num_open == 1
        for _ in range(3):
            answer.token(0.5, prompt_tokens=7)
    assert (traffic.first_token_s.num, traffic.between_tokens_s.num) == (1, 2)
    assert (traffic.queued_s.num, traffic.queued_s.total) == (1, 0.5)
    assert (traffic.prompt_tokens, traffic.generated_tokens, traffic.num_open) == (7, 3, 0)


@pytest.mark.parametrize(
    ("error", "refused", "failed"),
    [
        (errors.QueueFull("16 wait"), 1, 0),
        (errors.NotFinite("of layer 3"), 0, 1),
        (errors.Cancelled("the caller went away"), 0, 0),
    ],
)
def test_how_a_request_ends(error: Exception, refused: int, failed: int) -> None:
    traffic = Traffic()
    with pytest.raises(type(error)), traffic.request():
        raise error
    assert (traffic.num_refused, traffic.num_failed, traffic.num_open) == (refused, failed, 0)
