"""The checkpoint's own bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from expert_store.offline.checkpoint.architecture import Architecture
from expert_store.offline.checkpoint.parameters import ExpertParameter
from expert_store.offline.formats.weight_source import WeightSource
from proto import errors
from proto.expert import TensorLayout
from proto.weight_format import EXACT


class ExactEncoder:
    """The checkpoint's own bytes, streamed."""

    weight_format = EXACT
    contents = "Each matrix of an expert is kept as the checkpoint has it."

    def layout(self, parameter: ExpertParameter) -> tuple[TensorLayout, ...]:
        return (TensorLayout(parameter.name, parameter.dtype, parameter.shape),)

    def encode(
        self, parameter: ExpertParameter, expert: int, source: WeightSource
    ) -> Iterator[Iterable[bytes]]:
        yield source.chunks(parameter.parts[expert])


def check_plain(architecture: Architecture, remedy: str) -> None:
    """Raises CheckpointUnsupported when experts are not stored as what they are multiplied as."""
    if any(p.encoding != "plain" for p in architecture.matrices):
        raise errors.CheckpointUnsupported(
            f"its experts are mxfp4 blocks on disk, which no kernel here multiplies with: {remedy}"
        )
