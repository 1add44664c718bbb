"""The residual stream is found by the norm whose output the experts get, in the first pass.

Planted faults seen red: the first norm that runs taken, prompts' streams kept, a question that
counts as a pass, hooks left behind when nothing was found, another list's module watched.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compute_node.moe.step import Batch, Part, Phase, Step
from compute_node.moe.stream_watch import StreamWatch

WIDTH = 8


class DecoderLayer(nn.Module):
    """Two norms of one width; the second's output is what the experts get, plus `shift`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mlp = nn.ModuleDict({"experts": nn.Identity()})

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the stream between the norms, and what experts get."""
        between = stream + self.first(stream).flip(-1)
        return between, self.second(between)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(), DecoderLayer()])


def passed(model: Model, phase: Phase, num_rows: int) -> tuple[Tensor, Tensor, Step]:
    """What the second layer said, [T, D] both, and the step."""
    step = Step(Batch(Part("s", phase, num_rows, num_rows)), lambda: None)
    with step.running():
        between, hidden = model.layers[1](torch.randn(1, num_rows, WIDTH))
    return between[0], hidden[0], step


@pytest.fixture
def model() -> Model:
    torch.manual_seed(1)
    model = Model()
    nn.init.normal_(model.layers[1].second.weight)  # type: ignore[arg-type]
    return model


def watching(model: Model) -> StreamWatch:
    watch = StreamWatch(5)
    watch.watch(model, "layers.1.mlp.experts")
    return watch


def test_decode_steps_get_the_stream_that_the_experts_input_is_the_norm_of(model: Model) -> None:
    watch = watching(model)
    _, hidden, prompt = passed(model, Phase.PREFILL, 3)
    norm = watch.settle(hidden)
    assert norm is not None and prompt.streams == {}
    between, hidden, step = passed(model, Phase.DECODE, 1)
    assert torch.equal(step.streams[5], between)
    assert torch.equal(norm(between), hidden), "and asking does not need a step"
    assert passed(model, Phase.PREFILL, 3)[2].streams == {}


def test_nothing_is_kept_where_no_norm_makes_the_experts_input(model: Model) -> None:
    watch = watching(model)
    between, _, _ = passed(model, Phase.PREFILL, 3)
    assert watch.settle(between) is None
    assert passed(model, Phase.DECODE, 1)[2].streams == {}
    assert not any(module._forward_hooks for module in model.modules())


def test_a_pass_that_settles_nothing_is_forgotten(model: Model) -> None:
    watch = watching(model)
    _, hidden, _ = passed(model, Phase.PREFILL, 3)
    watch.forget()
    assert watch.settle(hidden) is None


def test_other_layers_are_not_watched(model: Model) -> None:
    watching(model)
    assert not any(module._forward_hooks for module in model.layers[0].modules())
