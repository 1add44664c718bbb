"""The memory plan: what it adds up, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.plan import cgroup
from deploy.plan.budget import default_kv_bytes, plan_memory
from deploy.plan.mebibytes import MIB
from deploy.plan.room import check_room, shortage
from deploy.settings import ServeSettings, parse_bytes, parse_experts_memory
from deploy.stack.run_dir import RunDir
from deploy.stack.tables import compose
from expert_store.manifest.manifest import Manifest
from expert_store.offline.pack import pack
from proto import errors
from tests.stack import MODEL


@pytest.fixture(scope="module")
def manifest(tiny_store: Path) -> Manifest:
    return Manifest.load(tiny_store)


def plan(manifest: Manifest, memory_bytes: int | None, experts: str | None):  # type: ignore[no-untyped-def]
    return plan_memory(
        manifest,
        memory_bytes,
        experts,
        context_tokens=2048,
        chunk_tokens=256,
        spare_bytes=4 * manifest.slot_bytes,
    )


def test_parts_sum_to_the_total_and_stay_below(manifest: Manifest) -> None:
    found = plan(manifest, 1024 * MIB, None)
    assert found.total_bytes == sum(found.parts.values()) <= 1024 * MIB
    assert found.parts["experts"] == found.experts_bytes == found.slots * manifest.slot_bytes
    assert (found.spare_bytes, found.spare_slots) == (4 * manifest.slot_bytes, 4)
    assert found.parts["kv_cache"] == 2 * 2048 * manifest.sizing.cache_bytes_per_token
    assert found.parts["spare_slots"] >= 4 * manifest.slot_bytes


def test_a_tokenizer_is_planned_as_loaded_and_as_being_loaded(manifest: Manifest) -> None:
    """While it is loaded, no prompt is computed: red where that room is not counted."""

    def tokenizer(vocabulary_bytes: int) -> tuple[int, int]:
        found = plan_memory(
            manifest,
            1024 * MIB,
            None,
            context_tokens=2048,
            chunk_tokens=256,
            spare_bytes=0,
            vocabulary_bytes=vocabulary_bytes,
        ).parts
        return found["tokenizer"], found["prefill_buffers"] + found["kv_cache"]

    assert tokenizer(0)[0] == 0
    small, room = tokenizer(MIB)
    assert small == 4 * MIB > 14 * MIB - room
    large, room = tokenizer(10 * MIB)
    assert large == 140 * MIB - room > 40 * MIB


def test_a_grammar_is_planned_where_there_is_a_tokenizer(manifest: Manifest) -> None:
    """Red where it is not counted: it comes with the first request that asks for it."""

    def grammar(vocabulary_bytes: int) -> int:
        common = {"context_tokens": 2048, "chunk_tokens": 256, "spare_bytes": 0}
        found = plan_memory(manifest, 1024 * MIB, None, vocabulary_bytes=vocabulary_bytes, **common)
        return found.parts["grammar"]

    assert (grammar(0), grammar(10 * MIB)) == (0, 52 * MIB)


@pytest.mark.parametrize(("trained_tokens", "is_told"), [(2047, True), (2048, False)])
def test_a_context_beyond_what_the_model_was_trained_for_is_told(
    trained_tokens: int, is_told: bool, manifest: Manifest
) -> None:
    sizing = replace(manifest.sizing, max_position_embeddings=trained_tokens)
    found = plan(replace(manifest, sizing=sizing), 1024 * MIB, None).warnings
    assert ["trained for 2,047" in warning for warning in found] == [True] * is_told


@pytest.mark.parametrize(
    ("text", "slots"), [("96", 96), ("37.5%", 96), ("100%", 256), ("10MiB", 69), ("999", 256)]
)
def test_experts_memory_in_three_spellings(manifest: Manifest, text: str, slots: int) -> None:
    assert plan(manifest, None, text).slots == slots


@pytest.mark.parametrize(
    ("slot_mib", "table", "spare"),
    [
        (0.25, {}, 4),
        (1, {}, 4),
        (3, {}, 4),
        (6, {}, 3),
        (24, {}, 2),
        (24, {"spare_slots": 7}, 7),
        (24, {"piece_bytes": 64 * MIB}, 4),
        (0.25, {"read_depth": 1}, 2),
    ],
)
def test_spare_slots_follow_what_is_read_at_once(
    slot_mib: float, table: dict[str, int], spare: int
) -> None:
    """A record of many pieces needs fewer."""
    settings = ServeSettings(expert_store=table)
    assert settings.spare_slots(int(slot_mib * MIB)) == spare


@pytest.mark.parametrize(
    ("heads", "table", "tokens"),
    [(0, {}, 512), (64, {}, 256), (64, {"prefill_chunk_tokens": 1024}, 1024)],
)
def test_chunks_follow_what_attention_holds(
    heads: int, table: dict[str, int], tokens: int, manifest: Manifest, tmp_path: Path
) -> None:
    """The scores of 256 tokens take 400 MB of a gpt-oss; the node does what was planned."""
    settings = ServeSettings(compute_node=table)
    sizing = replace(manifest.sizing, eager_attention_heads=heads)
    assert settings.chunk_tokens(sizing) == tokens
    found = plan(manifest, 1024 * MIB, None)
    run = RunDir(tmp_path)
    tables = compose(run, settings, tmp_path, replace(manifest, sizing=sizing), found)
    assert tables["compute_node"]["prefill_chunk_tokens"] == tokens


@pytest.mark.parametrize("text", ["0%", "120%", "x%", "many", "-3"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(errors.ConfigInvalid, match="experts memory"):
        parse_experts_memory(text, 256, 4096)


def test_the_smallest_ceiling_named_is_enough(manifest: Manifest) -> None:
    with pytest.raises(errors.MemoryExceeded, match="smallest that works is") as raised:
        plan(manifest, 100 * MIB, None)
    smallest = int(str(raised.value).rsplit(" is ", 1)[1].split()[0].replace(",", ""))
    assert plan(manifest, smallest * MIB, None).slots >= 32
    with pytest.raises(errors.MemoryExceeded):
        plan(manifest, (smallest - 2) * MIB, None)


@pytest.mark.parametrize(("left", "states"), [(3199, 1), (3200, 2), (6400, 4), (99_999, 8)])
def test_state_of_one_to_eight_sequences_as_the_rest_allows(left: int, states: int) -> None:
    assert default_kv_bytes(100, left) == states * 100


def test_state_for_less_than_one_sequence_is_refused(manifest: Manifest) -> None:
    with pytest.raises(errors.ConfigInvalid, match=r"^kv_memory 1 MiB .* at least 8 MiB"):
        plan_memory(
            manifest,
            1024 * MIB,
            None,
            context_tokens=2048,
            chunk_tokens=256,
            spare_bytes=0,
            kv_memory_bytes=MIB,
        )


def test_too_few_slots_are_refused_however_much_state_is_planned(manifest: Manifest) -> None:
    """Red before: room for the state of eight sequences stood in for the experts of a token."""
    with pytest.raises(errors.MemoryExceeded, match="31 slots, one token needs 32"):
        plan(manifest, 4096 * MIB, "31")


def test_experts_that_do_not_fit_the_ceiling(manifest: Manifest) -> None:
    with pytest.raises(errors.MemoryExceeded, match="fewer experts memory or a higher ceiling"):
        plan(manifest, 500 * MIB, "100%")


def test_neither_memory_nor_experts(manifest: Manifest) -> None:
    with pytest.raises(errors.ConfigInvalid, match="--memory"):
        plan(manifest, None, None)


def test_memory_that_others_hold_is_not_planned_with(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red before: only the machine's total and the cgroup's limit were looked at, and the kernel
    killed. The launcher's own part is taken already.
    """
    found = plan(manifest, 1024 * MIB, None)
    needed = found.total_bytes - found.parts["launcher"]
    monkeypatch.setattr(cgroup, "available_bytes", lambda: needed)
    assert shortage(found) == ""
    check_room(found)
    monkeypatch.setattr(cgroup, "available_bytes", lambda: needed - 20 * MIB)
    with pytest.raises(errors.MemoryExceeded, match="available now") as raised:
        check_room(found)
    fitting = re.search(r"give --memory (\d+MiB)", str(raised.value))
    assert fitting and shortage(plan(manifest, parse_bytes(fitting[1], "--memory"), None)) == ""
    monkeypatch.setattr(cgroup, "available_bytes", lambda: 300 * MIB)
    with pytest.raises(errors.MemoryExceeded, match="the smallest --memory that works") as raised:
        check_room(found)
    smallest = int(str(raised.value).rsplit(" is ", 1)[1].split()[0].replace(",", ""))
    assert plan(manifest, smallest * MIB, None).total_bytes <= smallest * MIB


def test_settings_flag_over_file_over_default(tmp_path: Path) -> None:
    path = tmp_path / "flashmoe.toml"
    path.write_text('[serve]\nmemory = "2GiB"\nredis = "redis://x"\n[compute_node]\nthreads = 2\n')
    settings = ServeSettings.load(path).with_flags(memory="3GiB", redis=None)
    assert (settings.memory, settings.redis, settings.experts_memory) == ("3GiB", "redis://x", None)
    assert settings.compute_node == {"threads": 2}


def test_sizes() -> None:
    assert parse_bytes("2GiB", "x") == 2 << 30
    with pytest.raises(errors.ConfigInvalid, match="write for example 2GiB"):
        parse_bytes("2 apples", "--memory")


@pytest.mark.parametrize(("weight_format", "share"), [("int4", 1 / 3), ("lossless", 0.82)])
def test_packed_experts_leave_room_to_unpack_one(
    weight_format: str, share: float, tmp_path: Path, manifest: Manifest
) -> None:
    """Matrices of 192 x 256: as bf16, and each code a byte. Slots shrink as records do."""
    pack(MODEL, tmp_path / "packed", weight_format=weight_format)
    packed = Manifest.load(tmp_path / "packed")
    exact, found = plan(manifest, None, "100%"), plan(packed, None, "100%")
    added = found.parts["prefill_buffers"] - exact.parts["prefill_buffers"]
    assert added == 192 * 256 * 3
    assert found.parts["experts"] < exact.parts["experts"] * share
