"""How a sequence's next token is drawn, for another process that draws what this one will draw."""

from __future__ import annotations

from dataclasses import dataclass

from compute_node.client.sampling_options import SamplingOptions
from proto import shadow_pb2 as pb


@dataclass(frozen=True)
class Drawing:
    """num_prompt: tokens that the sequence was given; state: of the generator, before the draw"""

    options: SamplingOptions
    num_prompt: int
    state: bytes

    def to_pb(self) -> pb.Drawing:
        return pb.Drawing(
            sampling=self.options.to_pb(), num_prompt=self.num_prompt, generator=self.state
        )

    @classmethod
    def from_pb(cls, drawing: pb.Drawing) -> Drawing:
        """Raises InvalidRequest naming the option."""
        options = SamplingOptions.from_pb(drawing.sampling)
        return cls(options, drawing.num_prompt, drawing.generator)
