"""How a forecaster is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CalibrationSettings:
    """How a forecaster is trained.

    max_updates:       of the weights, each on `batch` windows of `window_steps`
    patience:          evaluations without a better held-out loss before it stops
    held_out_ratio:    of the generations, to stop by
    average_updates:   about this many last updates make up the weights kept
    correction_width, correction_updates: of what corrects the answers in a node
    """

    horizons_steps: tuple[int, ...] = (2, 8, 24)
    half_lives_tokens: tuple[float, ...] = (2.0, 8.0, 16.0, 64.0)
    width: int = 256
    hidden: int = 12
    dropout: float = 0.2
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    batch: int = 8
    window_steps: int = 96
    max_updates: int = 1200
    evaluate_every: int = 100
    patience: int = 4
    held_out_ratio: float = 0.08
    average_updates: int = 200
    correction_width: int = 32
    correction_updates: int = 600
    seed: int = 0
