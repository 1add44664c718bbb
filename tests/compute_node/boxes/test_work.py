"""Work on the wire, and what a worker refuses.

Planted faults seen red: weights sent as they are in memory, experts that nobody chose accepted,
sizes believed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compute_node.boxes.probe import Probe
from compute_node.boxes.work import Work, bytes_of
from proto import errors
from proto import worker_pb2 as pb
from proto.expert import ModelSpec

WORK = Work.of(
    3,
    [1, 4],
    torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    torch.tensor([[1, 4], [4, 2]]),
    torch.tensor([[0.1, 0.9], [0.5, 0.5]]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [[], [1, 1]])
def test_work_comes_as_it_was_sent(dtype: torch.dtype, sequences: list[int]) -> None:
    ids, weights = torch.tensor([[1, 4], [4, 2]]), torch.rand(2, 2).to(dtype)
    sent = Work.of(3, [1, 4], WORK.hidden, ids, weights, sequences)
    came = Work.from_pb(sent.to_pb(7), 3, torch.bfloat16)
    assert (came.layer, came.experts) == (3, [1, 4])
    assert came.sequences == (sequences or [2]) and came.is_decode == (len(sequences) == 2)
    pairs = zip((came.hidden, *came.chosen_by(slice(2))), (WORK.hidden, ids, weights), strict=True)
    assert all(there.dtype == here.dtype and torch.equal(there, here) for there, here in pairs)


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": 0},
        {"num_tokens": 3},
        {"num_tokens": 1 << 30},
        {"hidden": b""},
        {"hidden": bytes(8)},
        {"hidden": bytes(13)},
        {"topk_ids": [1, 4, 2]},
        {"topk_ids": []},
        {"topk_weights": [1.0]},
        {"topk_weights": []},
        {"sequences": [1, 2]},
        {"sequences": [2, 0]},
        {"experts": []},
        {"experts": [4, 1]},
        {"experts": [1, 1]},
        {"experts": [0]},
    ],
)
def test_what_is_no_work_is_refused_in_a_sentence(change: dict[str, Any]) -> None:
    request = WORK.to_pb(1)
    for name, value in change.items():
        request.ClearField(name)
        if isinstance(value, list):
            getattr(request, name).extend(value)
        else:
            setattr(request, name, value)
    with pytest.raises(errors.InvalidRequest):
        Work.from_pb(pb.WorkRequest.FromString(request.SerializeToString()), 3, torch.bfloat16)


def test_weights_that_no_box_takes_are_refused() -> None:
    ids, weights = torch.tensor([[1, 4]]), torch.rand(1, 2).double()
    with pytest.raises(errors.InvalidRequest, match="run on one box"):
        Work.of(3, [1], WORK.hidden[:1], ids, weights)


def test_a_worker_with_other_bits_is_refused_by_name() -> None:
    spec = ModelSpec("f", "toy", (0, 2), 4, 2, {0: (), 2: ()})
    probe = Probe.of(lambda work: work.hidden * 2, spec, 8, torch.bfloat16)
    assert {work.layer for work in probe.works} == {0, 2}
    for work in probe.works:
        right = bytes_of(work.hidden * 2)
        probe.check("10.0.0.2:9400", work, right)
        with pytest.raises(errors.OtherBits, match=r"10\.0\.0\.2:9400 computes other bits"):
            probe.check("10.0.0.2:9400", work, right[:-1] + bytes([right[-1] ^ 1]))
