"""The correction in numpy says what the net in torch says, and learns what a step gives away.

Planted fault seen red: what layers say summed from the last to the first.
"""

from __future__ import annotations

import numpy as np
import torch

from proto.correction import corrected
from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.lab.correction_net import CorrectionNet, train_correction
from scheduler.simulate.trace import AccessTrace

SETTINGS = CalibrationSettings(horizons_steps=(1, 2), correction_width=8, correction_updates=1200)


def test_numpy_says_what_torch_says() -> None:
    torch.manual_seed(0)
    net = CorrectionNet((3, 8), 5).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    ids = np.array([[0, 1], [4, 2], [7, 3]])
    used = torch.zeros(1, 3, 8)
    used[0].scatter_(1, torch.from_numpy(ids), 1.0)
    with torch.no_grad():
        expected = torch.exp(net(used))[0].numpy()
    np.testing.assert_allclose(net.export().odds(ids), expected, rtol=1e-5)


def jumping_trace(num_generations: int = 6, num_steps: int = 200) -> AccessTrace:
    """The first layer's expert is drawn anew at every step; the second layer uses, one step later,
    the expert of that number. Nothing before a step foretells it.
    """
    first = np.random.default_rng(0).integers(0, 8, num_generations * num_steps + 1)
    ids = np.stack([first[1:], first[:-1]], axis=1)[:, :, None].astype(np.uint16)
    offsets = np.arange(num_generations + 1, dtype=np.int64) * num_steps
    return AccessTrace("jumping", ids, offsets, 8, np.ones(ids.shape, np.float16))


def test_learns_across_layers_what_this_step_gives_away() -> None:
    trace = jumping_trace()
    scores = np.full((trace.num_steps, *trace.shape), 0.2, np.float16)
    parts = np.arange(5), np.arange(5, 6)
    correction = train_correction(scores, trace, parts, SETTINGS, lambda line: None)
    for expert in range(8):
        ids = np.array([[expert], [(expert + 3) % 8]])
        moved = corrected(np.full(8, 0.2), correction.odds(ids)[1])
        assert moved.argmax() == expert
        assert moved[expert] > 0.8 > 0.3 > np.delete(moved, expert).max()
