"""The names that `--policy` takes, and who keeps each: the node, or the scheduler and its advice.

Planted faults seen red: a name that nobody keeps, a local policy without a name, a name that
cannot be replayed, an advised policy that the scheduler does not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import pytest

from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.config import ComputeNodeConfig
from proto.redis_schema import (
    ADVISED_POLICIES,
    AUTO,
    FALLBACK_POLICY,
    IMPORTANCE_POLICY,
    PolicySetting,
)
from scheduler.config import SchedulerConfig
from scheduler.daemon.members import Members
from scheduler.lab.policies import POLICIES
from scheduler.policy.importance import Importance
from tests.scheduler.traces import small_config

NAMES = set(get_args(PolicySetting)) - {AUTO}
LOCAL = NAMES - set(ADVISED_POLICIES)


def chooser(policy: str, weighs: bool = True) -> PolicyChooser:
    return PolicyChooser(policy, 16.0, (0, 1), 4, lambda: None, weighs=weighs)


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_a_node_keeps_every_local_policy(name: str) -> None:
    chosen = chooser(name)
    assert type(chosen.choose()).__name__.lower() == name
    assert (chosen.name, chosen.num_fallbacks) == (name, 0)


def test_every_policy_of_a_node_has_a_name() -> None:
    assert set(chooser(AUTO).local) == LOCAL
    assert set(chooser(AUTO, weighs=False).local) == LOCAL - {IMPORTANCE_POLICY}
    assert FALLBACK_POLICY in LOCAL


def test_the_scheduler_runs_what_it_advises() -> None:
    config = Mock(
        spec=SchedulerConfig,
        num_layers=2,
        num_experts=4,
        decayed_half_life_tokens=16.0,
        runs_importance=True,
    )
    names = Members(config, Mock(), forecaster=Mock()).names
    assert set(ADVISED_POLICIES) <= set(names) <= NAMES
    assert names[0] == FALLBACK_POLICY, "the simplest"
    assert isinstance(Members(config, Mock()).of("node")[IMPORTANCE_POLICY], Importance)
    config.runs_importance = False
    assert IMPORTANCE_POLICY not in Members(config, Mock()).names, "it is asked for"


@pytest.mark.parametrize(
    ("changes", "is_on"),
    [({}, False), ({"importance": True}, True), ({"policy": "importance"}, True)],
)
def test_node_and_scheduler_agree_on_who_goes_by_gates(
    changes: dict[str, Any], is_on: bool
) -> None:
    """Red when one of them looks at the key alone, or at the policy alone."""
    scheduler = small_config(**changes)
    node = ComputeNodeConfig(
        address="unix:n", store_address="unix:s", session_dir=Path("s"), slots=8, **changes
    )
    assert (node.weighs, scheduler.runs_importance) == (is_on, is_on)


def test_every_policy_can_be_replayed() -> None:
    assert set(POLICIES) >= NAMES
