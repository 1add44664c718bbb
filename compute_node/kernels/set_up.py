"""Sets up the thread that computes."""

from __future__ import annotations

from pathlib import Path

import torch

from compute_node.kernels import processors
from compute_node.kernels.prober import Prober
from compute_node.native import binding


def set_up(
    prober: Prober, threads: int, native: binding.Setting, verdicts_path: Path | None
) -> None:
    """On the thread that computes, before it does: kernels are tried out with as many threads as
    they are used with, and OpenMP has one team in this process (DECISIONS.md). threads: 0: as many
    as it may use; verdicts_path: of kernels that were tried out before
    """
    torch.set_num_threads(threads or processors.usable())
    binding.use(native)
    if verdicts_path:
        prober.load(verdicts_path)
