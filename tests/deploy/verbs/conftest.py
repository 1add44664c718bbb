"""A trace to calibrate with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.scheduler.replays import recorded


@pytest.fixture(scope="module")
def cut_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recorded run, its three generations cut into six."""
    whole = recorded()
    path = tmp_path_factory.mktemp("trace") / "tiny.npz"
    cut = np.linspace(0, whole.num_steps, 7).astype(np.int64)
    replace(whole, seq_offsets=cut, seq_names=()).save(path)
    return path
