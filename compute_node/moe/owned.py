"""Experts computed where they lie: in this process, and on other boxes that own them."""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

from torch import Tensor

from compute_node.boxes.answer import Answer
from compute_node.boxes.boxes import Boxes
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.work import Work
from compute_node.moe.local import LocalBackend
from compute_node.moe.route import Route
from compute_node.moe.step import Step
from compute_node.moe.sums import Sum
from proto import errors
from proto.expert import ExpertKey


class OwnedBackend:
    """Work for other boxes is sent before the own is computed, and awaited after it. What comes
    late or not at all is computed here, from the own disk: the same bits. A batch of several
    sequences is computed here.
    """

    def __init__(self, layer: int, local: LocalBackend, boxes: Boxes) -> None:
        self.resident = _ResidentSomewhere(layer, local.resident, boxes)
        self._layer, self._local, self._boxes = layer, local, boxes

    def run(
        self,
        step: Step,
        hidden: Tensor,
        route: Route,
        experts: Sequence[int],
        sums: Sequence[Sum],
        small: Collection[int] = (),
    ) -> set[int]:
        shares: dict[WorkerLink, list[int]] = {}
        if len(sums) == 1:
            shares = self._boxes.shares(self._layer, (e for e in experts if e not in small))
        if not shares:
            return self._local.run(step, hidden, route, experts, sums, small)
        asked = [
            (link, self._ask(link, Work(self._layer, part, hidden, route.ids, route.weights)))
            for link, part in shares.items()
        ]
        lent = {expert for part in shares.values() for expert in part}
        own = [expert for expert in experts if expert not in lent]
        hits = self._local.run(step, hidden, route, own, sums, small)
        for link, answer in asked:
            if not self._took(link, answer, step, sums[0]):
                hits |= self._local.run_apart(step, answer.work.experts, sums[0])
                lent.difference_update(answer.work.experts)
        return hits | lent

    def _ask(self, link: WorkerLink, work: Work) -> Answer:
        return link.ask(work, work.size * self._local.read_s)

    def _took(self, link: WorkerLink, answer: Answer, step: Step, total: Sum) -> bool:
        rows = link.wait(answer, step.check)
        if rows is None:
            return False
        try:
            total.take(answer.work.experts, rows)
        except errors.MessageInvalid as error:
            link.refuse(error)
            return False
        return True


@dataclass(frozen=True)
class _ResidentSomewhere:
    """Experts of one layer that need no read here."""

    layer: int
    here: Container[int]
    boxes: Boxes

    def __contains__(self, expert: object) -> bool:
        if expert in self.here:
            return True
        return isinstance(expert, int) and ExpertKey(self.layer, expert) in self.boxes
