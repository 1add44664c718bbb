"""Every weight format that experts can be packed in, by name."""

from __future__ import annotations

from collections.abc import Callable

from expert_store.offline.checkpoint.architecture import Architecture
from expert_store.offline.checkpoint.progress import Report
from expert_store.offline.formats.bf16 import Bf16Encoder
from expert_store.offline.formats.encoder import Encoder
from expert_store.offline.formats.exact import ExactEncoder, check_plain
from expert_store.offline.formats.int4 import Int4Encoder
from expert_store.offline.formats.int8 import Int8Encoder
from expert_store.offline.formats.lossless import LosslessEncoder
from expert_store.offline.formats.weight_source import WeightSource


def _exact(architecture: Architecture, source: WeightSource, report: Report) -> Encoder:
    check_plain(architecture, "pack it with --format bf16 (the same values) or int4")
    return ExactEncoder()


FORMATS: dict[str, Callable[[Architecture, WeightSource, Report], Encoder]] = {
    "exact": _exact,
    "lossless": LosslessEncoder,
    "bf16": lambda architecture, source, report: Bf16Encoder(architecture),
    "int8": lambda architecture, source, report: Int8Encoder(),
    "int4": lambda architecture, source, report: Int4Encoder(architecture),
}
"""What makes the encoder of a checkpoint's experts. `report` hears of matrices looked through
beforehand, where the format needs it.

Each raises CheckpointUnsupported when the checkpoint cannot be packed so, ManifestInvalid for a
damaged source.
"""
