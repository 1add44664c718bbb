"""Finds each MoE block's router and keeps the scores it gave all experts in the latest pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from proto import errors


class RouterScores:
    """latest[layer]: [T, E], the router's raw scores of all experts, of the latest forward pass.

    routers: by model layer number
    """

    def __init__(self) -> None:
        self.latest: dict[int, Tensor] = {}
        self.routers: dict[int, nn.Module] = {}
        self._hooks: list[Any] = []

    def hook(self, model: nn.Module, layer: int, experts_path: str) -> None:
        """Watch the router beside the experts at `experts_path`.

        Raises CheckpointUnsupported when none is found.
        """
        experts = model.get_submodule(experts_path)
        block = model.get_submodule(experts_path.rpartition(".")[0])
        router = find_router(block, experts, experts_path)
        self.routers[layer] = router
        num_experts = int(experts.num_experts)  # type: ignore[arg-type]

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            scores = output[0] if isinstance(output, tuple) else output
            self.latest[layer] = scores.detach().reshape(-1, num_experts)

        self._hooks.append(router.register_forward_hook(keep))


def find_router(block: nn.Module, experts: nn.Module, path: str) -> nn.Module:
    """The sibling of `experts` with one weight row an expert. Raises CheckpointUnsupported."""
    for child in block.children():
        if child is experts:
            continue
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == experts.num_experts:
            return child
    raise errors.CheckpointUnsupported(
        f"{type(block).__name__} has no router beside its experts at {path}"
    )
