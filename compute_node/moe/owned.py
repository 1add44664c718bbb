"""Experts computed where they lie: in this process, and on other boxes that own them."""

from __future__ import annotations

import time
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from compute_node.boxes.answer import Answer
from compute_node.boxes.boxes import Boxes
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.work import Work
from compute_node.moe.local import LocalBackend
from compute_node.moe.route import Route
from compute_node.moe.step import Step
from compute_node.moe.sums import Sum, take_made
from proto import errors
from proto.expert import ExpertKey

Asked = Sequence[tuple[WorkerLink, Answer]]

_PAUSE_S = 0.05  # before boxes are asked again for what only they have


class OwnedBackend:
    """Work for other boxes is sent before the own is computed, and awaited after it; where the box
    has to read, the time of that wait is run-ahead's. What comes late or not at all is computed
    here, from the own disk: the same bits. A batch of several sequences is one message a box.

    What the own store does not have is asked of others for as long as `deadline_s`.
    """

    def __init__(
        self, layer: int, local: LocalBackend, boxes: Boxes, deadline_s: float = 30.0
    ) -> None:
        self.resident = _ResidentSomewhere(layer, local.resident, boxes)
        self._layer, self._local, self._boxes = layer, local, boxes
        self._deadline_s = deadline_s

    def run(
        self,
        step: Step,
        hidden: Tensor,
        route: Route,
        experts: Sequence[int],
        sums: Sequence[Sum],
        small: Collection[int] = (),
    ) -> set[int]:
        """Raises Unavailable, too, for an expert that no box has that is up."""
        if step.batch.is_decode and (moved := self._boxes.note(self._layer, experts)):
            self._local.read_ahead(moved)
        lacking = self._boxes.lacking(self._layer, experts)
        shares = self._shares(step, experts, lacking, small)
        if not shares and not lacking:
            return self._local.run(step, hidden, route, experts, sums, small)
        sequences = [part.num_rows for part in step.batch.parts]
        work = Work.of(self._layer, experts, hidden, route.ids, route.weights, sequences)
        asked = self._ask(work, shares)
        lent = lacking.union(*shares.values())
        own = [expert for expert in experts if expert not in lent]
        began_s = time.perf_counter()
        hits = self._local.run(step, hidden, route, own, sums, small)
        if step.batch.is_decode and own and len(hits) == len(own):
            self._boxes.times.computed(time.perf_counter() - began_s, len(own))
        taken = self._take(asked, step, sums)
        late = lent - taken
        if here := sorted(late - lacking):
            hits |= self._local.run_apart(step, here, sums)
        if missing := sorted(late & lacking):
            self._insist(step, replace(work, experts=missing), sums)
        return hits | taken | lacking

    def _shares(
        self, step: Step, experts: Sequence[int], lacking: Collection[int], small: Collection[int]
    ) -> dict[WorkerLink, list[int]]:
        """What other boxes compute. Of a prompt, what a record of fewer bits will do for is
        computed here.
        """
        if step.batch.is_decode:
            return self._boxes.cheapest(self._layer, experts, self._local.here(small))
        wanted = [expert for expert in experts if expert in lacking or expert not in small]
        return self._boxes.shares(self._layer, wanted)

    def _ask(self, work: Work, shares: Mapping[WorkerLink, Sequence[int]]) -> Asked:
        """Each box for its part."""
        return [
            (link, self._ask_one(link, replace(work, experts=part)))
            for link, part in shares.items()
        ]

    def _ask_one(self, link: WorkerLink, work: Work) -> Answer:
        return link.ask(work, work.size * self._local.read_s)

    def _take(self, asked: Asked, step: Step, sums: Sequence[Sum]) -> set[int]:
        """The experts that came."""
        taken, meanwhile = set[int](), self._local.meanwhile(step, sums)
        for link, answer in asked:
            if link.comes_soon(answer):
                rows = link.wait(answer, step.check)
            else:  # the box has to read
                with self._local.waits.away():
                    meanwhile(partial(link.need_not_wait, answer))
                    rows = link.wait(answer, step.check)
            if rows is not None and self._took(link, answer, rows, sums):
                taken.update(answer.work.experts)
        return taken

    def _took(self, link: WorkerLink, answer: Answer, rows: Tensor, sums: Sequence[Sum]) -> bool:
        try:
            take_made(sums, answer.work.experts, rows)
        except errors.MessageInvalid as error:
            link.refuse(error)
            return False
        return True

    def _insist(self, step: Step, work: Work, sums: Sequence[Sum]) -> None:
        """Ask for what the own store does not have until it has come. Raises Unavailable after the
        deadline, and what `step.check` raises.
        """
        end_s = time.monotonic() + self._deadline_s
        while True:
            shares = self._boxes.shares(self._layer, work.experts)
            taken = self._take(self._ask(work, shares), step, sums)
            work = replace(work, experts=[e for e in work.experts if e not in taken])
            if not work.experts:
                return
            if time.monotonic() > end_s:
                raise errors.Unavailable(
                    f"expert {ExpertKey(self._layer, work.experts[0])} is neither in the main "
                    "node's store nor on a worker that answers: start a worker whose store has "
                    "it, then retry"
                )
            step.check()
            time.sleep(_PAUSE_S)


@dataclass(frozen=True)
class _ResidentSomewhere:
    """Experts of one layer that need no read here."""

    layer: int
    here: Container[int]
    boxes: Boxes

    def __contains__(self, expert: object) -> bool:
        if expert in self.here:
            return True
        if not isinstance(expert, int):
            return False
        return self.boxes.needs_no_read(ExpertKey(self.layer, expert))
