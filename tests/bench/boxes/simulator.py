"""What `owned` measures beside what the simulator foretells of it, from inputs measured apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploy.simulator.box import BoxSpec
from deploy.simulator.decoding import Decoding, Outcome
from deploy.simulator.geometry import Geometry
from deploy.simulator.setting import Foresight, Link, Setting
from tests.bench.boxes import simulator_inputs
from tests.bench.boxes.models import NUM_EXPERTS, NUM_LAYERS, RECORD_BYTES
from tests.bench.boxes.owned import TOP_K, Run, measure
from tests.bench.boxes.simulator_inputs import Inputs
from tests.bench.table import show
from tests.boxlab.group import EDGE_SSD, SD_CARD, Throttle
from tests.boxlab.switch import GIGABIT, WIFI
from tests.boxlab.switch import Link as LabLink

PROCESSORS = 2  # of this machine, which all boxes share
GEOMETRY = Geometry("widened", NUM_LAYERS, NUM_EXPERTS // NUM_LAYERS, TOP_K, RECORD_BYTES, 0.0, 256)


@dataclass(frozen=True)
class Place:
    """share: of the experts, in the memory of each box, %"""

    boxes: int
    share: float = 20.0
    speed: Throttle = EDGE_SSD
    link: LabLink = GIGABIT

    def __str__(self) -> str:
        return (
            f"{self.boxes} boxes, {self.share:g} %, {self.speed.bytes_per_s // 10**6} MB/s, "
            f"{1e3 * self.link.round_trip_s:g} ms"
        )


OWNED = (Place(1), Place(2), Place(4))  # as `owned` measures
OTHERS = (Place(2, speed=SD_CARD), Place(2, share=14.0), Place(4, link=WIFI))
UNSEEN = (  # by those who wrote the simulator's rules, before 2026-11-30
    Place(3),
    Place(2, share=30.0, link=WIFI),
    Place(4, share=14.0, speed=SD_CARD),
)
SEEDS = 20  # of what is named rightly and wrongly


def measure_inputs() -> None:
    inputs = simulator_inputs.measure((EDGE_SSD, SD_CARD))
    inputs.save()
    show(
        "Inputs of the simulator",
        ["input", "value"],
        [[name, f"{value:.3f}"] for name, value in simulator_inputs.rows(inputs).items()],
    )


def check(places: Sequence[Place]) -> None:
    """Foretells all, then measures each once. How fast experts are computed changes from minute to
    minute on this machine: it is measured before and after, by what nothing else here depends on.
    """
    inputs = Inputs.load()
    before = now(inputs)
    foretold = {place: simulated(place, before) for place in places}
    for place, said in foretold.items():
        print(f"{place}: {_speed(said):.2f} foretold", flush=True)
    runs = {}
    for place in places:
        runs[place] = measure(place.boxes, f"{place.share}%", place.link, place.speed)
        print(f"{place}: {runs[place].answer.tokens_per_s:.2f} measured", flush=True)
    after = now(inputs)
    speeds_s = [(one.expert_s, one.shared_expert_s) for one in (before, after)]
    print(f"an expert alone, beside another, ms: {[(1e3 * a, 1e3 * b) for a, b in speeds_s]}")
    alone_s, shared_s = (statistics.fmean(found) for found in zip(*speeds_s, strict=True))
    mean = replace(inputs, expert_s=alone_s, shared_expert_s=shared_s)
    show(
        "Tokens/s foretold, measured once, and simulated with an expert's time of before and after",
        ["place", "foretold", "measured", "error %", "simulated", "error %",
         "MiB a token, foretold", "measured"],
        [_row(place, foretold[place], runs[place], simulated(place, mean)) for place in places],
    )  # fmt: skip


def now(inputs: Inputs) -> Inputs:
    """With an expert's time of now."""
    alone_s, shared_s = simulator_inputs.expert_s(inputs.small)
    return replace(inputs, expert_s=alone_s, shared_expert_s=shared_s)


def simulated(place: Place, inputs: Inputs) -> list[Outcome]:
    """The same answers, from empty memories on, as `owned` gives them; by seed of the names."""
    (first, answer), (second, counted) = simulator_inputs.routing(inputs)
    found = []
    for seed in range(SEEDS):
        decoding = Decoding(_setting(place, inputs), seed)
        decoding.prompt(first)
        decoding.decode(answer)
        decoding.prompt(second)
        decoding.decode(second[-1:])  # of a prompt that is kept the last token is computed again
        found.append(decoding.decode(counted))
    return found


def _speed(outcomes: Sequence[Outcome]) -> float:
    return 1 / statistics.fmean(1 / one.tokens_per_s for one in outcomes)


def _setting(place: Place, inputs: Inputs) -> Setting:
    alone = place.boxes == 1
    expert_s = inputs.expert_s if alone else inputs.shared_expert_s
    slots = round(place.share / 100 * NUM_EXPERTS)
    disk = inputs.disk_bytes_per_s[str(place.speed.bytes_per_s)]
    box = BoxSpec("box", slots * RECORD_BYTES, disk, RECORD_BYTES / expert_s)
    return Setting(
        GEOMETRY,
        [box] * place.boxes,
        Link(place.link.round_trip_s, place.link.bits_per_s, inputs.message_s, inputs.serial_s),
        inputs.layer_s,
        # The recall is of all misses, those of the next token's first layers included.
        Foresight(NUM_LAYERS - 1, inputs.recall, inputs.precision, 1.0, while_waiting=True),
        processors=PROCESSORS,
    )


def _row(place: Place, foretold: Sequence[Outcome], run: Run, said: Sequence[Outcome]) -> list[str]:
    measured = run.answer.tokens_per_s
    return [
        str(place),
        f"{_speed(foretold):.2f}",
        f"{measured:.2f}",
        f"{100 * (_speed(foretold) / measured - 1):+.0f}",
        f"{_speed(said):.2f}",
        f"{100 * (_speed(said) / measured - 1):+.0f}",
        f"{statistics.fmean(one.read_bytes for one in foretold) / 2**20:.0f}",
        f"{sum(run.read_bytes) / 2**20:.0f}",
    ]
