"""The names that `--policy` takes, and who keeps each: the node, or the scheduler and its advice.

Planted faults seen red: a name that nobody keeps, a local policy without a name, a name that
cannot be replayed, an advised policy that the scheduler does not run.
"""

from __future__ import annotations

from typing import get_args
from unittest.mock import Mock

import pytest

from compute_node.cache.policy_chooser import PolicyChooser
from proto.redis_schema import ADVISED_POLICIES, AUTO, FALLBACK_POLICY, PolicySetting
from scheduler.config import SchedulerConfig
from scheduler.daemon.members import Members
from scheduler.lab.policies import POLICIES

NAMES = set(get_args(PolicySetting)) - {AUTO}
LOCAL = NAMES - set(ADVISED_POLICIES)


def chooser(policy: str) -> PolicyChooser:
    return PolicyChooser(policy, 16.0, (0, 1), 4, lambda: None)


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_a_node_keeps_every_local_policy(name: str) -> None:
    chosen = chooser(name)
    assert type(chosen.choose()).__name__.lower() == name
    assert (chosen.name, chosen.num_fallbacks) == (name, 0)


def test_every_policy_of_a_node_has_a_name() -> None:
    assert set(chooser(AUTO).local) == LOCAL
    assert FALLBACK_POLICY in LOCAL


def test_the_scheduler_runs_what_it_advises() -> None:
    config = Mock(spec=SchedulerConfig, num_layers=2, num_experts=4)
    names = Members(config, Mock(), forecaster=Mock()).names
    assert set(ADVISED_POLICIES) <= set(names) <= NAMES
    assert names[0] == FALLBACK_POLICY, "the simplest"


def test_every_policy_can_be_replayed() -> None:
    assert set(POLICIES) >= NAMES
