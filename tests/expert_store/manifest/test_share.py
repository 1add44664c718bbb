"""Which experts a share has, and what its manifest says of it.

Written against: every layer begun with the same owner, copies on the same owner, a share
without what main nodes probe with, a share's records not compared with its rule.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from expert_store.manifest.manifest import Manifest
from expert_store.manifest.share import Share
from proto import errors
from proto.expert import ExpertKey, ModelSpec, RecordKey
from tests.expert_store.stores import with_small_variant, write_store

SPEC = ModelSpec("f", "toy", (1, 2, 5, 7), 32, 4, dict.fromkeys((1, 2, 5, 7), ()))
EVERY = {ExpertKey(layer, expert) for layer in SPEC.moe_layers for expert in range(32)}


@pytest.mark.parametrize(("owners", "copies"), [(1, 1), (2, 1), (3, 1), (3, 2), (5, 3), (32, 1)])
def test_shares_have_every_expert_as_often_as_copies_say(owners: int, copies: int) -> None:
    shares = [Share(owner + 1, owners, copies).experts(SPEC) for owner in range(owners)]
    counts = Counter(key for share in shares for key in share)
    assert counts.keys() == EVERY
    assert {counts[key] for key in EVERY.difference(SPEC.probe_keys)} == {copies}
    assert {counts[key] for key in SPEC.probe_keys} == {owners}, "every box can be tried out"
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= len(SPEC.moe_layers) // owners + 2


def test_owners_take_turns_in_being_first() -> None:
    assert Share(1, 2).experts(SPEC) == {
        *(ExpertKey(layer, expert) for layer in (1, 5) for expert in range(16)),
        *(ExpertKey(layer, expert) for layer in (2, 7) for expert in range(16, 32)),
        ExpertKey(7, 0),
    }


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "/3", "-1/3", "1/3/5", "a/b", "1.5/3"])
def test_an_owner_that_is_none_is_named(text: str) -> None:
    with pytest.raises(errors.ConfigInvalid, match="write for example 1/3"):
        Share.parse(text, 1)


@pytest.mark.parametrize("copies", [0, -1, 4])
def test_copies_that_cannot_be_are_named(copies: int) -> None:
    assert Share.parse("2/3", 3) == Share(2, 3, 3)
    with pytest.raises(errors.ConfigInvalid, match=f"^{copies} copies of 3 shares: give 1 to 3"):
        Share.parse("2/3", copies)


def test_more_shares_than_experts_are_refused() -> None:
    with pytest.raises(errors.ManifestInvalid, match="33 shares of 32 experts a layer"):
        Share(1, 33).experts(SPEC)


@pytest.fixture
def part(tmp_path: Path) -> Manifest:
    """A third of a store with two records an expert."""
    write_store(tmp_path)
    whole, share = with_small_variant(tmp_path), Share(2, 3)
    experts = share.experts(whole.spec)
    records = {key: one for key, one in whole.records.items() if key.expert in experts}
    return replace(whole, records=records, share=share)


def test_a_share_is_written_and_read(part: Manifest, tmp_path: Path) -> None:
    part.write(tmp_path)
    found = Manifest.load(tmp_path)
    assert found == part and found.num_experts == 5 and not found.held.is_all
    assert RecordKey(ExpertKey(1, 2)) in found.records
    assert ExpertKey(1, 2) in found.held and ExpertKey(1, 4) not in found.held
    with pytest.raises(errors.ExpertElsewhere, match=r"share 2 of 3 and has no expert L01E004"):
        found.record(RecordKey.exact(1, 4))
    with pytest.raises(errors.UnknownExpert, match="this model has no expert L02E004"):
        found.record(RecordKey.exact(2, 4))
    assert not errors.ExpertElsewhere.retryable


def test_a_share_that_lacks_a_record_or_has_another_is_refused(
    part: Manifest, tmp_path: Path
) -> None:
    small = next(key for key in part.records if key.variant != "exact")
    few = {key: record for key, record in part.records.items() if key != small}
    replace(part, records=few).write(tmp_path)
    with pytest.raises(
        errors.ManifestInvalid, match=f"'int4': share 2 of 3 lacks expert {small.expert}"
    ):
        Manifest.load(tmp_path)
    replace(part, share=Share(3, 3)).write(tmp_path)
    with pytest.raises(
        errors.ManifestInvalid, match=r"share 3 of 3 (lacks|should not have) expert"
    ):
        Manifest.load(tmp_path)
    for share in (Share(0, 3), Share(4, 3), Share(2, 3, 0), Share(2, 3, 4), Share(1, 7)):
        replace(part, share=share).write(tmp_path)
        with pytest.raises(errors.ManifestInvalid, match=r"no share|7 shares of 6"):
            Manifest.load(tmp_path)
