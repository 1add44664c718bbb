"""Times that are known by hand, and hits that are the scheduler's.

Planted faults seen red: reads without their latency, all at once, or twice; a policy that hears
nothing; no wait for a read; too little memory accepted; an expert computed before it is there;
shared processors ignored; joules without time, or without the disk; messages sent all at once,
programs that take no time, bytes for bits; recall ignored, nothing named wrongly, every token
foreseen, names one layer ahead whatever is asked; run-ahead without a wait, none at all; other
boxes not awaited; costs ignored, shares for a rotation; other bits a weight; the fewest experts of
a layer taken for the most.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.plan.owners_map import placement_of
from deploy.plan.rotation import Rotation as Formula
from deploy.simulator.box import BoxSpec
from deploy.simulator.decoding import Decoding, Outcome
from deploy.simulator.geometry import GEOMETRIES, Geometry
from deploy.simulator.setting import ROTATION, Foresight, Link, Setting
from expert_store.manifest.share import Share
from proto import errors
from proto.expert import ExpertKey
from scheduler.policy.decayed import Decayed
from scheduler.simulate.replay import Setting as ReplaySetting
from scheduler.simulate.replay import ranked
from tests.scheduler.replays import recorded

LAYERS, EXPERTS, TOP_K, EXPERT_BYTES = 6, 16, 4, 1e6
GEOMETRY = Geometry("hand", LAYERS, EXPERTS, TOP_K, EXPERT_BYTES, 0.0, 1000)
READ_S, EXPERT_S, LAYER_S = 0.010, 0.002, 0.003
BOX = BoxSpec("box", 1e9, EXPERT_BYTES / READ_S, EXPERT_BYTES / EXPERT_S)
NO_LINK = Link(0.0, inf)
ALONE = Setting(GEOMETRY, [BOX], NO_LINK, LAYER_S)


def tokens(count: int, num_experts: int = EXPERTS) -> NDArray[np.uint16]:
    """[T, L, K]: each token's experts follow those of the one before."""
    first = np.arange(count)[:, None, None] * TOP_K + np.zeros((1, LAYERS, 1))
    ids: NDArray[np.uint16] = ((first + np.arange(TOP_K)) % num_experts).astype(np.uint16)
    return ids


def decoded(setting: Setting, ids: NDArray[np.uint16], *, filled: bool = True) -> Outcome:
    decoding = Decoding(setting)
    if filled:
        decoding.fill()
    return decoding.decode(ids)


def boxes(count: int, **facts: float) -> list[BoxSpec]:
    return [replace(BOX, **facts)] * count


def test_where_all_is_resident_a_token_takes_what_is_computed() -> None:
    outcome = decoded(ALONE, tokens(8))
    assert outcome.hit_ratio == 1 and outcome.read_bytes == 0
    assert 1 / outcome.tokens_per_s == pytest.approx(LAYERS * (LAYER_S + TOP_K * EXPERT_S))


def test_where_nothing_is_resident_a_token_takes_what_its_disk_takes() -> None:
    tight = replace(BOX, memory_bytes=TOP_K * EXPERT_BYTES, weights_bytes_per_s=inf)
    outcome = decoded(Setting(GEOMETRY, [tight], NO_LINK), tokens(8), filled=False)
    assert outcome.hit_ratio == 0
    assert outcome.read_bytes == LAYERS * TOP_K * EXPERT_BYTES
    assert 1 / outcome.tokens_per_s == pytest.approx(LAYERS * TOP_K * READ_S)


def test_a_read_takes_longer_where_the_disk_is_slow_to_begin() -> None:
    tight = replace(BOX, memory_bytes=TOP_K * EXPERT_BYTES, disk_read_s=0.5)
    outcome = decoded(Setting(GEOMETRY, [tight], NO_LINK), tokens(8), filled=False)
    assert 1 / outcome.tokens_per_s > LAYERS * TOP_K * 0.5


def test_hits_are_computed_while_misses_are_read() -> None:
    """A layer: two hits while two are read, one of these while the other is read, the last."""
    decoding = Decoding(replace(ALONE, layer_s=0.0))
    decoding.prompt(np.tile(np.array([0, 1, 8, 9], np.uint16), (1, LAYERS, 1)))
    outcome = decoding.decode(np.tile(np.array([0, 1, 2, 3], np.uint16), (1, LAYERS, 1)))
    assert 1 / outcome.tokens_per_s == pytest.approx(LAYERS * (2 * READ_S + EXPERT_S))
    assert outcome.hit_ratio == 0.5


@pytest.mark.parametrize("count", [2, 4])
def test_a_layer_that_is_divided_evenly_takes_its_part(count: int) -> None:
    """Every 16 / count-th expert is another box's."""
    apart = np.arange(TOP_K) * (EXPERTS // TOP_K)
    ids = np.tile(apart.astype(np.uint16), (8, LAYERS, 1))
    part = TOP_K // count
    setting = Setting(GEOMETRY, boxes(count), NO_LINK)
    assert 1 / decoded(setting, ids).tokens_per_s == pytest.approx(LAYERS * part * EXPERT_S)
    cold = decoded(setting, ids[:1], filled=False)
    assert 1 / cold.tokens_per_s == pytest.approx(LAYERS * (part * READ_S + EXPERT_S))


def test_processors_that_boxes_share_take_turns() -> None:
    apart = np.arange(TOP_K) * (EXPERTS // TOP_K)
    ids = np.tile(apart.astype(np.uint16), (8, LAYERS, 1))
    for processors, turns in ((1, 4), (2, 2), (4, 1)):
        setting = Setting(GEOMETRY, boxes(4), NO_LINK, processors=processors)
        took_s = 1 / decoded(setting, ids).tokens_per_s
        assert took_s == pytest.approx(LAYERS * turns * EXPERT_S), processors


def test_a_link_costs_its_round_trip_its_programs_and_its_bytes() -> None:
    """All experts are the one worker's, which computes in no time."""
    own = replace(BOX, memory_bytes=TOP_K * EXPERT_BYTES, cost=1.0)
    there = replace(BOX, cost=1e-9, weights_bytes_per_s=inf)
    link = Link(0.004, 1e6, 0.001)
    outcome = decoded(Setting(GEOMETRY, [own, there], link), tokens(4))
    sent, received = 1000 * 2 + TOP_K * 8 + 64, TOP_K * 1000 * 2 + 64
    assert outcome.wire_bytes == LAYERS * (sent + received)
    layer_s = 0.005 + (sent + received) * 8 / 1e6
    assert 1 / outcome.tokens_per_s == pytest.approx(LAYERS * layer_s)


def test_answers_of_several_boxes_come_one_after_another() -> None:
    """The main box has one link."""
    there = replace(BOX, cost=1e-9, weights_bytes_per_s=inf)
    main = replace(BOX, memory_bytes=TOP_K * EXPERT_BYTES)
    apart = np.arange(TOP_K) * (EXPERTS // TOP_K)
    ids = np.tile(apart.astype(np.uint16), (1, LAYERS, 1))
    sent, received = 1000 * 2 + TOP_K * 8 + 64, 1000 * 2 + 64
    for link, layer_s in (
        (Link(0.0, 1e6), (4 * sent + received) * 8 / 1e6),
        (Link(0.0, inf, 0.003, 0.002), 0.003 + 5 * 0.001),
    ):
        setting = Setting(GEOMETRY, [main, *[there] * 4], link)
        took_s = 1 / decoded(setting, ids).tokens_per_s
        assert took_s == pytest.approx(LAYERS * layer_s, rel=1e-3)


def test_one_box_hits_what_the_scheduler_replays() -> None:
    """Event by event, over one pool, by decayed frequency."""
    trace = recorded()
    geometry = Geometry("recorded", *trace.shape, trace.top_k, EXPERT_BYTES, 0.0, 1)
    slots = 12 * trace.num_layers
    setting = ReplaySetting(trace, 12, scope="pool", warmup_steps=0)
    replayed = ranked(setting, Decayed(trace.shape))
    spec = replace(BOX, memory_bytes=slots * EXPERT_BYTES)
    decoding = Decoding(Setting(geometry, [spec], NO_LINK))
    cache = decoding.boxes[0].cache
    for event in list(trace.events())[:400]:
        before = cache.num_hits
        decoding.decode(event.topk_ids[None])
        assert cache.num_hits - before == np.count_nonzero(replayed.step(event))


def test_a_rotation_is_as_fast_as_its_formula_says() -> None:
    """Every expert is read, a layer's all at once, and named a token ahead by a layer."""
    formula = Formula(
        LAYERS, TOP_K, EXPERT_BYTES, EXPERT_BYTES / READ_S, LAYER_S, EXPERT_S, 0.0, 0.0, 0.0, 8
    )
    spec = replace(BOX, memory_bytes=8 * EXPERT_BYTES)
    for groups in (1, 2, 3):
        setting = Setting(
            replace(GEOMETRY, num_experts=4096),
            [BOX, *[spec] * groups],
            NO_LINK,
            LAYER_S,
            Foresight(min(2 * groups - 1, LAYERS - 1), next_token=1.0),
            ROTATION,
            groups,
        )
        took_s = 1 / decoded(setting, tokens(40, 4096), filled=False).tokens_per_s
        assert took_s == pytest.approx(formula.seconds(groups, knows_next=True), rel=0.1), groups


def test_names_hide_reads_and_wrong_ones_cost() -> None:
    """A layer's experts are read in the time of the layers between."""
    spec = replace(BOX, memory_bytes=12 * EXPERT_BYTES, disk_bytes_per_s=EXPERT_BYTES / 0.001)
    plain = Setting(
        replace(GEOMETRY, num_experts=4096), [BOX, *[spec] * 3], NO_LINK, 0.005, placement=ROTATION
    )
    ids = tokens(30, 4096)
    took_s, read = {}, {}
    for recall, precision in ((0.0, 1.0), (0.5, 0.5), (1.0, 1.0)):
        outcome = decoded(
            replace(plain, foresight=Foresight(1, recall, precision, 1.0)), ids, filled=False
        )
        took_s[recall], read[recall] = 1 / outcome.tokens_per_s, outcome.read_bytes
    unnamed = decoded(plain, ids, filled=False)
    assert took_s[1.0] == pytest.approx(LAYERS * (0.005 + TOP_K * EXPERT_S), rel=0.02)
    assert took_s[1.0] < took_s[0.5] < took_s[0.0]
    assert took_s[0.0] == pytest.approx(1 / unnamed.tokens_per_s)
    assert read[0.0] == read[1.0] == unnamed.read_bytes
    assert read[0.5] == pytest.approx(1.5 * read[1.0], rel=0.05), "as many wrong as right"


def test_a_token_that_nobody_foresaw_has_its_first_layer_unnamed() -> None:
    spec = replace(BOX, memory_bytes=12 * EXPERT_BYTES)
    settings = [
        Setting(
            replace(GEOMETRY, num_experts=4096),
            [BOX, *[spec] * 3],
            NO_LINK,
            0.05,
            Foresight(1, next_token=next_token),
            ROTATION,
        )
        for next_token in (0.0, 1.0)
    ]
    unforeseen_s, foreseen_s = (
        1 / decoded(one, tokens(50, 4096), filled=False).tokens_per_s for one in settings
    )
    assert unforeseen_s - foreseen_s == pytest.approx(TOP_K * READ_S - 3 * EXPERT_S, rel=0.05)


def test_run_ahead_keeps_the_disk_busy_while_the_main_box_waits() -> None:
    """Nothing is resident; after the first layer's router the disk never stands still."""
    foresight = Foresight(LAYERS - 1, next_token=1.0, while_waiting=True)
    took_s = [
        1 / decoded(replace(ALONE, foresight=one), tokens(1), filled=False).tokens_per_s
        for one in (Foresight(), foresight)
    ]
    assert took_s[0] == pytest.approx(LAYERS * (LAYER_S + TOP_K * READ_S + EXPERT_S))
    assert took_s[1] == pytest.approx(LAYER_S + LAYERS * TOP_K * READ_S + EXPERT_S)


def test_run_ahead_names_nothing_while_the_main_box_has_what_it_needs() -> None:
    """However much the other one reads."""
    setting = Setting(GEOMETRY, boxes(2), NO_LINK, LAYER_S)
    took_s = []
    for foresight in (Foresight(), Foresight(LAYERS - 1, while_waiting=True)):
        decoding = Decoding(replace(setting, foresight=foresight))
        keys = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        decoding.boxes[0].cache.fill(keys)
        took_s.append(1 / decoding.decode(tokens(4)).tokens_per_s)
    assert took_s[0] == took_s[1]


def test_energy_is_of_all_boxes_idle_or_not() -> None:
    facts = {"watts": 5.0, "computing_watts": 10.0, "reading_watts": 3.0}
    setting = Setting(GEOMETRY, boxes(4, **facts), NO_LINK, LAYER_S)
    outcome = decoded(setting, tokens(1), filled=False)
    busy_s = LAYERS * (LAYER_S + TOP_K * EXPERT_S)
    joules = 4 * 5.0 / outcome.tokens_per_s + 10.0 * busy_s + 3.0 * LAYERS * TOP_K * READ_S
    assert outcome.joules == pytest.approx(joules)


def test_a_costly_box_is_given_fewer_experts() -> None:
    """By the rule of the node: memory over cost."""
    setting = Setting(GEOMETRY, [BOX, replace(BOX, cost=3.0)], NO_LINK)
    own, there = setting.map.boxes
    assert set(own.by_layer) == {12}
    assert (there.experts, there.slots) == (4 * LAYERS, 1000)
    turns = replace(setting, boxes=boxes(3), placement=ROTATION).map.boxes
    assert [set(one.by_layer) for one in turns] == [{0}, {0, EXPERTS}, {0, EXPERTS}]


def test_boxes_own_what_their_shares_have() -> None:
    """Seen red: shares of boxes ignored; experts that no box has computed by the main one."""
    thirds = [replace(BOX, share=Share(owner, 3)) for owner in (1, 2, 3)]
    setting = Setting(GEOMETRY, thirds, NO_LINK)
    held = [GEOMETRY.held(one.share) for one in thirds]
    owners = setting.owners()
    keys = [key for layer in range(LAYERS) for key in GEOMETRY.model.keys(layer)]
    assert all(key in held[owners.owners(key)[0]] for key in keys)
    assert sum(one.experts for one in setting.map.boxes) == len(keys)
    with pytest.raises(
        errors.ConfigInvalid, match=r"of 96 experts 3\d are in the share of none of 2"
    ):
        replace(setting, boxes=thirds[:2])


def test_what_cannot_be_is_refused() -> None:
    small = replace(BOX, memory_bytes=(TOP_K - 1) * EXPERT_BYTES)
    with pytest.raises(errors.MemoryExceeded, match=r"room for 3 experts, .* needs 4"):
        Decoding(Setting(GEOMETRY, [small], NO_LINK))
    with pytest.raises(errors.InvalidRequest, match="no placement 'turns'"):
        placement_of("turns")
    with pytest.raises(errors.InvalidRequest, match="6 layers ahead of 6"):
        replace(ALONE, foresight=Foresight(6))


@pytest.mark.parametrize(
    ("name", "expert_bytes", "experts_gb", "dense_gb"),
    [
        ("gpt-oss-20b", 13_219_200, 10.15, 2.44),
        ("Qwen3-30B-A3B", 9_437_184, 57.98, 2.46),
        ("Qwen3-30B-A3B-int4", 2_654_208, 16.31, 2.46),
        ("DeepSeek-V3", 44_040_192, 653.9, 17.2),
    ],
)
def test_geometries_are_those_of_the_checkpoints(
    name: str, expert_bytes: int, experts_gb: float, dense_gb: float
) -> None:
    """DeepSeek-V3 has 671e9 parameters, of which 37e9 are used for a token."""
    found = GEOMETRIES[name]
    assert found.expert_bytes == expert_bytes
    assert found.experts_bytes / 1e9 == pytest.approx(experts_gb, rel=1e-3)
    assert found.dense_bytes / 1e9 == pytest.approx(dense_gb, rel=5e-3)
