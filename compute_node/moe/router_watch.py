"""Recognises each MoE layer's router by what it returns, when the first tokens go through: whose
scores name the experts that were chosen, and whether its weight can be asked ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from compute_node.moe.step import current_step
from compute_node.moe.stream_watch import StreamWatch
from compute_node.predict.next_router import NextRouter, NextRouters
from proto.stats import fact

logger = logging.getLogger(__name__)

_RECOGNISED_SHARE = 0.25  # of the way from chance to always right
_ENOUGH_CHOICES = 64  # of experts by tokens: what is not recognised by then never is


@dataclass(frozen=True)
class _Scored:
    """A module and the number that it returned for each expert. scores: [T, E]."""

    module: nn.Module
    scores: Tensor


class RouterWatch:
    """Hands what routers return for all experts to the step that runs, if that keeps them; not
    where no module's scores name the chosen experts (a table of token ids chooses).

    next_routers: by MoE layer, what can be asked about hidden states of earlier layers; filled by
    the first forward pass.
    """

    layers_without_stream: list[str] = fact(
        "layers whose router is asked about what another layer's experts get: the residual stream "
        "was not recognised"
    )
    layers_without_router: list[str] = fact("layers whose router cannot be asked ahead")

    def __init__(self) -> None:
        self.next_routers = NextRouters()
        self.layers_without_stream = []
        self.layers_without_router = []

    def watch(self, model: nn.Module, layer: int, experts_path: str) -> None:
        """Look in the first forward pass at what runs beside the experts at `experts_path`."""
        experts = model.get_submodule(experts_path)
        block = model.get_submodule(experts_path.rpartition(".")[0])
        num_experts = int(experts.num_experts)  # type: ignore[arg-type]
        candidates = list[_Scored]()
        stream = StreamWatch(layer)
        stream.watch(model, experts_path)
        hooks = list[Any]()

        def saw(module: nn.Module, _: Any, output: Any) -> None:
            scores = _scores(output, num_experts)
            if scores is not None:
                candidates.append(_Scored(module, scores))

        def arrived(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, topk_ids, _ = (*args, *kwargs.values())
            is_settled = self._recognise(layer, candidates, stream, hidden, topk_ids)
            candidates.clear()
            stream.forget()
            for hook in hooks if is_settled else ():
                hook.remove()

        hooks += [
            module.register_forward_hook(saw)
            for module in block.modules()
            if module is not block and module is not experts
        ]
        hooks.append(experts.register_forward_pre_hook(arrived, with_kwargs=True))

    def _recognise(
        self,
        layer: int,
        candidates: Sequence[_Scored],
        stream: StreamWatch,
        hidden: Tensor,
        topk_ids: Tensor,
    ) -> bool:
        """Whether that is settled: yes, or no after enough choices.

        hidden: [T, D], what the experts got; topk_ids: [T, K]
        """
        found = [c for c in candidates if _names_the_chosen(c.scores, topk_ids)]
        for candidate in found:
            router = NextRouter.of(candidate.module, hidden.shape[1], candidate.scores.shape[1])
            if router and _names_the_chosen(router.scores(hidden), topk_ids):
                self._add(layer, replace(router, norm=stream.settle(hidden)))
                self._keep(layer, candidate)
                return True
        if topk_ids.numel() < _ENOUGH_CHOICES:
            return False
        stream.settle(hidden)
        self.layers_without_router.append(str(layer))
        logger.info("router not recognised, its choices are not guessed", extra={"layer": layer})
        if found:
            self._keep(layer, found[0])
        return True

    def _add(self, layer: int, router: NextRouter) -> None:
        self.next_routers.routers[layer] = router
        if router.norm is None:
            self.layers_without_stream.append(str(layer))
            logger.info("residual stream not recognised", extra={"layer": layer})

    def _keep(self, layer: int, found: _Scored) -> None:
        num_experts = found.scores.shape[1]

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            kept = current_step().scores
            if kept is None:
                return
            scores = _scores(output, num_experts)
            if scores is not None:
                kept[layer] = scores

        found.module.register_forward_hook(keep)
        if (kept := current_step().scores) is not None:
            kept[layer] = found.scores


def _scores(output: Any, num_experts: int) -> Tensor | None:
    """[T, E]; None: the output is no number for each expert."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor) or not first.dim() or first.shape[-1] != num_experts:
        return None
    return first.detach().reshape(-1, num_experts)


def _names_the_chosen(scores: Tensor, topk_ids: Tensor) -> bool:
    """Whether the best by score are clearly more of the chosen experts than chance would have it.

    scores: [T, E]; topk_ids: [T, K]
    """
    if len(scores) != len(topk_ids):
        return False
    top_k = topk_ids.shape[1]
    best = scores.topk(top_k).indices  # [T, K]
    named = (best[:, :, None] == topk_ids[:, None, :]).any(dim=1)
    chance = top_k / scores.shape[1]
    return float(named.float().mean()) > chance + _RECOGNISED_SHARE * (1 - chance)
